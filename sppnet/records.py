"""The named values that travel between the steps of the pipeline, and arithmetic on boxes.

Boxes are float (R, 4) arrays of (x1, y1, x2, y2), zero-based, half-open: width is x2 - x1. With these corners the plain
intersection over union equals the VOC devkit's, whose inclusive corners need "+ 1"; there is none in this package.
Sizes are (height, width).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sppnet.paths import fitting_name

T = TypeVar("T")
Boxes = NDArray[np.floating]


@dataclass(frozen=True)
class Annotation:
    """The objects of one image: boxes float32 (R, 4) xyxy half-open, one class name and flag each."""

    boxes: NDArray[np.float32]
    names: tuple[str, ...]
    difficult: NDArray[np.bool_]

    def of(self, names: tuple[str, ...] | frozenset[str]) -> Annotation:
        """Only the objects of these classes."""
        keep = np.array([name in names for name in self.names], dtype=bool)
        return self._take(keep)

    def easy(self) -> Annotation:
        """Only the objects not marked difficult."""
        return self._take(~self.difficult)

    def _take(self, keep: NDArray[np.bool_]) -> Annotation:
        kept = tuple(name for name, k in zip(self.names, keep, strict=True) if k)
        return Annotation(self.boxes[keep], kept, self.difficult[keep])


@dataclass(frozen=True)
class ImageRecord:
    """One image of a data set: where it lies, how large it is, what is in it (None = not annotated)."""

    id: str  # unique in the data set: "<year folder>/<stem>", e.g. "VOC2007/000005"
    path: Path
    size: tuple[int, int]  # (height, width) of the upright image, read from the file's header
    digest: str  # content of the image file: 16 hexadecimal digits of its SHA-256
    annotation: Annotation | None = None

    def path_in(self, folder: Path, flip: bool = False) -> Path:
        """Where what was computed for the image, or for its mirror image, lies; the name carries the content."""
        name = Path(self.id)
        return folder / name.parent / fitting_name(name.name, f"-{self.digest}{'-flip' if flip else ''}.npz")


@dataclass(frozen=True)
class Detections:
    """What was found in one image, best first: boxes (R, 4) float32, scores (R,), labels (R,) into classes."""

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.boxes)

    def above(self, threshold: float) -> Detections:
        keep = self.scores >= threshold
        return Detections(self.boxes[keep], self.scores[keep], self.labels[keep], self.classes)


@dataclass(frozen=True)
class SkipCounts:
    """Documented skips (zero-area boxes and the like), counted for the summary: reason -> occurrences."""

    counts: Mapping[str, int] = field(default_factory=dict)

    def plus(self, other: SkipCounts) -> SkipCounts:
        keys = dict.fromkeys([*self.counts, *other.counts])
        return SkipCounts({key: self.counts.get(key, 0) + other.counts.get(key, 0) for key in keys})


def spread(things: Sequence[T], count: int) -> list[T]:
    """At most `count` of the things, at even distances."""
    count = min(count, len(things))
    return [things[i * len(things) // count] for i in range(count)]


def as_boxes(boxes: ArrayLike, name: str = "boxes") -> NDArray[np.float64]:
    """Any (R, 4) array-like as float64; an empty sequence becomes (0, 4)."""
    array = np.asarray(boxes, dtype=np.float64)
    if array.size == 0:
        return array.reshape(0, 4)
    if array.ndim != 2 or array.shape[1] != 4:
        hint = f"; pass {name}[None] for one box" if array.shape == (4,) else ""
        raise ValueError(f"{name} must have shape (R, 4), got {array.shape}{hint}")
    return array


def areas(boxes: Boxes) -> NDArray[np.floating]:
    """(R, 4) -> (R,); boxes without extent have area 0."""
    sides = np.clip(boxes[:, 2:] - boxes[:, :2], 0, None)
    return sides[:, 0] * sides[:, 1]


def pairwise_iou(boxes: Boxes, others: Boxes) -> NDArray[np.floating]:
    """Intersection over union of every pair: (R, 4), (S, 4) -> (R, S); 0 where both areas are 0."""
    corner1 = np.maximum(boxes[:, None, :2], others[None, :, :2])
    corner2 = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    sides = np.clip(corner2 - corner1, 0, None)
    intersection = sides[..., 0] * sides[..., 1]
    union = areas(boxes)[:, None] + areas(others)[None, :] - intersection
    ratio = np.zeros(intersection.shape, np.result_type(intersection, np.float32))  # whole-pixel boxes come as integers
    return np.divide(intersection, union, out=ratio, where=union > 0)


def clip_boxes(boxes: Boxes, image_size: tuple[int, int]) -> Boxes:
    """Corners moved into the image of (height, width)."""
    height, width = image_size
    return np.clip(boxes, 0, np.array([width, height, width, height], dtype=boxes.dtype))


def flip_boxes(boxes: Boxes, width: float) -> Boxes:
    """The same boxes in the horizontally flipped image."""
    flipped = boxes.copy()
    flipped[:, 0] = width - boxes[:, 2]
    flipped[:, 2] = width - boxes[:, 0]
    return flipped
