"""The parts of a data set, the files below its folder, and how labels and lists find their images.

Of several images of a name it is the one at the place that is meant, else the one whose folders are most alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sppnet.data.folder import FoundImages, search
from sppnet.data.labels import normalise, read_lines
from sppnet.errors import SppnetError, counted
from sppnet.records import Annotation, SkipCounts

T = TypeVar("T")
ROLES = ("train", "val", "test")
_NAMES = r"train(?:ing|val)?|val(?:id(?:ation)?)?|test(?:ing)?"
IN_NAME = re.compile(rf"(?<![a-z])({_NAMES})(?![a-z])")
OF_FOLDER = re.compile(rf"({_NAMES})(\d+|[_-]?(images|set|data))?")
# (id, (height, width), EXIF orientation) -> the objects in the upright image, and how often what was skipped
Annotate = Callable[[str, tuple[int, int], int], tuple[Annotation, Mapping[str, int]]]
Pairs = tuple[dict[Path, Path], list[Path]]  # image -> its label file; label files without an image


class Part(NamedTuple):
    """The images of one part by id, and what reads the objects of one."""

    images: Mapping[str, Path]
    annotate: Annotate
    unlabelled: Set[str] = frozenset()  # have no annotation: `annotate` says why


@dataclass(frozen=True)
class DataFolder:
    """What a folder of pictures and labels is; made by `sppnet.data.layouts.find_data`."""

    root: Path
    format: str  # voc, coco or yolo
    parts: tuple[str, ...]
    contents: Mapping[str, Part] = field(default_factory=dict, repr=False)
    left_out: SkipCounts = field(default_factory=SkipCounts)
    classes: tuple[str, ...] = ()  # those that the format lists, in its order
    labelled: int = 0  # images with labels
    notes: tuple[str, ...] = ()
    lists: Mapping[str, list[Path]] = field(default_factory=dict, repr=False)  # of year folders, in place of contents

    def roles(self, train: Sequence[str] = ()) -> dict[str, tuple[str, ...]]:
        """The parts to train (or `train`), validate and test on, by their names; where none says train, all of no role.

        A trainval beside its train has no role, nor has a part all of whose images another has that goes before it.
        """
        parts = [p for p in self.parts if "trainval" not in p or p.replace("trainval", "train") not in self.parts]
        roles = {role: tuple(part for part in parts if role_of(part) == role) for role in ROLES}
        roles["train"] = tuple(train) or roles["train"] or tuple(part for part in parts if role_of(part) is None)
        images, seen = {part: {*own.images} for part, own in self.contents.items()}, set[str]()
        for role, own in roles.items():
            within = set[str]()
            for part in sorted(own, key=lambda part: -len(images.get(part, ()))):
                within |= {part} if images.get(part) and images[part] <= seen else set()
                seen |= images.get(part, set())
            roles[role] = tuple(part for part in own if part not in within)
        return roles


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
        self.named: dict[str, list[Path]] = {}  # by name and by stem, alone and with the folder
        for path in self.images:
            folder = normalise(path.parent.as_posix())
            for name in {normalise(path.name), normalise(path.stem)}:
                for key in (name, f"{folder}/{name}"):
                    self.named.setdefault(key, []).append(path)

    def of(self, *endings: str) -> list[Path]:
        return [path for path in self.others if path.suffix.lower() in endings]

    def find(self, text: str, source: Path, part: str = "", known: Collection[Path] = ()) -> Path | None:
        """The image that `text` names in the file `source`; None where there is none.

        The one below ``images`` for a source below ``labels`` goes first, then the one beside it. Elsewhere those that
        are `known` go before others, a name with its ending before a stem, likeness of the folders and a folder called
        `part` before a folder JPEGImages, beside which are masks. SppnetError for a tie.
        """
        steps = normalise(text).replace("\\", "/").split("/")
        *folders, name = [step for step in steps if step not in ("", ".", "..")] or [""]
        place = (*map(normalise, source.parent.parts), *folders)
        mirrored = tuple("images" if step == "labels" else step for step in place)
        keys = (*(f"{'/'.join(way) or '.'}/{name}" for way in (mirrored, place)), name)
        found = next((self.named[key] for key in keys if key in self.named), [])
        found = [path for path in found if path in known] or found
        found = [path for path in found if normalise(path.name) == name] or found
        ranks = [
            (_alike(path.parent.parts, place) + (part in path.parts), "JPEGImages" in path.parts) for path in found
        ]
        most = max(ranks, default=None)
        best = [path for path, rank in zip(found, ranks, strict=True) if rank == most]
        if len(best) > 1:
            both = f"{self.root / source}: {text!r} fits {best[0]} and {best[1]} alike"
            raise SppnetError(f"{both}; name the folder too, or use folders that mirror each other")
        return best[0] if best else None

    def read(
        self, paths: Iterable[Path], read: Callable[[Path], T | None], grave: Callable[[Path], bool], needed: bool
    ) -> tuple[dict[Path, T], list[str]]:
        """What `read` finds in files, but for those of another kind (None), and a note about each that it refuses.

        The error of one that is `grave` is raised, and the first where none is read but one is `needed`.
        """
        found, faults = dict[Path, T](), list[SppnetError]()
        for path in paths:
            try:
                if (own := read(self.root / path)) is not None:
                    found[path] = own
            except SppnetError as error:
                if grave(path):
                    raise
                faults.append(error)
        if faults and needed and not found:
            raise faults[0]
        return found, [f"left out: {error}" for error in faults]

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
    own, other = (tuple(map(normalise, each)) for each in (folders, place))
    ways = ((own, other), (own[::-1], other[::-1]))
    return sum(len([*takewhile(lambda both: both[0] == both[1], zip(*way, strict=False))]) for way in ways)


def pair(tree: Tree, labels: Mapping[Path, str]) -> Pairs:
    """Image -> its label file, by the name of the image in each; and the files among them that have no image."""
    claims, lost, pairs = dict[Path, list[tuple[int, Path]]](), list[Path](), dict[Path, Path]()
    for label, name in labels.items():
        image = tree.find(name, label)
        if image is None:
            lost.append(label)
        else:
            claims.setdefault(image, []).append((_alike(image.parent.parts, label.parent.parts), label))
    for image, own in sorted(claims.items()):
        *others, (alike, label) = sorted(own)
        if others and others[-1][0] == alike:
            raise SppnetError(f"{tree.root / label} and {others[-1][1]} are both labels of {image}; keep one of them")
        lost += [other for _, other in others]
        pairs[image] = label
    folders = {label.parent for label in pairs.values()}
    return pairs, [label for label in lost if label.parent in folders]


def label_files(
    tree: Tree, parts: Mapping[str, list[Path]], pairing: Pairs, read: Annotate, bare: Collection[Path], **more: Any
) -> DataFolder:
    """The folder of a format that has a label file for each image; `bare` are images of `parts` that have none."""
    pairs, lost = pairing
    listed = {path for images in parts.values() for path in images}
    contents = {
        name: Part(tree.by_id(images), read, {tree.id_of(path) for path in images if path in bare})
        for name, images in parts.items()
    }
    rest = [path for path in tree.images if path not in listed]
    left_out = {
        "image without label file, left out": [tree.id_of(path) for path in rest if path not in pairs],
        "image of no part, left out": [tree.id_of(path) for path in rest if path in pairs],
        "label file without an image, left out": [str(path) for path in lost],
    }
    own = {"left_out": SkipCounts(left_out), "labelled": len(listed & set(pairs)), **more}
    return DataFolder(root=tree.root, parts=tuple(contents), contents=contents, **own)


def group(tree: Tree, images: Iterable[Path]) -> dict[str, list[Path]]:
    """Part -> its images: by lists (ImageSets, or a train.txt), else by folders called train, valid and so on.

    Where neither says, all `images` are the part "all"; those that no such folder holds are "other".
    """
    known = set(images)
    if lists := {path.with_suffix(""): listed for path in _lists(tree) if (listed := read_list(tree, path, known))}:
        short = len({path.name for path in lists}) == len(lists)
        return {path.name if short else path.as_posix(): listed for path, listed in lists.items()}
    parts: dict[str, list[Path]] = {}
    for path in images:
        folder = next((name for name in path.parent.parts if OF_FOLDER.fullmatch(name.lower())), "other")
        parts.setdefault(folder, []).append(path)
    if {*map(role_of, parts)} <= {None, "train"} and "other" in parts:  # else train may be a class, beside others
        parts = {"all": [path for own in parts.values() for path in own]}
    return parts


def _lists(tree: Tree) -> list[Path]:
    lists = [path for path in tree.of(".txt") if normalise(path.stem) not in tree.named]  # else a label
    main = [path for path in lists if path.parent.name == "Main"]  # beside it are lists of other tasks
    return main or [p for p in lists if p.parent.name == "ImageSets" or OF_FOLDER.fullmatch(p.stem.lower())]


def read_list(tree: Tree, path: Path, known: Collection[Path] = ()) -> list[Path]:
    """The images that the lines of a list name, `known` ones before others of a name.

    None where no line does, as in lists of one class with a column; SppnetError where some do not.
    """
    lines = [line.strip() for line in read_lines(tree.root / path) if line.strip()]
    images = {line: tree.find(line, path, known=known) for line in lines}
    found = dict.fromkeys(image for image in images.values() if image is not None)
    missing = [line for line, image in images.items() if image is None]
    if missing and found:
        which = f"{len(missing)} of {counted(len(lines), 'image')} missing, e.g. {missing[0]!r}"
        raise SppnetError(f"{tree.root / path}: {which}; add them, or take them out of the list")
    return list(found)
