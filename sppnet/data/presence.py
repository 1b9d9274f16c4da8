"""Which classes the images of VOC's year folders show: its classification task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sppnet.data.selection import choose_classes, shown_classes
from sppnet.data.splits import load_splits


@dataclass(frozen=True, eq=False)
class Presence:
    """Images (N) and what they show (N, C) int8: 1 the class, -1 not, 0 difficult objects of it alone."""

    images: tuple[Path, ...]
    classes: tuple[str, ...]
    shown: NDArray[np.int8]
    train: int  # the first so many are of the training splits
    skips: tuple[str, ...]  # what was left out, a line each


def is_voc(root: Path) -> bool:
    """Whether a folder looks like VOC's: year folders with image sets, or a folder beside or above them."""
    return any(next(root.glob(f"{above}ImageSets"), None) is not None for above in ("", "*/", "*/*/"))


def read_presence(
    root: Path, train: Sequence[str], test: Sequence[str], classes: Sequence[str] | None = None
) -> Presence:
    """The images of the training splits, then of the test splits; `classes` None = those of the training annotations.

    SppnetError for what `load_splits` refuses, an image that is in two splits among it, and for classes not found.
    """
    records, skips = load_splits(root, [*train, *test])
    count = len(load_splits(root, train)[0]) if test else len(records)
    names = choose_classes(records[:count], None if classes is None else tuple(classes))
    shown = np.full((len(records), len(names)), -1, np.int8)
    for row, record in zip(shown, records, strict=True):
        row[np.isin(names, [*shown_classes(record)])] = 0
        row[np.isin(names, [*shown_classes(record, False)])] = 1
    return Presence(tuple(r.path for r in records), names, shown, count, tuple(skips.lines()))
