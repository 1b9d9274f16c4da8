"""COCO's JSON: images, categories, annotations with boxes (x, y, width, height), 0-based."""

from __future__ import annotations

import codecs
import math
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from urllib.parse import unquote

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from sppnet.data.labels import Counts, class_name, place_objects
from sppnet.data.parts import DataFolder, Part, Tree, role_of
from sppnet.errors import SppnetError, counted
from sppnet.records import Annotation, SkipCounts

PREFERRED = ("instances", "_annotations.coco")  # beside them captions, key points and the like name the same images
UNNAMED = ("", "annotations", "coco", "default", "instances", "labels", "result")  # files whose names say nothing
CROWD = "crowd taken as a difficult object (data.train_on_difficult=false keeps it out of training)"
Id = int | str
Corners = tuple[float, ...]


class _Image(BaseModel):
    id: Id
    file_name: str
    width: Any = None
    height: Any = None


class _Category(BaseModel):
    id: Id
    name: Annotated[str, Field(pattern=r"\S")]


class _Object(BaseModel):
    id: Any = None
    image_id: Id
    category_id: Id
    bbox: list[Annotated[float, Field(gt=-1e9, lt=1e9)]] | None = None
    segmentation: Any = None
    iscrowd: bool | None = None
    ignore: bool | None = None  # of detectors' own files: a difficult object
    attributes: Any = None  # of CVAT


class _File(BaseModel):
    images: list[_Image]
    categories: list[_Category]
    annotations: list[_Object] | None = None  # a test set has none


class Listed(NamedTuple):
    """An image of a JSON file: its name, the (height, width) stated, its objects (None = not annotated), and counts."""

    file_name: str
    stated: tuple[int, int] | None
    objects: list[tuple[str, Corners, bool]] | None  # class, xyxy, difficult
    counts: Counter[str]


Lists = tuple[list[Listed], tuple[str, ...]]  # the images and the classes of a file


def read_coco(path: Path) -> Lists | None:
    """The images and classes that a JSON file lists; None for JSON of another kind.

    Objects without a box get that of their polygons, or are counted and left out. SppnetError for what is no JSON,
    missing fields, ids that are there twice, and annotations of images or categories that are not listed.
    """
    try:
        found = _File.model_validate_json(path.read_bytes().removeprefix(codecs.BOM_UTF8))
    except ValidationError as failure:
        error = failure.errors()[0]
        if error["type"] == "json_invalid":
            reason = f"cannot read this file as JSON ({error['ctx']['error']})"
            raise SppnetError(f"{path}: {reason}; export it again, or remove it") from None
        if len(error["loc"]) < 2:  # no object, or one without these lists
            return None
        where = ".".join(map(str, error["loc"]))
        raise SppnetError(f"{path}: {where}: {error['msg']}, got {error['input']!r:.200}; correct it") from None
    names = {str(one.id): class_name(one.name) for one in found.categories}
    ids, categories = ([str(one.id) for one in own] for own in (found.images, found.categories))
    for what, values in {"images": ids, "categories": categories}.items():
        twice = [value for value, count in Counter(values).items() if count > 1]
        if twice:
            raise SppnetError(f"{path}: {what}: {twice[0]!r} is there twice; give each an id of its own")
    images = {
        str(one.id): Listed(one.file_name, _stated(one), None if found.annotations is None else [], Counter())
        for one in found.images
    }
    for known, key in ((images, "image_id"), (names, "category_id")):
        stray = [one for one in found.annotations or () if str(getattr(one, key)) not in known]
        if stray:
            what = f"{counted(len(stray), 'annotation')} whose {key} it does not list"
            example = f"e.g. {getattr(stray[0], key)!r} of annotation {stray[0].id!r}"
            here = ", ".join([*known][:10]) or "none"
            raise SppnetError(f"{path}: {what}, {example}; listed are {here}; export again")
    alike = Counter(names.values())
    for one in found.annotations or ():
        image, name = images[str(one.image_id)], names[str(one.category_id)]
        corners, reason = _corners(one, f"{path}: annotation {one.id!r} of {image.file_name}")
        image.counts.update([reason] * bool(reason) + [CROWD] * bool(one.iscrowd and corners))
        if corners and image.objects is not None:
            own = one.attributes.get("difficult") if isinstance(one.attributes, dict) else None
            image.objects.append((name, corners, bool(one.iscrowd or one.ignore or own in (True, "1", "true"))))
            merged = f"object of {name}, a name of {alike[name]} categories, which are taken as one class"
            image.counts.update([merged] * (alike[name] > 1))
    return list(images.values()), tuple(alike)


def _stated(image: _Image) -> tuple[int, int] | None:
    sides = image.height, image.width
    return sides if all(type(side) is int and side > 0 for side in sides) else None


