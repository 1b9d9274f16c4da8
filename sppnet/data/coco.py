"""COCO's JSON: images, categories, annotations with boxes (x, y, width, height), 0-based."""

from __future__ import annotations

import json
import math
from collections import Counter
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from sppnet.checks import as_boxes
from sppnet.data.labels import Counts, class_name, place_objects
from sppnet.data.parts import DataFolder, Part, Tree
from sppnet.errors import SppnetError, counted
from sppnet.records import Annotation, SkipCounts

PREFERRED = ("instances", "_annotations.coco")  # beside them captions, key points and the like name the same images
POLYGON = "polygon turned into its box"
ROTATED = "rotated box turned into an upright one"
CROWD = "crowd taken as a difficult object (data.train_on_difficult=false keeps it out of training)"
MISSING = "image of the JSON that is not there, left out"


class Listed(NamedTuple):
    """An image of a JSON file: its name, the (height, width) stated, and its objects as they stand there."""

    file_name: str
    stated: tuple[int, int] | None
    objects: tuple[tuple[str, tuple[float, ...], bool], ...]  # class, xyxy, difficult
    counts: Counts


class CocoFile(NamedTuple):
    """What a JSON file lists. Without `annotated` it has no list of annotations, as those of a test set."""

    images: tuple[Listed, ...]
    classes: tuple[str, ...]
    annotated: bool


def read_coco(path: Path) -> CocoFile | None:
    """What a JSON file lists; None for JSON of another kind.

    Raises SppnetError for what is no JSON, ids that are missing or there twice, annotations of images or categories
    that the file does not list, and boxes that are no numbers. Objects without a box get that of their polygons, or are
    counted and left out.
    """
    status = path.stat()
    return _read(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=8)  # a large file takes seconds
def _read(path: Path, modified: int, size: int) -> CocoFile | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise SppnetError(f"{path}: cannot read this file as JSON ({error}); export it again, or remove it") from None
    if not isinstance(values, dict) or not {"images", "categories"} <= set(values):
        return None
    images, categories, annotations = (_entries(path, values, key) for key in ("images", "categories", "annotations"))
    names = {key: class_name(entry["name"]) for key, entry in _by_id(path, "categories", categories, "name").items()}
    repeated = [name for name, count in Counter(names.values()).items() if count > 1]
    if repeated:
        raise SppnetError(f"{path}: two categories are called {repeated[0]!r}; give each a name of its own")
    entries = _by_id(path, "images", images, "file_name")
    objects: dict[str, list[tuple[str, tuple[float, ...], bool]]] = {key: [] for key in entries}
    counts = {key: Counter[str]() for key in entries}
    stray = [entry for entry in annotations if str(entry.get("image_id")) not in entries]
    if stray:
        where = f"{counted(len(stray), 'annotation')} of images that it does not list"
        example = f"e.g. image_id {stray[0].get('image_id')!r} of annotation {stray[0].get('id')!r}"
        raise SppnetError(f"{path}: {where}, {example}; export images and annotations together")
    for entry in annotations:
        key, category = str(entry["image_id"]), str(entry.get("category_id"))
        where = f"{path}: annotation {entry.get('id')!r} of {entries[key]['file_name']}"
        if category not in names:
            listing = ", ".join(f"{number} {name}" for number, name in names.items()) or "none"
            raise SppnetError(f"{where}: category {entry.get('category_id')!r} is not listed; categories: {listing}")
        box, reason = _box_of(entry, where)
        counts[key].update(filter(None, [reason]))
        if box is None:
            continue
        crowd = bool(entry.get("iscrowd"))
        counts[key].update([CROWD] * crowd)
        own = entry.get("attributes")  # of CVAT
        hard = entry.get("ignore") or (isinstance(own, dict) and own.get("difficult"))
        objects[key].append((names[category], box, crowd or bool(hard)))
    listed = (
        Listed(entry["file_name"], _stated(entry), tuple(objects[key]), dict(counts[key]))
        for key, entry in entries.items()
    )
    return CocoFile(tuple(listed), tuple(names.values()), "annotations" in values)


