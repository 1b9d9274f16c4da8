"""Which classes the images of VOC's year folders show: its classification task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sppnet.data.layouts import find_data, find_years
from sppnet.data.selection import choose_classes, shown_classes
from sppnet.data.splits import find_part, load_splits


@dataclass(frozen=True, eq=False)
class Presence:
    """Images (N) and what they show (N, C) int8: 1 the class, -1 not, 0 difficult objects of it alone."""

    images: tuple[Path, ...]
    classes: tuple[str, ...]
    shown: NDArray[np.int8]
    train: int  # the first so many are of the training splits
    skips: tuple[str, ...]  # what was left out, a line each


def is_voc(root: Path) -> bool:
    """Whether a folder has VOC's image sets: those of year folders, or of its own."""
    return (root / "ImageSets").is_dir() or find_years(root) is not None


def read_presence(
    root: Path, train: Sequence[str], test: Sequence[str], classes: Sequence[str] | None = None
) -> Presence:
    """The images of the training splits, then of the test splits; `classes` None = those of the training annotations.

    SppnetError for what `load_splits` refuses, an image that is in two splits among it, and for classes not found.
    """
    folder = find_data(root)
    records, skips = load_splits(folder, [*train, *test])
    count = sum(len(find_part(folder, split).images) for split in train)
    names = choose_classes(records[:count], None if classes is None else tuple(classes))
    shown = np.full((len(records), len(names)), -1, np.int8)
    for row, record in zip(shown, records, strict=True):
        row[np.isin(names, [*shown_classes(record)])] = 0
        row[np.isin(names, [*shown_classes(record, False)])] = 1
    return Presence(tuple(r.path for r in records), names, shown, count, tuple(skips.lines()))