def _corners(found: _Object, where: str) -> tuple[Corners | None, str]:
    """(x1, y1, x2, y2), None where there is no box, and what is to be counted."""
    if not found.bbox:
        rings = found.segmentation or [[]]
        try:
            rings = rings if isinstance(rings[0], list) else [rings]
            points = np.concatenate([np.array(ring, float).reshape(-1, 2) for ring in rings])
            return (*points.min(axis=0).tolist(), *points.max(axis=0).tolist()), "polygon turned into its box"
        except (KeyError, TypeError, ValueError):  # a mask, or nothing
            return None, "annotation without bbox and polygon, left out"
    if len(found.bbox) not in (4, 5):
        raise SppnetError(f"{where}: bbox must be x, y, width and height, got {found.bbox!r:.200}; correct it")
    x, y, width, height, *angle = found.bbox
    if not angle:
        return (x, y, x + width, y + height), ""
    cos, sin = abs(math.cos(math.radians(angle[0]))), abs(math.sin(math.radians(angle[0])))
    across, down = (width * cos + height * sin) / 2, (width * sin + height * cos) / 2  # of its centre (x, y)
    return (x - across, y - down, x + across, y + down), "rotated box turned into an upright one"


def look(tree: Tree) -> DataFolder | None:
    """The folder as COCO data: a part for each JSON file; None where no file is such JSON."""
    files = tree.of(".json")
    preferred = [path for path in files if path.name.lower().startswith(PREFERRED)]
    chosen, notes = tree.read(preferred, read_coco, lambda path: True, needed=False)
    if not chosen:
        chosen, notes = tree.read(files, read_coco, lambda path: role_of(path.stem) is not None, needed=True)
    if not chosen:
        return None
    names, missing = _part_names(list(chosen)), list[str]()
    claims: dict[Path, dict[Path, Listed]] = {path: {} for path in chosen}
    for path, entry in [(path, entry) for path, (entries, _) in chosen.items() for entry in entries]:
        texts = entry.file_name, unquote(entry.file_name)  # "a%20b.jpg" is of an exported URL
        image = next(filter(None, (tree.find(text, path, names[path]) for text in texts)), None)
        if image is None:
            missing.append(f"{entry.file_name} of {path}")
        elif claims[path].setdefault(image, entry) is not entry:
            raise SppnetError(f"{tree.root / path}: lists {image} twice; merge the entries")
    home = {
        path: {image for image in own if names[path] in image.parent.parts or path.parent in image.parents}
        for path, own in claims.items()
    }
    contents, labelled = dict[str, Part](), set[Path]()
    for path, claimed in claims.items():
        # an image at another file's home is not the one that a file with a home of its own means
        others = set[Path]().union(*home.values()) - home[path] if home[path] else set[Path]()
        images = {image: entry for image, entry in claimed.items() if image not in others}
        missing += [f"{entry.file_name} of {path}" for image, entry in claimed.items() if image in others]
        listed = chosen[path][0]
        if listed and not images:
            where = f"none of its {counted(len(listed), 'image')} is below {tree.root}"
            raise SppnetError(f"{tree.root / path}: {where}, e.g. {listed[0].file_name}; put them there")
        entries = {tree.id_of(image): entry for image, entry in images.items()}
        unlabelled = {image for image, entry in entries.items() if entry.objects is None}
        contents[names[path]] = Part(tree.by_id(images), partial(_annotate, entries, path), unlabelled)
        labelled |= {image for image, entry in images.items() if entry.objects}
    known = set[Path]().union(*claims.values())
    unlisted = [tree.id_of(image) for image in tree.images if image not in known]
    left_out = SkipCounts({"image that is not there, left out": missing, "image in no JSON, left out": unlisted})
    classes = tuple(dict.fromkeys(name for _, own in chosen.values() for name in own))
    return DataFolder(tree.root, "coco", tuple(contents), contents, left_out, classes, len(labelled), tuple(notes))


def _annotate(
    entries: dict[str, Listed], path: Path, image: str, size: tuple[int, int], orientation: int
) -> tuple[Annotation, Counts]:
    entry = entries[image]
    if entry.objects is None:
        raise SppnetError(f"{path}: no list of annotations, so none of {image}; name a part that is annotated")
    names, boxes, difficult = zip(*entry.objects, strict=True) if entry.objects else ((), (), ())
    found, counts = place_objects(boxes, names, difficult, size, entry.stated, orientation)
    return found, {**entry.counts, **counts}


def _part_names(paths: list[Path]) -> dict[Path, str]:
    """A name for each JSON file: its own, or its folder's where its own says nothing."""
    names = dict[Path, str]()
    for path in paths:
        own = path.stem.removeprefix("instances_").removeprefix("_annotations.coco")
        folders = [name for name in path.parent.parts if name.lower() not in UNNAMED]
        names[path] = ("/".join(folders) or "all") if own.lower() in UNNAMED else own
    unique = len({*names.values()}) == len(names)
    return names if unique else {path: path.with_suffix("").as_posix() for path in paths}