def _entries(path: Path, values: dict[str, Any], key: str) -> list[dict[str, Any]]:
    entries = values.get(key, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise SppnetError(f"{path}: expected COCO's list of {key}, got something else there; export it again")
    return entries


def _by_id(path: Path, what: str, entries: list[dict[str, Any]], text: str) -> dict[str, dict[str, Any]]:
    """The entries by their ids; SppnetError for an id that is there twice, and for missing fields."""
    found: dict[str, dict[str, Any]] = {}
    for place, entry in enumerate(entries):
        key, name = entry.get("id"), entry.get(text)
        if not isinstance(key, int | str) or not isinstance(name, str) or not name.strip():
            raise SppnetError(f"{path}: {what}[{place}]: expected an id and a {text}, got {entry!r:.200}; complete it")
        if str(key) in found:
            raise SppnetError(f"{path}: {what}: the id {key!r} is there twice; give each its own")
        found[str(key)] = entry
    return found


def _box_of(entry: dict[str, Any], where: str) -> tuple[tuple[float, ...] | None, str]:
    """(x1, y1, x2, y2) of an annotation, or None, and what is to be counted."""
    bbox, shape = entry.get("bbox"), entry.get("segmentation")
    if bbox in (None, []):
        rings: list[Any] = shape if isinstance(shape, list) else []
        rings = [shape] if rings and not isinstance(rings[0], list) else rings
        if not rings or not all(isinstance(ring, list) and len(ring) >= 6 for ring in rings):
            mask = isinstance(shape, dict)
            return None, "mask (RLE) without bbox, left out" if mask else "annotation without bbox, left out"
        points = _numbers([value for ring in rings for value in ring], where, "segmentation")
        return (min(points[::2]), min(points[1::2]), max(points[::2]), max(points[1::2])), POLYGON
    values = _numbers(bbox, where, "bbox")
    if len(values) == 5:  # centre, width, height, degrees
        x, y, width, height, angle = values
        cos, sin = abs(math.cos(math.radians(angle))), abs(math.sin(math.radians(angle)))
        across, down = (width * cos + height * sin) / 2, (width * sin + height * cos) / 2
        return (x - across, y - down, x + across, y + down), ROTATED
    if len(values) != 4:
        raise SppnetError(f"{where}: bbox must be x, y, width and height, got {bbox!r:.200}; correct it")
    x, y, width, height = values
    return (x, y, x + width, y + height), ""


def _numbers(values: object, where: str, what: str) -> list[float]:
    ok = isinstance(values, list) and all(type(value) in (int, float) and abs(value) < 1e9 for value in values)
    if not ok:
        raise SppnetError(f"{where}: {what} must be a list of numbers, got {values!r:.200}; correct it")
    return [float(value) for value in values]  # type: ignore[attr-defined]


def _stated(entry: dict[str, Any]) -> tuple[int, int] | None:
    sides = entry.get("height"), entry.get("width")
    return sides if all(type(side) is int and side > 0 for side in sides) else None  # type: ignore[return-value]


def look(tree: Tree) -> DataFolder | None:
    """The folder as COCO data: a part for each JSON file; None where no file is such JSON."""
    paths = tree.of(".json")
    files = {path: own for path in paths if (own := read_coco(tree.root / path)) is not None}
    chosen = {path: own for path, own in files.items() if path.name.lower().startswith(PREFERRED)} or files
    if not chosen:
        return None
    names = _part_names(list(chosen))
    found: dict[str, dict[Path, tuple[int, Listed]]] = {}
    missing = list[str]()
    for path, own in chosen.items():
        images = found[names[path]] = {}
        for entry in own.images:
            alike, hits = tree.find(entry.file_name, path.parent, names[path])
            if len(hits) > 1:
                both = f"{entry.file_name!r} fits {hits[0]} and {hits[1]} alike"
                raise SppnetError(f"{tree.root / path}: {both}; write the folder into its file_name")
            if hits and hits[0] in images:
                raise SppnetError(f"{tree.root / path}: lists {hits[0]} twice; merge the entries")
            images |= {hits[0]: (alike, entry)} if hits else {}
            missing += [] if hits else [f"{entry.file_name} of {path}"]
    best = {
        image: max(own[image][0] for own in found.values() if image in own) for own in found.values() for image in own
    }
    for path, own in chosen.items():  # a missing image is none that another folder has under its name
        images = found[names[path]]
        for image in [image for image, (alike, _) in images.items() if alike < best[image]]:
            missing.append(f"{images.pop(image)[1].file_name} of {path}")
        if own.images and not images:
            where = f"none of its {counted(len(own.images), 'image')} is below {tree.root}"
            raise SppnetError(f"{tree.root / path}: {where}, e.g. {own.images[0].file_name}; put them there")
    left_out = {
        MISSING: missing,
        "image that no JSON lists, left out": [tree.id_of(image) for image in tree.images if image not in best],
    }
    others = [str(path) for path in files if path not in chosen]
    contents = {
        name: _part(
            tree.by_id(found[name]), {tree.id_of(image): e for image, (_, e) in found[name].items()}, own.annotated
        )
        for name, own in zip(names.values(), chosen.values(), strict=True)
    }
    return DataFolder(
        root=tree.root,
        format="coco",
        parts=tuple(contents),
        contents=contents,
        left_out=SkipCounts({why: images for why, images in left_out.items() if images}),
        classes=tuple(dict.fromkeys(name for own in chosen.values() for name in own.classes)),
        labelled=len({image for own in found.values() for image, (_, entry) in own.items() if entry.objects}),
        notes=(f"not read: {', '.join(others)}",) if others else (),
    )


def _part(images: dict[str, Path], entries: dict[str, Listed], annotated: bool) -> Part:
    return Part(images, partial(_annotate, entries, annotated), () if annotated else images)


def _annotate(
    entries: dict[str, Listed], annotated: bool, image: str, size: tuple[int, int], orientation: int
) -> tuple[Annotation, Counts]:
    if not annotated:
        raise SppnetError(f"{image}: its JSON has no list of annotations; name a part that is annotated")
    entry = entries[image]
    names, boxes, difficult = zip(*entry.objects, strict=True) if entry.objects else ((), (), ())
    found, counts = place_objects(as_boxes(boxes), names, difficult, size, entry.stated, orientation)
    return found, {**entry.counts, **counts}


def _part_names(paths: list[Path]) -> dict[Path, str]:
    """A name for each JSON file: its own, or its folder's where its own says nothing."""
    own = {path: path.stem.removeprefix("instances_").removeprefix("_annotations.coco") for path in paths}
    generic = {"", "instances", "annotations", "labels", "coco", "result", "default", "instances_default"}
    folders = {
        path: "/".join(name for name in path.parent.parts if name not in ("annotations", "labels")) for path in paths
    }
    names = {path: folders[path] if name.lower() in generic else name for path, name in own.items()}
    if len(set(names.values())) < len(paths):
        names = {path: "/".join(filter(None, (folders[path], own[path]))) for path in paths}
    if len(set(names.values())) < len(paths):
        names = {path: path.with_suffix("").as_posix() for path in paths}
    return {path: name or "all" for path, name in names.items()}
