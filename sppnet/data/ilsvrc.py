"""Splits of the detection data of ILSVRC (2013 to 2017), read from disk (sec. 4.5).

    <root>/ImageSets/DET/train_1.txt … train_200.txt, val.txt, test.txt    a name and a number a line
    <root>/Data/DET/<train, val, test>/<name>.JPEG
    <root>/Annotations/DET/<train, val>/<name>.xml                         0-based inclusive corners, synsets
    <root>/devkit/data/map_det.txt, or <root>/map_det.txt                  synset, number, English name

A split is named ``DET/<set>``; the name of a set begins with that of the folder its images lie in. ``DET/train`` is the
lists of all classes together, unless there is a train.txt.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from sppnet.data.labels import normalise, read_lines
from sppnet.data.parts import Part
from sppnet.data.voc import read_annotation
from sppnet.errors import SppnetError, counted
from sppnet.records import Annotation

LISTS = "ImageSets/DET"
KINDS = "train|val|test"
NAMES = ("devkit/data/map_det.txt", "map_det.txt")
OF_CLASS = re.compile(r"train_\d+")  # its second column says whether an image shows the class: 1, 0 (in part) or -1
INWARD = np.array([0, 0, -1, -1], dtype=np.float64)  # 0-based inclusive corners minus half-open ones
BARE = "image listed as positive that has no annotation, taken as one without objects"


def find_lists(root: Path) -> dict[str, list[Path]]:
    """Split -> its list, for names that begin with train, val or test; those of all classes are ``DET/train`` too."""
    names = [path for path in sorted((root / LISTS).glob("*.txt")) if re.match(KINDS, path.stem)]
    of_classes = [path for path in names if OF_CLASS.fullmatch(path.stem)]
    of_classes.sort(key=lambda path: int(path.stem[6:]))
    lists = {"DET/train": of_classes} if of_classes else {}
    return lists | {f"DET/{path.stem}": [path] for path in names}


def find_part(root: Path, split: str, lists: Sequence[Path]) -> Part:
    """The images of the lists of a split, by ids ``DET/<train, val or test>/<name>``; each counts once.

    Images of train that have no annotation show no object.
    """
    listed = dict[str, tuple[str, bool]]()  # where first, and whether an image is a positive of any class
    for path in lists:
        for name, (line, shown) in read_list(path).items():
            first, before = listed.get(name, (f"{path}:{line}", False))
            listed[name] = first, before or shown
    if not listed:
        raise SppnetError(f"{lists[0]}: lists no image; write one name per line")
    kind = re.findall(KINDS, lists[0].stem)[0]
    images = {f"DET/{kind}/{name}": root / "Data/DET" / kind / f"{name}.JPEG" for name in listed}
    annotations = {f"DET/{kind}/{name}": root / "Annotations/DET" / kind / f"{name}.xml" for name in listed}
    each = zip(images.values(), listed.values(), strict=True)
    missing = [one for one in each if not os.path.isfile(one[0])]  # noqa: PTH113 - pathlib raises for too long a name
    if missing:
        first = f"{missing[0][0]}: no such image, named in {missing[0][1][0]}"
        which = f"{len(missing)} of {counted(len(images), 'image')} of {split} missing"
        raise SppnetError(f"{first}; {which}; add them, or take their lines out of the lists")
    bare = {
        image: {BARE: 1} if shown else {}
        for image, (_, shown) in zip(images, listed.values(), strict=True)
        if kind == "train" and not annotations[image].exists()
    }
    unlabelled = {image for image, path in annotations.items() if kind != "train" and not path.exists()}
    names = read_names(root)

    def annotate(image: str, size: tuple[int, int], orientation: int) -> tuple[Annotation, Mapping[str, int]]:
        if image in bare:
            return Annotation(np.zeros((0, 4), np.float32), ()), bare[image]
        found, counts = read_annotation(annotations[image], size, orientation, INWARD)
        return replace(found, names=tuple(names.get(name, name) for name in found.names)), counts

    return Part(images, annotate, unlabelled)


def read_list(path: Path) -> dict[str, tuple[int, bool]]:
    """Name -> its line, counted from 1, and whether it is the list of a class that calls the image a positive.

    Names may lie in folders. Raises SppnetError for a name listed twice and for lines of another form.
    """
    found: dict[str, tuple[int, bool]] = {}
    of_class = OF_CLASS.fullmatch(path.stem) is not None
    column, meaning = ("-1|0|1", "1, 0 or -1") if of_class else (r"\d+", "a number")
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        name, _, label = " ".join(normalise(line).split()).partition(" ")
        name = name.removesuffix(".JPEG")
        if not re.fullmatch(rf"({column})?", label) or "\\" in name or {"", ".", ".."} & set(name.split("/")):
            expected = f"expected a name, such as ILSVRC2012_val_00000001, and {meaning}"
            raise SppnetError(f"{path}:{number}: {expected}, got {line!r}; correct the line")
        if name in found:
            raise SppnetError(f"{path}:{number}: {name!r} is already on line {found[name][0]}; remove one of them")
        found[name] = number, of_class and label == "1"
    return found


def read_names(root: Path) -> dict[str, str]:
    """Synset -> English name, as map_det.txt has them; synsets that share a name are left out: they stay apart."""
    path = next((root / name for name in NAMES if (root / name).is_file()), None)
    names: dict[str, str] = {}
    for number, line in enumerate(read_lines(path) if path is not None else [], start=1):
        synset, *rest = normalise(line).split(maxsplit=2) or [""]
        if synset and (len(rest) != 2 or not rest[0].isdecimal() or synset in names):
            expected = "expected 'synset number name', each synset once"
            raise SppnetError(f"{path}:{number}: {expected}, got {line!r}; correct the line, or remove the file")
        if synset:
            names[synset] = " ".join(rest[1].split())
    counts = Counter(names.values())
    return {synset: name for synset, name in names.items() if counts[name] == 1}
