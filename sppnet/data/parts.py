"""The parts of a data set, the files below its folder, and how labels and lists find their images.

Paths of a `Tree` are relative to its root. An image is found by name or stem; of several, the one whose folders are
most like those of the file that names it: beside it, in a folder of the same name, or in one that mirrors it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from sppnet.data.folder import FoundImages, search
from sppnet.data.labels import normalise, read_lines
from sppnet.errors import SppnetError, counted
from sppnet.images import IMAGE_SUFFIXES
from sppnet.records import Annotation, SkipCounts

ROLES = ("train", "val", "test")
_NAMES = r"train(?:ing|val)?|val(?:id(?:ation)?)?|test(?:ing)?"
IN_NAME = re.compile(rf"(?<![a-z])({_NAMES})(?![a-z])")
OF_FOLDER = re.compile(rf"({_NAMES})(\d+|[_-]?(images|set|data))?")
FLAG = re.compile(r"(.*\S)\s+(-1|0|1)")  # the second column of VOC's per-class lists


class Part(NamedTuple):
    """The images of one part by id, and what reads the objects of one: (id, (height, width), EXIF orientation)."""

    images: Mapping[str, Path]
    annotate: Callable[[str, tuple[int, int], int], tuple[Annotation, Mapping[str, int]]]
    unlabelled: Collection[str] = ()  # have no annotation: `annotate` says why


@dataclass(frozen=True)
class DataFolder:
    """What a folder of pictures and labels is; made by `sppnet.data.layouts.find_data`."""

    root: Path
    format: str  # voc, coco or yolo
    parts: tuple[str, ...]
    contents: Mapping[str, Part] = field(default_factory=dict, repr=False)  # none of year folders: `splits` reads them
    left_out: SkipCounts = field(default_factory=SkipCounts)
    classes: tuple[str, ...] = ()  # those that the format lists, in its order
    labelled: int = 0  # images with labels
    notes: tuple[str, ...] = ()

    @property
    def roles(self) -> dict[str, tuple[str, ...]]:
        """The parts to train on, to validate and to test on, by their names; where no name says, all parts train.

        A trainval beside its own train is left out, and so is a val part of the very images of train.
        """
        found = {part: role_of(part) for part in self.parts}
        halves = {part.replace("trainval", "train") for part in self.parts if "trainval" in part} & set(found)
        found = {p: role for p, role in found.items() if p.replace("trainval", "train") not in halves or p in halves}
        roles = {role: tuple(part for part, own in found.items() if own == role) for role in ROLES}
        roles["train"] = roles["train"] or tuple(part for part, own in found.items() if own is None)
        train, val = ({image for part in roles[role] for image in self._images(part)} for role in ROLES[:2])
        return roles | ({"val": ()} if val and val <= train else {})

    def _images(self, part: str) -> Collection[str]:
        return self.contents[part].images if part in self.contents else ()

    def part(self, name: str) -> Part:
        """The part of this name; SppnetError, with those that there are, for one that is not."""
        if name not in self.contents:
            here = ", ".join(self.parts) or "none"
            raise SppnetError(f"{self.root}: no part {name!r} in these {self.format.upper()} data; parts here: {here}")
        return self.contents[name]


def role_of(part: str) -> str | None:
    """train, val or test, as the name of a part says; None where it does not."""
    found = IN_NAME.search(part.lower())
    return next((role for role in ROLES if found and found[1].startswith(role)), None)


class Tree:
    """The files below a folder, through links too, each folder once; hidden ones are left out."""

    def __init__(self, root: Path) -> None:
        found = search(root, FoundImages())
        self.root = root
        self.images = sorted(path.relative_to(root) for path in found.images)
        self.others = sorted(path.relative_to(root) for path in found.others)
        self._named: dict[str, list[Path]] = {}
        for path in self.images:
            for name in {normalise(path.name), normalise(path.stem)}:
                self._named.setdefault(name, []).append(path)

    def of(self, *endings: str) -> list[Path]:
        return [path for path in self.others if path.suffix.lower() in endings]

    def find(self, text: str, beside: Path, part: str = "") -> tuple[int, list[Path]]:
        """The images that `text` names in a file of the folder `beside`, and how alike the folders are.

        A name with its ending goes before a stem. More than one is a tie. An image below a folder called `part` is
        preferred.
        """
        steps = normalise(text).replace("\\", "/").split("/")
        *folders, name = [step for step in steps if step not in ("", ".", "..")] or [""]
        named = self._named.get(name, [])
        exact = [path for path in named if normalise(path.name) == name]
        place = (*map(normalise, beside.parts), *folders)
        alike = {path: _alike(path.parent.parts, place) + (part in path.parent.parts) for path in exact or named}
        best = max(alike.values(), default=0)
        return best, [path for path, value in alike.items() if value == best]

    def id_of(self, path: Path) -> str:
        return normalise(path.with_suffix("").as_posix())

    def by_id(self, images: Iterable[Path]) -> dict[str, Path]:
        """Id -> file; SppnetError for two images of one id."""
        found: dict[str, Path] = {}
        for path in images:
            first = found.setdefault(self.id_of(path), path)
            if first != path:
                both = f"{self.root / first} and {path.name} are both files of the id {self.id_of(path)!r}"
                raise SppnetError(f"{both}; rename or remove one of them")
        return {name: self.root / path for name, path in found.items()}


def _alike(folders: tuple[str, ...], place: tuple[str, ...]) -> int:
    """How many folders two paths share at their beginnings and at their ends."""
    own = tuple(map(normalise, folders))
    ways = ((own, place), (own[::-1], place[::-1]))
    return sum(len([*takewhile(lambda both: both[0] == both[1], zip(*way, strict=False))]) for way in ways)


def pair(tree: Tree, labels: Iterable[Path]) -> tuple[dict[Path, Path], list[Path]]:
    """Image -> its label file, by stem and folders; and the files among them that have no image of their own."""
    found: dict[Path, tuple[int, Path]] = {}
    lost = list[Path]()
    for label in labels:
        alike, images = tree.find(label.stem, label.parent)
        if len(images) > 1:
            both = f"fits {images[0]} and {images[1]} alike"
            raise SppnetError(
                f"{tree.root / label}: {both}; put it beside its image, or into folders of the same names"
            )
        for image in images:
            before, other = found.get(image, (-1, label))
            if alike == before:
                raise SppnetError(f"{tree.root / label} and {other} are both labels of {image}; keep one of them")
            lost += [other] * (0 <= before < alike) + [label] * (alike < before)
            found[image] = max((before, other), (alike, label))
        lost += [] if images else [label]
    pairs = {image: label for image, (_, label) in found.items()}
    folders = {label.parent for label in pairs.values()}
    return dict(sorted(pairs.items())), [label for label in lost if label.parent in folders]


def group(tree: Tree, images: Iterable[Path]) -> dict[str, list[Path]]:
    """Part -> its images: by lists (ImageSets, or a train.txt), else by folders called train, valid and so on.

    Where neither says, all `images` are the part "all"; those that no such folder holds are "other".
    """
    if lists := {path.with_suffix(""): listed for path in _lists(tree) if (listed := read_list(tree, path))}:
        short = len({path.name for path in lists}) == len(lists)
        return {path.name if short else path.as_posix(): listed for path, listed in lists.items()}
    parts: dict[str, list[Path]] = {}
    for path in images:
        folder = next((name for name in path.parent.parts if OF_FOLDER.fullmatch(name.lower())), "other")
        parts.setdefault(folder, []).append(path)
    if {*map(role_of, parts)} in (
        {None},
        {None, "train"},
    ):  # train beside others: of pictures of trains
        parts = {"all": [path for own in parts.values() for path in own]}
    return parts


def _lists(tree: Tree) -> list[Path]:
    texts = [path for path in tree.of(".txt") if not tree.find(path.stem, path.parent)[1]]
    own = [p for p in texts if p.parent.name in ("Main", "ImageSets") or OF_FOLDER.fullmatch(p.stem.lower())]
    stems = {path.stem for path in own}
    return [path for path in own if path.stem.rpartition("_")[2] not in stems - {path.stem}]  # per-class lists


def read_list(tree: Tree, path: Path) -> list[Path]:
    """The images that the lines of a list name; none where no line does, SppnetError where some do not."""
    lines = [line.strip() for line in read_lines(tree.root / path) if line.strip()]
    found, missing = dict[Path, None](), list[str]()
    for line in lines:
        images = tree.find(line, path.parent)[1]
        if not images and (columns := FLAG.fullmatch(line)):
            images = tree.find(columns[1], path.parent)[1]
        if len(images) > 1:
            both = f"{line!r} fits {images[0]} and {images[1]} alike"
            raise SppnetError(f"{tree.root / path}: {both}; write the folder too")
        found |= dict.fromkeys(images)
        missing += [] if images else [line]
    if missing and found:
        which = f"{len(missing)} of {counted(len(lines), 'image')} missing, e.g. {missing[0]!r}"
        endings = ", ".join(IMAGE_SUFFIXES)
        raise SppnetError(f"{tree.root / path}: {which} ({endings}); add them, or take them out of the list")
    return list(found)
