"""YOLO's text files: a line "class x y width height" for each object, centre and size as shares of the upright image.

Names and folders stand in a data.yaml, or the names in classes.txt, one a line.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sppnet.checks import as_boxes
from sppnet.config_files import read_yaml_texts
from sppnet.data.labels import Counts, class_name, place_objects, read_lines
from sppnet.data.parts import Annotate, DataFolder, Tree, group, label_files, pair, read_list
from sppnet.errors import SppnetError
from sppnet.records import Annotation

NAMES = ("classes.txt", "obj.names", "_darknet.labels", "classes.names")  # of files that list the classes, one a line
TITLES = ("data", "dataset")  # of the YAML file
KEYS = ("train", "val", "valid", "test")
BACKGROUND = "image without label file, taken as background"
TURNED = "image with EXIF orientation, boxes taken as drawn upright"


def look(tree: Tree) -> DataFolder | None:
    """The folder as YOLO data; None where there is no data.yaml and no labels with names."""
    lists = [path for name in NAMES for path in tree.others if path.name == name]
    yaml, values, notes = _find_yaml(tree, bool(lists))
    if not yaml and not lists:
        return None
    where = tree.root / [*yaml, *lists][0]
    in_yaml = "names" in values or not lists
    named = where if in_yaml else tree.root / lists[0]
    names = _names_of(values.get("names"), named) if in_yaml else _listed_names(tree, lists)
    base = Path(os.path.normpath(where.parent / str(values.get("path", ""))))
    if base.is_dir() and not base.is_relative_to(os.path.normpath(tree.root)):
        tree = Tree(base)  # the pictures lie elsewhere
    pairs, lost = pair(tree, {path: path.stem for path in tree.of(".txt") if path.name not in NAMES})
    if not yaml and not pairs:
        return None
    folders = {path.parent for path in pairs}  # where an image without labels is background
    known = [path for path in tree.images if path.parent in folders]
    parts, more = _parts_of(tree, values, where) if yaml else (group(tree, known), [])
    bare = {path for images in parts.values() if not pairs.keys() & {*images} for path in images}
    labels = {tree.id_of(path): None if path in bare else tree.root / pairs[path] for path in [*pairs, *bare]}
    read = _reader(labels, names, named, "kpt_shape" in values)
    own = {"classes": tuple(names.values()), "notes": (*notes, *more)}
    return label_files(tree, parts, (pairs, lost), read, bare, format="yolo", **own)


def _find_yaml(tree: Tree, listed: bool) -> tuple[list[Path], dict[str, Any], list[str]]:
    """The YAML files that name classes and parts, those near the top first, the values of the first, and notes.

    `listed`: whether files list the classes too, so that a YAML file that cannot be read may be another program's.
    """
    paths = sorted(tree.of(".yaml", ".yml"), key=lambda p: (len(p.parts), p.stem not in TITLES, p))
    needed = not listed or any(path.stem in TITLES for path in paths)
    found, notes = tree.read(paths, _read_yaml, lambda path: False, needed)
    first, *others = [*found] or [Path()]
    notes += [f"{first} taken, not {', '.join(map(str, others))}"] if others else []
    return [*found], found.get(first, {}), notes


def _read_yaml(path: Path) -> dict[str, Any] | None:
    values = read_yaml_texts(path)
    named = isinstance(values, dict) and {"names", "nc"} & {*values} and {*KEYS} & {*values}
    return values if named else None


def _listed_names(tree: Tree, lists: Sequence[Path]) -> dict[int, str]:
    """Number -> class, of the files that list them, which must agree."""
    lines = {path: enumerate(map(class_name, read_lines(tree.root / path))) for path in lists}
    names = {path: {i: name for i, name in own if name} for path, own in lines.items()}
    for path in lists:
        if names[path] != names[lists[0]]:
            both = f"{tree.root / lists[0]} and {path} list different classes"
            raise SppnetError(f"{both}, so a number may mean either; keep one of them, or make two data sets of these")
    return _names_of(names[lists[0]], tree.root / lists[0])


def _names_of(names: Any, where: Path) -> dict[int, str]:
    """Number -> class, of a list or a mapping in YAML."""
    given = dict(enumerate(names)) if isinstance(names, list) else names
    try:
        found = {int(number): class_name(name) for number, name in given.items()}
    except (AttributeError, TypeError, ValueError):
        found = {}
    if not found or "" in found.values() or len({*found.values()}) < len(found):
        expected = "expected names, a list with a name of its own for each class number"
        raise SppnetError(f"{where}: {expected}, got {names!r:.200}; add them in the order of the numbers")
    return found


def _parts_of(tree: Tree, values: Mapping[str, Any], where: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """Part -> its images, as the YAML file names folders and lists; and notes about those that are not there."""
    parts, notes = dict[str, list[Path]](), list[str]()
    beside = Path(os.path.relpath(where.parent, tree.root))
    base = Path(os.path.normpath(beside / str(values.get("path", ""))))
    for key in KEYS:
        named = values.get(key)
        folders = [one for one in (named if isinstance(named, list) else [named]) if one not in (None, "", "null", "~")]
        if not all(isinstance(one, str) for one in folders):
            raise SppnetError(f"{where}: {key}: expected a folder, a list file or several, got {named!r:.200}")
        found = {one: _images_of(tree, one, [base, beside]) for one in folders}
        notes += [f"{where.name}: {key}: {one} has no image" for one, images in found.items() if not images]
        images = list(dict.fromkeys(path for own in found.values() for path in own))
        parts |= {key: images} if images else {}
    if not parts:
        raise SppnetError(f"{where}: none that it names has images ({'; '.join(notes) or 'no train, val, test'})")
    return parts, notes


def _images_of(tree: Tree, named: str, bases: Sequence[Path]) -> list[Path]:
    """The images of a folder or list that a YAML file names.

    It is looked for from each base, then by its last folders: exports keep paths of the machine they were made on.
    """
    parts = [part for part in named.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    ends = [Path(*parts[i:]) for i in range(len(parts)) if i == 0 or len(parts[i:]) > 1]
    root = os.path.normpath(tree.root)
    exact = [Path(os.path.relpath(os.path.normpath(tree.root / base / named), root)) for base in bases]
    for place in [*exact, *(Path(os.path.normpath(base / end)) for end in ends for base in bases)]:
        if place in tree.others:
            return read_list(tree, place)
        images = [path for path in tree.images if path.parts[: len(place.parts)] == place.parts]
        if images:
            return images
    return []


def _reader(labels: Mapping[str, Path | None], names: Mapping[int, str], where: Path, keypoints: bool) -> Annotate:
    """Reads labels (None: none in the whole part); `names` are those of the file `where`."""

    def annotate(image: str, size: tuple[int, int], orientation: int) -> tuple[Annotation, Counts]:
        if image not in labels:
            return Annotation(np.zeros((0, 4), np.float32), ()), {BACKGROUND: 1}
        path = labels[image]
        if path is None:
            why = "nor has any image of its part; add labels/<image>.txt, empty for background"
            raise SppnetError(f"{image} has no label file, {why}")
        classes, boxes, counts = list[str](), list[tuple[float, ...]](), Counter[str]()
        for number, line in enumerate(read_lines(path), start=1):
            if line.strip():
                place = f"{path}:{number}"
                label, box, reason = _read_line(line, place, keypoints)
                if label not in names:
                    listing = ", ".join(f"{key} {name}" for key, name in names.items())
                    reason = f"class {label} has no name in {where}, which has {listing}"
                    raise SppnetError(f"{place}: {reason}; add it there")
                classes.append(names[label])
                boxes.append(box)
                counts.update([reason] * bool(reason))
        drawn = as_boxes(boxes) * np.tile(size[::-1], 2)
        found, more = place_objects(drawn, classes, [False] * len(classes), size)
        return found, {**counts, **more, **({TURNED: 1} if orientation > 1 and classes else {})}

    return annotate


def _read_line(line: str, place: str, keypoints: bool) -> tuple[int, tuple[float, ...], str]:
    """Class number and (x1, y1, x2, y2) as shares of the image, and what is to be counted.

    `keypoints`: what follows a box is no polygon.
    """
    try:
        label, *values = map(float, line.split())
    except ValueError:
        label, values = -1.0, []
    polygon = len(values) >= 6 and len(values) % 2 == 0 and not keypoints
    if label < 0 or label % 1 or not (len(values) == 4 or polygon or (keypoints and len(values) > 4)):
        expected = "expected 'class x y width height', or a class and the points of a polygon"
        raise SppnetError(f"{place}: {expected}, got {line!r:.200}; correct it")
    x, y, width, height = values[:4]
    box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    if polygon:
        box = (min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2]))
    if not all(-1 <= value <= 2 for value in (*box, *values[:4])):  # further outside no slip, but pixels
        expected = "expected shares of the image's width and height, from 0 to 1"
        raise SppnetError(f"{place}: {expected}, got {line!r:.200}; divide pixels by the size of the image")
    return int(label), box, "polygon turned into its box" if polygon else "key points left out" if values[4:] else ""
