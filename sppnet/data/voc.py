"""PASCAL VOC data sets on disk: the one place that knows 1-based inclusive corners.

    <root>/<year folder>/ImageSets/Main/<set>.txt     one image id per line
    <root>/<year folder>/JPEGImages/<id>.jpg          or .png … (`sppnet.images.IMAGE_SUFFIXES`), in any case
    <root>/<year folder>/Annotations/<id>.xml

(xmin, ymin, xmax, ymax) in a file is (xmin - 1, ymin - 1, xmax, ymax) here, and back in the writers. A
split is named ``<year folder>/<set>``. Fields of an annotation that repeat what the image knows
(<filename>, <size>, <path>) are never trusted: the image is found by its id, its size is its header's.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError
from xml.sax.saxutils import escape

import numpy as np
from defusedxml.ElementTree import parse as parse_xml
from numpy.typing import ArrayLike, NDArray

from sppnet.artifacts import digest_of, file_digest, write_text
from sppnet.errors import ImageError, SppnetError
from sppnet.images import IMAGE_SUFFIXES, image_size
from sppnet.records import Annotation, Detections, ImageRecord, SkipCounts, areas, as_boxes

CORNERS = ("xmin", "ymin", "xmax", "ymax")
INWARD = np.array([1, 1, 0, 0], dtype=np.float64)  # 1-based inclusive corners minus half-open ones


def read_annotation(path: Path, size: tuple[int, int] | None = None) -> tuple[Annotation, SkipCounts]:
    """The objects of an annotation file, in an image of `size` (height, width).

    Documented skips, counted: boxes with xmax <= xmin or ymax <= ymin ("zero-area box": a click or a slip)
    and boxes wholly outside the image are left out; boxes partly outside are clipped to it; a <size> that
    differs from `size` is only counted, `size` wins. Without `size` the stated one holds, where there is one;
    else boxes are clipped at the left and top edges alone. A missing <difficult> means 0. No object at all is ordinary.
    Raises SppnetError for a file that is missing, not XML, not an annotation or not complete.
    """
    root = _xml_root(path)
    objects = [_read_object(element, path) for element in root.findall("object")]
    corners = as_boxes([corners for _, corners, _ in objects])
    stated = _stated_size(root)
    height, width = size or stated or (math.inf, math.inf)
    boxes = np.clip(corners - INWARD, 0, [width, height] * 2)
    # To the letter of VOC equal corners are a box of one pixel, but no object is drawn so.
    zero_area = (corners[:, 2:] <= corners[:, :2]).any(axis=1)
    outside = ~zero_area & (areas(boxes) <= 0)
    keep = ~zero_area & ~outside
    clipped = keep & (boxes != corners - INWARD).any(axis=1)
    skips = {
        "zero-area box": int(zero_area.sum()),
        "box outside the image": int(outside.sum()),
        "box clipped to the image": int(clipped.sum()),
        "annotation size disagrees with the image": int(None not in (size, stated) and size != stated),
    }
    names = tuple(name for (name, _, _), kept in zip(objects, keep, strict=True) if kept)
    difficult = np.array([flag for _, _, flag in objects], dtype=bool)[keep]
    annotation = Annotation(boxes[keep].astype(np.float32), names, difficult)
    return annotation, SkipCounts({reason: count for reason, count in skips.items() if count})


def write_annotation(
    path: Path, size: tuple[int, int], boxes: ArrayLike, names: Sequence[str], difficult: Sequence[bool]
) -> None:
    """Write (R, 4) half-open `boxes` of an image of `size` (height, width) as a VOC annotation file."""
    lines = [f"<annotation>\n  <folder>{escape(path.parent.parent.name)}</folder>"]
    lines += [f"  <size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>"]
    for name, corners, flag in zip(names, as_boxes(boxes) + INWARD, difficult, strict=True):
        lines += [f"  <object>\n    <name>{escape(name)}</name>\n    <difficult>{int(flag)}</difficult>"]
        bndbox = "".join(f"<{tag}>{value:.10g}</{tag}>" for tag, value in zip(CORNERS, corners, strict=True))
        lines += [f"    <bndbox>{bndbox}</bndbox>\n  </object>"]
    write_text(path, "\n".join([*lines, "</annotation>\n"]))


def _xml_root(path: Path) -> Element:
    try:
        root = parse_xml(path).getroot()  # refuses entities, so a small file cannot become a large one
    except FileNotFoundError:
        raise SppnetError(f"{path}: no such annotation file; add it or take the image out of the set") from None
    except (OSError, ParseError, ValueError, LookupError) as error:  # LookupError: unknown encoding
        reason = f"{type(error).__name__}: {error}"
        raise SppnetError(f"{path}: cannot read this annotation as XML ({reason}); repair or remove it") from None
    if root is None or root.tag != "annotation":
        tag = None if root is None else root.tag
        raise SppnetError(f"{path}: expected <annotation> at the top, got <{tag}>; give a PASCAL VOC annotation")
    return root


def _read_object(element: Element, path: Path) -> tuple[str, list[float], bool]:
    """Name, (xmin, ymin, xmax, ymax) as they stand in the file, and the difficult flag."""
    name = " ".join((element.findtext("name") or "").split())
    if not name:
        raise SppnetError(f"{path}: an <object> has no <name>; name its class or remove the object")
    if "/" in name or "\\" in name:
        raise SppnetError(f"{path}: class {name!r} cannot be part of a file name; rename it without slashes")
    bndbox = element.find("bndbox")
    if bndbox is None:
        raise SppnetError(f"{path}: object {name!r} has no <bndbox>; add its box or remove the object")
    corners = []
    for tag in CORNERS:
        text = bndbox.findtext(tag)
        try:
            corners.append(float(text or ""))
        except ValueError:
            corners.append(math.nan)
        if not abs(corners[-1]) < 1e9:  # nor NaN
            raise SppnetError(f"{path}: <{tag}> of object {name!r} must be a number, got {text!r}; correct the box")
    difficult = (element.findtext("difficult") or "0").strip()
    if difficult not in ("0", "1"):
        raise SppnetError(f"{path}: <difficult> of object {name!r} must be 0 or 1, got {difficult!r}")
    return name, corners, difficult == "1"


def _stated_size(root: Element) -> tuple[int, int] | None:
    """The (height, width) that the annotation states; None where it states none, or zeros."""
    height, width = ((root.findtext(f"size/{tag}") or "").strip() for tag in ("height", "width"))
    present = all(re.fullmatch(r"0*[1-9]\d{0,8}", text, re.ASCII) for text in (height, width))
    return (int(height), int(width)) if present else None


def read_image_set(path: Path) -> list[str]:
    """The ids of an image set, in the order of the file.

    One id per line; a second column of -1, 0 or 1 (the per-class sets of VOC) is dropped. Blank lines,
    byte-order marks and Windows line ends are accepted; an id listed twice, or one that is a path, is an error.
    """
    first_line: dict[str, int] = {}
    for number, line in enumerate(_read_lines(path), start=1):
        columns = line.split()
        if not columns:
            continue
        name = columns[0] if len(columns) == 2 and columns[1] in ("-1", "0", "1") else line.strip()
        if "/" in name or "\\" in name or name in (".", ".."):
            raise SppnetError(f"{path}:{number}: expected a file name without folder, got {name!r}; give the stem")
        if name in first_line:
            raise SppnetError(f"{path}:{number}: {name!r} is already on line {first_line[name]}; remove one of them")
        first_line[name] = number
    return list(first_line)


def load_split(root: Path | str, split: str, require_annotations: bool = True) -> tuple[list[ImageRecord], SkipCounts]:
    """The images of ``<year folder>/<set>``, in the order of the set, and what was skipped in them.

    A missing annotation file is an error, or with ``require_annotations=False`` (a test split) is counted and gives a
    record without one. Raises SppnetError for a missing folder, set or image, an unreadable image header and all of
    `read_annotation`.
    """
    set_file = _set_file(Path(root), split)
    names = read_image_set(set_file)
    if not names:
        raise SppnetError(f"{set_file}: lists no image; write one image id per line")
    folder, records, counts = set_file.parents[2], [], Counter[str]()
    for path in _find_images(set_file, names):
        try:
            record = ImageRecord(f"{folder.name}/{path.stem}", path, image_size(path), file_digest(path))
        except (ImageError, OSError) as error:
            raise SppnetError(f"an image of the data set cannot be used: {error}") from None
        xml = folder / "Annotations" / f"{path.stem}.xml"
        if require_annotations or xml.exists():
            annotation, skips = read_annotation(xml, record.size)
            record = replace(record, annotation=annotation)
            counts.update(skips.counts)
        else:
            counts["image without annotation, not evaluated"] += 1
        records.append(record)
    return records, SkipCounts(dict(counts))


def load_splits(
    root: Path | str, splits: Sequence[str], require_annotations: bool = True
) -> tuple[list[ImageRecord], SkipCounts]:
    """Several splits one after the other; an image that is in two of them is an error."""
    records, skips, split_of = list[ImageRecord](), SkipCounts(), dict[str, str]()
    for split in splits:
        more, counted = load_split(root, split, require_annotations)
        for record in more:
            if record.id in split_of:
                first = split_of[record.id]
                raise SppnetError(f"image {record.id} is in {first} and in {split}; name splits that share no image")
            split_of[record.id] = split
        records += more
        skips = skips.plus(counted)
    return records, skips


def _set_file(root: Path, split: str) -> Path:
    parts = split.split("/")
    if len(parts) != 2 or not all(parts) or ".." in parts:
        raise SppnetError(f"split {split!r}: expected <year folder>/<set>, e.g. VOC2007/trainval")
    if not root.is_dir():
        raise SppnetError(f"{root}: no such data folder; see data/README.md, or set data.root to an existing one")
    path = root / parts[0] / "ImageSets" / "Main" / f"{parts[1]}.txt"
    if not path.is_file():
        found = sorted(f"{file.parents[2].name}/{file.stem}" for file in root.glob("*/ImageSets/Main/*.txt"))
        nested = root / "VOCdevkit"
        hint = f"set data.root={nested}" if nested.is_dir() else f"splits here: {', '.join(found[:20]) or 'none'}"
        raise SppnetError(f"{path}: no such image set for split {split!r}; {hint}")
    return path


def _find_images(set_file: Path, names: Sequence[str]) -> list[Path]:
    """The image file of each id of an image set."""
    folder = set_file.parents[2] / "JPEGImages"
    files = [path for path in folder.glob("*") if path.suffix.lower() in IMAGE_SUFFIXES]
    files.sort(key=lambda path: (IMAGE_SUFFIXES.index(path.suffix.lower()), path.name), reverse=True)
    image_of = {path.stem: path for path in files}  # the first suffix comes last and wins
    missing = [name for name in names if name not in image_of]
    if missing:
        raise SppnetError(
            f"{folder / missing[0]}: no such image ({', '.join(IMAGE_SUFFIXES)}), one of {len(missing)} missing of "
            f"the {len(names)} in {set_file}; add them, and list ids there without the ending"
        )
    return [image_of[name] for name in names]


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SppnetError(f"{path}: cannot read this text file ({error}); give an existing UTF-8 file") from None


def choose_classes(records: Sequence[ImageRecord], classes: tuple[str, ...] | None) -> tuple[str, ...]:
    """The classes to train: those given, each of which must occur in `records`, or all that occur, sorted."""
    found = tuple(sorted({name for record in records if record.annotation for name in record.annotation.names}))
    chosen = found if classes is None else classes
    listing = f"classes found in the training images: {', '.join(found) or 'none'}"
    for name in chosen:
        if name not in found:
            raise SppnetError(f"class {name!r} never occurs; {listing}")
        if chosen.count(name) > 1:
            raise SppnetError(f"data.classes names {name!r} twice; name each class once")
    if not chosen:
        raise SppnetError(f"no class to train; {listing}")
    return chosen


def restrict(records: Sequence[ImageRecord], classes: tuple[str, ...]) -> list[ImageRecord]:
    """The same images with the objects of these classes alone."""
    wanted = frozenset(classes)
    return [r if r.annotation is None else replace(r, annotation=r.annotation.of(wanted)) for r in records]


def hold_out(
    records: Sequence[ImageRecord], share: float, seed: int = 0
) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """(train, held out): `share` of the images, at least one on each side, chosen by `seed` and id alone."""
    if not 0 < share < 1 or len(records) < 2:
        expected = "expected a held-out share between 0 and 1 and at least 2 images"
        raise SppnetError(f"{expected}, got {share} and {len(records)}; set data.holdout, or name images in data.val")
    count = min(max(round(share * len(records)), 1), len(records) - 1)
    ranked = sorted(records, key=lambda record: hashlib.sha256(f"{seed} {record.id}".encode()).digest())
    held = {record.id for record in ranked[:count]}
    return [r for r in records if r.id not in held], [r for r in records if r.id in held]


def annotations_digest(records: Sequence[ImageRecord], classes: tuple[str, ...]) -> str:
    """16 hexadecimal digits of images and objects of `classes`: ids, image contents, boxes, names, flags, order."""
    rows = []
    for record in restrict(records, classes):
        found = record.annotation
        objects = None if found is None else (found.boxes.tolist(), found.names, found.difficult.tolist())
        rows.append((record.id, record.digest, objects))
    return digest_of("annotations", classes, rows)


def write_comp4(
    folder: Path, image_set_name: str, detections: Mapping[str, Detections], classes: Sequence[str]
) -> list[Path]:
    """Write ``comp4_det_<set>_<class>.txt`` per class, as the VOC devkit reads them, and return the paths.

    `detections` maps image ids to what was found; lines are ``stem score xmin ymin xmax ymax``. A class
    without detections gets an empty file. Images of several year folders with one stem are an error.
    """
    stems = {image_id: image_id.rpartition("/")[2] for image_id in detections}
    if len(set(stems.values())) < len(stems):
        stem = Counter(stems.values()).most_common(1)[0][0]
        raise SppnetError(f"comp4 files name images by stem, but {stem!r} occurs twice; write each year by itself")
    lines: dict[str, list[str]] = {name: [] for name in classes}
    for image_id, found in detections.items():
        corners = found.boxes.astype(np.float64) + INWARD
        for label, score, box in zip(found.labels, found.scores, corners, strict=True):
            if found.classes[label] in lines:  # nine decimals keep float32 scores in their order
                values = " ".join(f"{value:.6f}" for value in box)
                lines[found.classes[label]].append(f"{stems[image_id]} {score:.9f} {values}\n")
    paths = [folder / f"comp4_det_{image_set_name}_{name}.txt" for name in classes]
    for path, name in zip(paths, classes, strict=True):
        write_text(path, "".join(lines[name]))
    return paths


def read_comp4(path: Path) -> tuple[list[str], NDArray[np.float64], NDArray[np.float64]]:
    """Image stems, scores (R,) and half-open boxes (R, 4) of a comp4 file, in the order of the file."""
    stems, values = list[str](), list[list[float]]()
    for number, line in enumerate(_read_lines(path), start=1):
        if not line.strip():
            continue
        stem, *fields = line.strip().rsplit(maxsplit=5)
        try:
            row = [float(field) for field in fields]
        except ValueError:
            row = []
        if len(row) != 5 or not np.isfinite(row).all():
            raise SppnetError(f"{path}:{number}: expected 'id score xmin ymin xmax ymax', got {line!r}; correct it")
        stems.append(stem)
        values.append(row)
    table = np.array(values, dtype=np.float64).reshape(-1, 5)
    return stems, table[:, 0], table[:, 1:] - INWARD
