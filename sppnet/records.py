"""The named values that travel between the steps of the pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")


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
