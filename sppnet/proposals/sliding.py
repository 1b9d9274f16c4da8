"""Sliding windows: rectangles of a few shapes at even distances, for what a search misses (ours).

Pooling a window costs little once there is a map, so that of these there may be as many as of the search. They need not
fit: boxes are regressed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Shapes = Sequence[tuple[float, float]]

DENSEST = 0.3  # least distance of neighbours / their sides: the nearest has an IoU of 0.56 or more with its like


def sliding_windows(size: tuple[int, int], shapes: Shapes, limit: int) -> NDArray[np.float32]:
    """Windows (R, 4) float32 xyxy in an image of `size` (height, width), R at most `limit`, or four of each shape.

    A shape is a width and a height as shares of the image's shorter side. Neighbours are the same share of their sides
    apart whatever the shape: 0.3, or more where that gives more than `limit` windows. The first and the last of a
    row or a column touch the border.
    """
    height, width = size
    sides = np.minimum(np.array(shapes, float).reshape(-1, 2) * min(size), (width, height))
    step = DENSEST
    while _counts(sides, size, step).prod(axis=1).sum() > limit and step < max(size):
        step *= 1.05
    rows = [np.zeros((0, 4))]
    for (across, down), (columns, lines) in zip(sides, _counts(sides, size, step), strict=True):
        x, y = np.meshgrid(np.linspace(0, width - across, columns), np.linspace(0, height - down, lines))
        rows.append(np.stack([x, y, x + across, y + down], axis=-1).reshape(-1, 4))
    return np.concatenate(rows).astype(np.float32)


def _counts(sides: NDArray[np.floating], size: tuple[int, int], step: float) -> NDArray[np.int64]:
    """Columns and rows (S, 2) of windows of these sides (S, 2), neighbours at most `step` of a side apart."""
    return 1 + np.ceil((np.array(size[::-1]) - sides) / (step * sides)).astype(np.int64)
