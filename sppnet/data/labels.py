"""What the annotations of all formats have in common: text, names, and boxes laid into their image."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from itertools import compress
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sppnet.checks import as_boxes
from sppnet.errors import SppnetError
from sppnet.images import SIDEWAYS
from sppnet.records import Annotation, areas, clip_boxes

Counts = dict[str, int]  # reason -> how often
ROUNDED = 0.01  # px beyond the image that are rounding: YOLO's shares have six digits


def place_objects(
    drawn: ArrayLike,
    names: Sequence[str],
    difficult: Sequence[bool],
    size: tuple[int, int],
    stated: tuple[int, int] | None = None,
    orientation: int = 1,
    empty: NDArray[np.bool_] | None = None,
) -> tuple[Annotation, Counts]:
    """Half-open boxes (R, 4) as they are `drawn`, in the upright image of `size` (height, width).

    Left out and counted are boxes with reversed corners, those without extent (by default; or where the mask `empty`
    (R,) is true), objects that are there twice and those wholly outside the image. Boxes partly outside are clipped.
    Boxes that were drawn before the EXIF `orientation` turned the image are turned with it: the size that the
    annotation has `stated` tells, or that some lie beyond the upright image. Any other stated size is only counted.
    """
    drawn = as_boxes(drawn)
    unturned = _is_unturned(drawn, size, stated, orientation)
    sides = drawn[:, 2:] - drawn[:, :2]
    turned = _turn(drawn, size, orientation) if unturned else drawn
    boxes = clip_boxes(turned, size)
    first: dict[tuple[str, tuple[float, ...]], int] = {}
    objects = enumerate(zip(names, map(tuple, drawn.tolist()), strict=True))
    faults = {
        "box with reversed corners": (sides < 0).any(axis=1),
        "zero-area box": (sides <= 0).any(axis=1) if empty is None else empty,
        "object annotated twice": np.array([first.setdefault(one, i) != i for i, one in objects], dtype=bool),
        "box outside the image": areas(boxes.astype(np.float32)) <= 0,
    }
    notes = {
        "annotation size disagrees with the image": stated not in (None, size) and not unturned,
        "annotation turned with its image (EXIF orientation)": unturned is True,
        "image with EXIF orientation, boxes taken as drawn upright: its <size> does not tell": unturned is None,
    }
    keep, counts = np.ones(len(names), dtype=bool), Counts()
    for reason, fault in faults.items():
        counts[reason] = int((keep & fault).sum())
        keep &= ~fault
    counts["box clipped to the image"] = int((keep & (abs(boxes - turned) > ROUNDED).any(axis=1)).sum())
    found = kept_objects(boxes, names, difficult, keep)
    return found, {reason: count for reason, count in {**counts, **notes}.items() if count}


def kept_objects(
    boxes: NDArray[np.floating], names: Sequence[str], difficult: Sequence[bool], keep: NDArray[np.bool_]
) -> Annotation:
    """Those objects of (R, 4) boxes for which the mask `keep` (R,) is true."""
    return Annotation(boxes[keep].astype(np.float32), tuple(compress(names, keep)), np.array(difficult, bool)[keep])


def _is_unturned(
    boxes: NDArray[np.floating], size: tuple[int, int], stated: tuple[int, int] | None, orientation: int
) -> bool | None:
    """Whether boxes were drawn before the EXIF orientation turned the image; None where that cannot be told.

    The stated size tells, unless a box lies beyond that frame and all fit the other; where it is none of the two, the
    boxes tell.
    """
    stored = size[::-1]
    if not 2 <= orientation <= 8 or not len(boxes):
        return False
    if orientation not in SIDEWAYS or stored == size:
        return None
    fits_stored, fits = (bool((boxes[:, 2:] <= np.array(frame[::-1]) + 1).all()) for frame in (stored, size))
    if stated == size:  # perhaps a program's, which read the picture upright and wrote boxes as they came
        return fits_stored and bool((boxes[:, :2] >= size[::-1]).any())  # one that only overshoots is clipped
    if stated == stored:
        return fits_stored or not fits
    return fits_stored if fits_stored != fits else None


def _turn(boxes: NDArray[np.float64], size: tuple[int, int], orientation: int) -> NDArray[np.float64]:
    """Boxes of the image as it is stored in the upright one of `size`; the orientation is 5, 6, 7 or 8."""
    width, height = size  # as stored
    x, y = boxes[:, [0, 2]], boxes[:, [1, 3]]
    across = height - y[:, ::-1] if orientation in (6, 7) else y
    down = width - x[:, ::-1] if orientation in (7, 8) else x
    return np.stack([across[:, 0], down[:, 0], across[:, 1], down[:, 1]], axis=1)


def normalise(text: str) -> str:
    """Names in Unicode's composed form (NFC): macOS may hand out another one than was typed."""
    return unicodedata.normalize("NFC", text)


def class_name(text: str) -> str:
    """The name of a class as it is compared: composed, one blank between words and none around it."""
    return normalise(" ".join(text.split()))


def read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")  # splitlines ends lines at U+2028 and U+0085 too
    except (OSError, UnicodeDecodeError) as error:
        raise SppnetError(f"{path}: cannot read this text file ({error}); give an existing UTF-8 file") from None
