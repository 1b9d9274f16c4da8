"""YOLO's text files: a line "class x y width height" for each object, centre and size as shares of the upright image.

A line of more numbers is a polygon, of which the box is taken. Names of classes and folders of images stand in a
data.yaml; without one the names stand in classes.txt, one a line.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sppnet.checks import as_boxes
from sppnet.config_files import read_yaml_texts
from sppnet.data.labels import Counts, class_name, place_objects, read_lines
from sppnet.data.parts import DataFolder, Part, Tree, group, pair, read_list
from sppnet.errors import SppnetError
from sppnet.records import Annotation, SkipCounts

NAMES = ("classes.txt", "obj.names", "_darknet.labels", "classes.names")  # of files that list the classes, one a line
KEYS = ("train", "val", "valid", "test")
FAR = 1.0  # shares of the image: what lies further outside is no share but pixels
BACKGROUND = "image without label file, taken as background"
TURNED = "image with EXIF orientation, boxes taken as drawn upright"


def look(tree: Tree) -> DataFolder | None:
    """The folder as YOLO data; None where there is no data.yaml and no labels with names."""
    paths, values, notes = _find_yaml(tree)
    lists = [path for name in NAMES for path in tree.others if path.name == name]
    if not [*paths, *lists]:
        return None
    where = tree.root / [*paths, *lists][0]
    if "names" in values or not lists:
        names = _names_of(values.get("names"), where)
    else:
        where = tree.root / lists[0]
        names = {i: class_name(line) for i, line in enumerate(read_lines(where)) if line.strip()}
    base = Path(os.path.normpath(where.parent / values.get("path", "")))
    if base.is_dir() and not base.is_relative_to(os.path.normpath(tree.root)):
        tree = Tree(base)  # the pictures lie elsewhere
    pairs, lost = pair(tree, [path for path in tree.of(".txt") if path.name not in NAMES])
    if not paths and not pairs:
        return None
    parts, more = _parts_of(tree, values, where) if paths else (group(tree, tree.images), [])
    labels = {tree.id_of(path): tree.root / label for path, label in pairs.items()}
    read = partial(read_labels, names=names, where=where, keypoints="kpt_shape" in values)
    contents = dict[str, Part]()
    for name, images in parts.items():
        found = tree.by_id(images)
        bare = [] if labels.keys() & found.keys() else list(found)
        contents[name] = Part(
            found, partial(_annotate, read, labels, f"{tree.root}: part {name}" if bare else ""), bare
        )
    listed = {path for images in parts.values() for path in images}
    left_out = {
        "image of no part, left out": [tree.id_of(path) for path in tree.images if path not in listed],
        "label file without an image, left out": [str(path) for path in lost],
    }
    classes, labelled = tuple(names.values()), len(listed & set(pairs))
    skips = SkipCounts(left_out)
    return DataFolder(tree.root, "yolo", tuple(contents), contents, skips, classes, labelled, (*notes, *more))


def hint(tree: Tree) -> str:
    """What is missing of a folder that has labels and no names; empty where it has no such labels."""
    for path in tree.of(".txt"):
        line = next(iter(read_lines(tree.root / path)), "").split()
        if len(line) >= 5 and line[0].isdecimal() and tree.find(path.stem, path.parent)[1]:
            return f"{path} looks like YOLO's labels: write the names of its classes to classes.txt, one a line"
    return ""


def _find_yaml(tree: Tree) -> tuple[list[Path], dict[str, Any], list[str]]:
    """The YAML files that name classes and parts, those near the top first, the values of the first, and notes."""
    paths = sorted(tree.of(".yaml", ".yml"), key=lambda p: (len(p.parts), p.stem not in ("data", "dataset"), p))
    found, faults = dict[Path, dict[str, Any]](), list[SppnetError]()
    for path in paths:
        try:
            values = read_yaml_texts(tree.root / path)
        except SppnetError as error:
            faults += [error] if path.stem in ("data", "dataset") else []
            continue
        if isinstance(values, dict) and {"names", "nc"} & set(values) and set(KEYS) & set(values):
            found[path] = values
    if faults and not found:
        raise faults[0]
    first, *others = [*found] or [Path()]
    if not isinstance(found.get(first, {}).get("path", ""), str):
        raise SppnetError(
            f"{tree.root / first}: path: expected one folder, got {found[first]['path']!r:.200}; write it"
        )
    return [*found], found.get(first, {}), [f"{first} taken, not {', '.join(map(str, others))}"] if others else []


def _names_of(names: Any, where: Path) -> dict[int, str]:
    """Number -> class, of a list or a mapping in YAML."""
    if names is None:
        raise SppnetError(f"{where}: class numbers without names; add names: [first, second, …] in their order")
    given = dict(enumerate(names)) if isinstance(names, list) else names
    try:
        found = {int(number): class_name(name) for number, name in given.items()}
        faulty = not found or not all(found.values())
    except (AttributeError, TypeError, ValueError):
        faulty = True
    if faulty:
        raise SppnetError(f"{where}: names: expected a name for each class number, got {names!r:.200}; write a list")
    twice = next((name for name in found.values() if [*found.values()].count(name) > 1), None)
    if twice is not None:
        raise SppnetError(f"{where}: names: two classes are called {twice!r}; give each a name of its own")
    return found


def _parts_of(tree: Tree, values: Mapping[str, Any], where: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """Part -> its images, as the YAML file names folders and lists; and notes about those that are not there."""
    parts, notes = dict[str, list[Path]](), list[str]()
    beside = Path(os.path.relpath(where.parent, tree.root))
    base = Path(os.path.normpath(beside / values.get("path", "")))
    for key in KEYS:
        named = values.get(key)
        folders = [one for one in (named if isinstance(named, list) else [named]) if one not in (None, "", "null", "~")]
        if not all(isinstance(one, str) for one in folders):
            raise SppnetError(f"{where}: {key}: expected a folder, a list file or several, got {named!r:.200}")
        found = {one: _images_of(tree, one, [base, beside], key) for one in folders}
        lost = [one for one, images in found.items() if not images]
        if lost and key == "train":
            raise SppnetError(f"{where}: {key}: no image in {lost[0]}, as seen from here; name an existing folder")
        notes += [f"{where.name}: {key}: {one} has no image" for one in lost]
        images = list(dict.fromkeys(path for own in found.values() for path in own))
        parts |= {key: images} if images else {}
    if not parts:
        raise SppnetError(f"{where}: no folder of train, val and test has images; name folders that have")
    return parts, notes


def _images_of(tree: Tree, named: str, bases: Sequence[Path], key: str) -> list[Path]:
    """The images of a folder or list that a YAML file names.

    It is looked for from its own folder, from that of the file, then by its last folders: exports keep paths of the
    machine that they were made on. Last by the key itself.
    """
    parts = [part for part in named.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    ends = [Path(*parts[i:]) for i in range(len(parts)) if i == 0 or len(parts[i:]) > 1]
    own = ("val", "valid", "validation") if key in ("val", "valid") else (key,)
    keys = [Path(name) for key in own for name in (key, f"images/{key}")]
    root = os.path.normpath(tree.root)
    exact = [Path(os.path.relpath(os.path.normpath(tree.root / base / named), root)) for base in bases]
    for place in [*exact, *(Path(os.path.normpath(base / end)) for end in [*ends, *keys] for base in bases)]:
        if place in tree.others:
            return read_list(tree, place)
        images = [path for path in tree.images if path.is_relative_to(place)]
        if images:
            return images
    return []


def _annotate(
    read: Callable[[Path], tuple[list[str], list[tuple[float, ...]], Counts]],
    labels: Mapping[str, Path],
    bare: str,
    image: str,
    size: tuple[int, int],
    orientation: int,
) -> tuple[Annotation, Counts]:
    if bare:
        raise SppnetError(f"{bare}: none of its images has a label file; add labels/<image>.txt, empty for background")
    if image not in labels:
        return Annotation(np.zeros((0, 4), np.float32), ()), {BACKGROUND: 1}
    classes, shares, counts = read(labels[image])
    height, width = size
    drawn = as_boxes(shares) * [width, height, width, height]
    found, more = place_objects(drawn, classes, [False] * len(classes), size)
    return found, {**counts, **more, **({TURNED: 1} if orientation > 1 and len(classes) else {})}


def read_labels(
    path: Path, names: Mapping[int, str], where: Path, keypoints: bool = False
) -> tuple[list[str], list[tuple[float, ...]], Counts]:
    """Classes and (x1, y1, x2, y2) of a label file, as shares of the image, and what is counted.

    `names`: class number -> name, from the file `where`. `keypoints`: what follows a box is no polygon. SppnetError for
    lines of another form, numbers without names and coordinates that are no shares.
    """
    classes, boxes, counts = list[str](), list[tuple[float, ...]](), Counts()
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            label, *values = (float(text) for text in line.split())
        except ValueError:
            label, values = -1.0, []
        polygon = len(values) >= 6 and len(values) % 2 == 0 and not keypoints
        if label < 0 or label % 1 or not (len(values) == 4 or polygon or (keypoints and len(values) > 4)):
            expected = "expected 'class x y width height', or a class and the points of a polygon"
            raise SppnetError(f"{path}:{number}: {expected}, got {line!r:.200}; correct it")
        if int(label) not in names:
            listing = ", ".join(f"{i} {name}" for i, name in names.items())
            raise SppnetError(f"{path}:{number}: class {int(label)} has no name in {where} ({listing}); add it there")
        if polygon:
            box = (min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2]))
            reason = "polygon turned into its box"
        else:
            x, y, width, height = values[:4]
            box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            reason = "key points left out" if len(values) > 4 else ""
        if not all(-FAR <= value <= 1 + FAR for value in (*box, *values[:4])):
            expected = "expected coordinates from 0 to 1, shares of the width and the height"
            raise SppnetError(f"{path}:{number}: {expected}, got {line!r:.200}; divide pixels by the image's size")
        counts |= {reason: counts.get(reason, 0) + 1} if reason else {}
        classes.append(names[int(label)])
        boxes.append(box)
    return classes, boxes, counts
