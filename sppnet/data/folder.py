"""The images that paths name: files, folders and patterns."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sppnet.errors import SppnetError
from sppnet.images import IMAGE_SUFFIXES, UNREAD_SUFFIXES


@dataclass
class FoundImages:
    """What paths name. Nothing that lies below them is in none of these."""

    images: list[Path] = field(default_factory=list)  # sorted, each once
    others: list[Path] = field(default_factory=list)  # files of other kinds
    unusable: dict[Path, str] = field(default_factory=dict)  # links without an end and the like, with the reason
    passed_over: Counter[str] = field(default_factory=Counter)  # hidden things and other files, by ending

    def note(self) -> str:
        """What was passed over, in words: "passed over: 2 .txt, 1 .mov, 1 hidden"."""
        most = sorted(self.passed_over.items(), key=lambda item: (-item[1], item[0]))
        return f"passed over: {', '.join(f'{count} {kind}' for kind, count in most)}" if most else ""


def find_images(paths: Sequence[str | Path]) -> FoundImages:
    """The image files that `paths` name.

    A path is a file (taken as it is, whatever its ending), a folder (every image below it, at any depth, through links
    too but each folder once; hidden folders and files left out) or a glob pattern that the shell did not expand
    (``**`` allowed), which names files. Raises SppnetError for a path that names nothing, a folder without images and
    an empty `paths`.
    """
    if not paths:
        raise SppnetError("expected at least one image, folder or pattern, got none; name one, e.g. photos/")
    found = FoundImages()
    for path in dict.fromkeys(map(Path, paths)):
        before = len(found.images) + len(found.unusable)
        if path.is_dir():
            search(path, found)
            missing = "no image in this folder; expected files ending in {}"
        elif path.exists() or path.is_symlink():
            found.images.append(path)  # whatever it is: reading it says what is wrong
        else:
            matches = sorted(glob.glob(str(path), recursive=True), key=len)  # noqa: PTH207 - absolute patterns too
            for match in {os.path.realpath(match): match for match in reversed(matches)}.values():  # loops of links
                if not Path(match).is_dir():
                    _take(Path(match), found)
            missing = "no such file, folder or match; give images ({}), a folder or a pattern"
        if len(found.images) + len(found.unusable) == before:
            note = found.note()
            endings = ", ".join(IMAGE_SUFFIXES)
            raise SppnetError(f"{path}: {missing.format(endings)}{f' ({note})' if note else ''}")
    by_place = {os.path.realpath(image): image for image in reversed(found.images)}
    found.images = sorted(by_place.values())
    return found


def search(top: Path, found: FoundImages) -> FoundImages:
    """Add all below a folder; linked folders last, so that what lies below `top` itself keeps its own name."""

    def refused(error: OSError) -> None:
        found.unusable[Path(error.filename)] = f"{error.filename}: cannot be searched ({error.strerror})"

    seen: set[str] = set()
    waiting = [top]
    while waiting:
        for folder, names, files in os.walk(waiting.pop(0), onerror=refused):
            place = os.path.realpath(folder)
            if place in seen:
                names.clear()
                continue
            seen.add(place)
            hidden = [name for name in (*names, *files) if name.startswith(".")]
            found.passed_over.update(["hidden"] * len(hidden))
            names[:] = sorted(name for name in names if not name.startswith("."))
            waiting += [Path(folder, name) for name in names if Path(folder, name).is_symlink()]
            for name in sorted(set(files) - set(hidden)):
                _take(Path(folder, name), found)
    return found


def _take(path: Path, found: FoundImages) -> None:
    if path.suffix.lower() in IMAGE_SUFFIXES + UNREAD_SUFFIXES:
        found.images.append(path)
    elif path.is_symlink() and not path.exists():
        found.unusable[path] = f"{path}: a link to {path.readlink()}, which is not there"
    else:
        found.others.append(path)
        found.passed_over[path.suffix.lower() or "without ending"] += 1
