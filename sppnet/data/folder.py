"""The images that paths name: files, folders and patterns."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from sppnet.errors import SppnetError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"})


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """The image files that `paths` name, each once, sorted.

    A path is a file (taken as it is, whatever its ending), a folder (every image below it, at any depth,
    hidden folders and files left out) or a glob pattern that the shell did not expand (``**`` allowed).
    Raises SppnetError for a path that names nothing, a folder without images and an empty `paths`.
    """
    if not paths:
        raise SppnetError("expected at least one image, folder or pattern, got none; name one, e.g. photos/")
    return sorted({image for path in paths for image in _images_of(Path(path))})


def _images_of(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    endings = ", ".join(sorted(IMAGE_SUFFIXES))
    if path.is_dir():
        below = path.rglob("*")
        found = [file for file in below if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        missing = f"{path}: no image in this folder; expected files ending in {endings}"
    else:
        found = [Path(match) for match in glob.glob(str(path), recursive=True)]  # noqa: PTH207 - absolute patterns too
        missing = f"{path}: no such file, folder or match; give images ({endings}), a folder or a pattern"
    images = [file for file in found if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()]
    if not images:
        raise SppnetError(missing)
    return images
