"""A tiny data set in the layout of ILSVRC's detection data: three synsets, pictures with one coloured square each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from devkit import stated, xml_of
from PIL import Image

SYNSETS = {"n02672831": "accordion", "n02691156": "airplane", "n02958343": "car"}
COLOURS = {"n02672831": (250, 30, 30), "n02691156": (30, 250, 30), "n02958343": (30, 30, 250)}
SIZE = (96, 128)
EXTRA = "ILSVRC2013_train_extra0/ILSVRC2013_train_00000001"


def train_name(synset: str, number: int) -> str:
    return f"ILSVRC2013_train/{synset}/{synset}_{number}"


def val_name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08}"


def thing(synset: str, *corners: float) -> str:
    """An object as ILSVRC writes it: 0-based inclusive corners, no flag of difficulty."""
    tags = zip(("xmin", "xmax", "ymin", "ymax"), (corners[0], corners[2], corners[1], corners[3]), strict=True)
    box = "".join(f"<{tag}>{value}</{tag}>" for tag, value in tags)
    return f"<object><name>{synset}</name><bndbox>{box}</bndbox></object>"


def add_image(root: Path, kind: str, name: str, *objects: tuple, annotated: bool = True) -> str:
    """An image of Data/DET/<kind>; objects are (synset, xmin, ymin, xmax, ymax), the corners those of the file."""
    pixels = np.random.default_rng(list(name.encode())).integers(90, 160, (*SIZE, 3), dtype=np.uint8)
    for synset, x1, y1, x2, y2 in objects:
        pixels[y1 : y2 + 1, x1 : x2 + 1] = COLOURS[synset]
    path, xml = root / f"Data/DET/{kind}/{name}.JPEG", root / f"Annotations/DET/{kind}/{name}.xml"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, "JPEG")
    if annotated:
        xml.parent.mkdir(parents=True, exist_ok=True)
        xml.write_text(xml_of(*(thing(*one) for one in objects), size=stated(*SIZE)))
    return name


def write_list(root: Path, name: str, *lines: str) -> Path:
    path = root / f"ImageSets/DET/{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def write_names(root: Path, lines: Sequence[str], place: str = "devkit/data") -> None:
    (root / place).mkdir(parents=True, exist_ok=True)
    (root / place / "map_det.txt").write_text("".join(f"{line}\n" for line in lines))


def square(synset: str, number: int) -> tuple:
    """An object somewhere: (synset, xmin, ymin, xmax, ymax)."""
    x, y, side = 7 + 11 * number % 60, 5 + 13 * number % 40, 34 + 3 * (number % 5)
    return synset, x, y, x + side, y + side


def make_det(root: Path, val: int = 9, train: int = 2) -> Path:
    """`train` images of each synset and one without objects in train; `val` images, the last without; two to test on.

    The list of each synset names its own images (1), those of the next (-1), one of the third (0) and the empty one.
    """
    synsets = list(SYNSETS)
    for synset in synsets:
        for number in range(train):
            add_image(root, "train", train_name(synset, number), square(synset, number + 3))
    add_image(root, "train", EXTRA, annotated=False)
    for place, synset in enumerate(synsets):
        others = synsets[place - 2], synsets[place - 1]
        lines = [f"{train_name(synset, number)} 1" for number in range(train)]
        lines += [f"{train_name(others[0], number)} -1" for number in range(train)]
        write_list(root, f"train_{place + 1}", *lines, f"{train_name(others[1], 0)} 0", f"{EXTRA} -1")
    for number in range(1, val + 1):
        objects = [square(synsets[number % 3], number)] if number < val else []
        add_image(root, "val", val_name(number), *objects)
    write_list(root, "val", *(f"{val_name(number)} {number}" for number in range(1, val + 1)))
    tests = [add_image(root, "test", f"ILSVRC2012_test_{i:08}", square(synsets[i], i), annotated=False) for i in (1, 2)]
    write_list(root, "test", *(f"{name} {i}" for i, name in enumerate(tests, start=1)))
    write_names(root, [f"{synset} {i} {name}" for i, (synset, name) in enumerate(SYNSETS.items(), start=1)])
    return root
