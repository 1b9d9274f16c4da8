"""Image folders: the images that `detect` is asked for, and one folder per class for classification."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

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
    found = {image for path in paths for image in _images_of(Path(path))}
    return sorted(found)


def load_image_folder(root: Path | str) -> tuple[list[Path], NDArray[np.int64], tuple[str, ...]]:
    """Paths (N), labels (N,) into classes, and the classes: one sub-folder of `root` per class, sorted.

    Images are sorted within their class; hidden folders are left out. Raises SppnetError where `root` is no
    folder, has no sub-folders, or a class has no image.
    """
    root = Path(root)
    if not root.is_dir():
        raise SppnetError(f"{root}: no such folder; give one that holds one sub-folder of images per class")
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise SppnetError(f"{root}: expected one sub-folder of images per class, found none; sort the images into some")
    images = [_images_in(folder) for folder in folders]
    labels = np.repeat(np.arange(len(folders)), [len(paths) for paths in images])
    return [path for paths in images for path in paths], labels, tuple(folder.name for folder in folders)


def _images_of(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if path.is_dir():
        return _images_in(path)
    matches = [Path(match) for match in glob.glob(str(path), recursive=True)]  # noqa: PTH207 - absolute patterns too
    images = [match for match in matches if match.is_file() and _is_image(match)]
    if not images:
        endings = ", ".join(sorted(IMAGE_SUFFIXES))
        raise SppnetError(f"{path}: no such file, folder or match; give images ({endings}), a folder or a pattern")
    return images


def _images_in(folder: Path) -> list[Path]:
    visible = (path for path in folder.rglob("*") if not _is_hidden(path.relative_to(folder)))
    images = sorted(path for path in visible if _is_image(path) and path.is_file())
    if not images:
        raise SppnetError(
            f"{folder}: no image in this folder; expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    return images


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
