"""Which cell of a window is the largest of each bin, on a CPU: the compiled loop behind derivatives of windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._pool_cpu import compiled, in_parts


def argmax_cells(
    maps: NDArray[Any], rows: NDArray[np.int64], levels: Sequence[int], threads: int = 1
) -> NDArray[np.int64]:
    """Where the largest cell of every bin of every window lies.

    maps: (N, C, H, W), float32 or float64; rows: (K, 5), the index of a map and a window as in `pool_cells`. Returns
    (K, C · Σn²) indices into the flattened maps (N, C, H, W): of the first of equal cells, and of the last NaN if there
    is one, as torch's adaptive pooling does.
    """
    index = np.empty((len(rows), maps.shape[1] * sum(n * n for n in levels)), np.int64)
    last, sides = np.ascontiguousarray(maps.transpose(0, 2, 3, 1)), np.array(levels, np.int64)
    in_parts(lambda a, b: _argmax(last, rows, sides, index, a, b), len(rows), threads, 1)
    return index


@compiled
def _argmax(maps: Any, rows: Any, levels: Any, index: Any, start: int, stop: int) -> None:
    _, height, width, channels = maps.shape
    largest, place = np.empty(channels, maps.dtype), np.empty(channels, np.int64)
    for r in range(start, stop):
        image, x, y, w, h = rows[r, 0], rows[r, 1], rows[r, 2], rows[r, 3] - rows[r, 1], rows[r, 4] - rows[r, 2]
        column = 0
        for n in levels:
            for b in range(n * n):
                i, j = b // n, b % n
                y1, x1 = y + i * h // n, x + j * w // n
                for c in range(channels):
                    largest[c], place[c] = maps[image, y1, x1, c], y1 * width + x1
                for v in range(y1, y - (-(i + 1) * h // n)):
                    for u in range(x1, x - (-(j + 1) * w // n)):
                        for c in range(channels):
                            value = maps[image, v, u, c]
                            larger = (value > largest[c]) | (value != value)
                            largest[c] = value if larger else largest[c]
                            place[c] = v * width + u if larger else place[c]
                for c in range(channels):
                    index[r, column + c * n * n + b] = (image * channels + c) * height * width + place[c]
            column += channels * n * n
