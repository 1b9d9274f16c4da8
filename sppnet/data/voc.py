"""Annotation files of PASCAL VOC: the one place that knows 1-based inclusive corners, with `comp4`.

(xmin, ymin, xmax, ymax) in a file is (xmin - 1, ymin - 1, xmax, ymax) here, and back in the writers. Fields of an
annotation that repeat what the image knows (<size>, <path>) are never trusted: the image is found by its id, its size
is its header's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError
from xml.sax.saxutils import escape

import numpy as np
from defusedxml.ElementTree import fromstring as parse_xml
from numpy.typing import ArrayLike, NDArray

from sppnet.artifacts import write_text
from sppnet.checks import as_boxes
from sppnet.data.labels import Counts, class_name, kept_objects, place_objects
from sppnet.errors import SppnetError
from sppnet.records import Annotation

DIFFICULT = {"": False, "0": False, "false": False, "unspecified": False, "1": True, "true": True}
CORNERS = ("xmin", "ymin", "xmax", "ymax")
INWARD = np.array([1, 1, 0, 0], dtype=np.float64)  # 1-based inclusive corners minus half-open ones


def read_annotation(
    path: Path, size: tuple[int, int] | None = None, orientation: int = 1, inward: NDArray[np.float64] = INWARD
) -> tuple[Annotation, Counts]:
    """The objects of an annotation file and how often what was skipped, in an upright image of `size` (height, width).

    `orientation` is its EXIF orientation, `inward` what the corners of the file exceed half-open ones by.

    Left out are boxes with xmax < xmin - 1 or ymax < ymin - 1 ("reversed corners"), boxes of at most a pixel in width
    or height ("zero-area box": a click or a slip), and what `place_objects` leaves out; boxes are clipped and turned as
    there. Without `size` objects are as the devkit takes them: only reversed corners are left out, and a box of one
    pixel counts. A missing <difficult> means 0. No object at all is ordinary.
    Raises SppnetError for a file that is missing, not XML, not an annotation or not complete.
    """
    root = read_xml(path)
    objects = [_read_object(element, path) for element in root.findall("object")]
    names, flags = [name for name, _, _ in objects], [flag for _, _, flag in objects]
    corners = as_boxes([own for _, own, _ in objects])
    drawn = corners - inward
    if size is None:
        whole = np.all(drawn[:, 2:] > drawn[:, :2], axis=1)
        own = kept_objects(drawn, names, flags, whole)
        return own, {"box with reversed corners": len(names) - len(own)} if len(own) < len(names) else {}
    # To the letter of VOC equal corners are a box of one pixel, but no object is drawn so.
    empty = np.any(corners[:, 2:] <= corners[:, :2], axis=1)
    return place_objects(drawn, names, flags, size, _stated_size(root), orientation, empty)


def read_xml(path: Path) -> Element:
    """The <annotation> of a file; SppnetError for one that is missing, not XML or something else."""
    try:
        content = path.read_bytes()
        try:
            root = parse_xml(content)  # refuses entities, so a small file cannot become a large one
        except ValueError as error:  # expat does not know the encodings of Chinese, Japanese and Korean
            declared = re.match(rb"<\?xml[^>]*encoding=[\"']([\w.-]+)", content)
            if declared is None or "multi-byte" not in str(error):
                raise
            root = parse_xml(content.decode(declared[1].decode()))
    except FileNotFoundError:
        raise SppnetError(f"{path}: no such annotation file; add it or take the image out of the set") from None
    except (OSError, ParseError, ValueError, LookupError) as error:  # LookupError: unknown encoding
        problem = f"cannot read this annotation as XML ({type(error).__name__}: {error})"
        raise SppnetError(f"{path}: {problem}; repair it, save it as UTF-8, or remove it") from None
    if root is None or root.tag != "annotation":
        tag = None if root is None else root.tag
        raise SppnetError(f"{path}: expected <annotation> at the top, got <{tag}>; give a PASCAL VOC annotation")
    return root


def annotate(
    files: Mapping[str, Path], image: str, size: tuple[int, int], orientation: int
) -> tuple[Annotation, Counts]:
    """`read_annotation` of an image; `files`: id -> annotation file."""
    return read_annotation(files[image], size, orientation)


def write_annotation(
    path: Path,
    size: tuple[int, int],
    boxes: ArrayLike,
    names: Sequence[str],
    difficult: Sequence[bool],
    **options: bool,
) -> None:
    """Write (R, 4) half-open `boxes` of an image of `size` (height, width) as a VOC annotation file (`write_text`)."""
    lines = [f"<annotation>\n  <folder>{escape(path.parent.parent.name)}</folder>"]
    lines += [f"  <size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>"]
    for name, corners, flag in zip(names, as_boxes(boxes) + INWARD, difficult, strict=True):
        lines += [f"  <object>\n    <name>{escape(name)}</name>\n    <difficult>{int(flag)}</difficult>"]
        bndbox = "".join(f"<{tag}>{value:.10g}</{tag}>" for tag, value in zip(CORNERS, corners, strict=True))
        lines += [f"    <bndbox>{bndbox}</bndbox>\n  </object>"]
    write_text(path, "\n".join([*lines, "</annotation>\n"]), **options)


def _read_object(element: Element, path: Path) -> tuple[str, tuple[float, ...], bool]:
    """Name, (xmin, ymin, xmax, ymax) as they stand in the file, and the difficult flag."""
    name = class_name(element.findtext("name") or "")
    if not name:
        raise SppnetError(f"{path}: an <object> has no <name>; name its class or remove the object")
    bndbox = element.find("bndbox")
    if bndbox is None:
        raise SppnetError(f"{path}: object {name!r} has no <bndbox>; add its box or remove the object")
    corners = []
    for tag in CORNERS:
        text = bndbox.findtext(tag)
        try:
            corners.append(math.nan if "_" in (text or "") else float(text or ""))
        except ValueError:
            corners.append(math.nan)
        if not abs(corners[-1]) < 1e9:  # nor NaN
            raise SppnetError(f"{path}: <{tag}> of object {name!r} must be a number, got {text!r}; correct the box")
    difficult = (element.findtext("difficult") or "").strip()
    if difficult.lower() not in DIFFICULT:
        raise SppnetError(f"{path}: <difficult> of object {name!r} must be 0 or 1, got {difficult!r}; correct it")
    return name, tuple(corners), DIFFICULT[difficult.lower()]


def _stated_size(root: Element) -> tuple[int, int] | None:
    """The (height, width) that the annotation states; None where it states none, or zeros."""
    height, width = ((root.findtext(f"size/{tag}") or "").strip() for tag in ("height", "width"))
    present = all(re.fullmatch(r"0*[1-9]\d{0,8}", text, re.ASCII) for text in (height, width))
    return (int(height), int(width)) if present else None
