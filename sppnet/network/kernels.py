"""The compiled CPU loops behind ``pool_windows``: one of three doors to numba, with ``detection.segmentation`` and
``detection.dual_descent``.

The map lies channels last, (H, W, C), so that the inner loop runs over the channels of a cell, which are
neighbours in memory, and becomes vector instructions. In ``pool_cells`` a window's bins go to a scratch buffer
(M, C) first and are transposed into the order of the pyramid vector from there; ``pool_bins`` writes them where
they are computed.

Bins are floor / ceil of exact fractions, so level n is the exact maximum over blocks of level m wherever n
divides m. Only levels that divide no other one read the map: (1, 2, 3, 6) is a single pass over a window.

Threads are plain Python threads around a loop that releases the interpreter lock: unlike numba's own
threading layers they survive fork and may be used from several threads at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

PARTS_PER_THREAD = 4  # windows differ in size: several parts per thread even out the work
WINDOWS_PER_PART = 32  # fewer than this are not worth a thread


def pool_cells(
    cells: NDArray[Any], windows: NDArray[np.int64], levels: Sequence[int], threads: int = 1
) -> NDArray[Any]:
    """Maximum of every bin of every window.

    cells: C-contiguous (H, W, C) map, float32 or float64, without NaN; windows: (R, 4) int64 xyxy cells, half-open,
    not empty and inside the map (not checked here). Returns (R, C · Σn²) in the order of the pyramid vector.
    """
    channels, count = cells.shape[2], len(windows)
    # np.empty asks the kernel for huge pages where the array is large; torch.empty does not, and faulting
    # 100 MB in by 4 KiB pages takes longer than the pooling itself
    pooled = np.empty((count, channels * sum(n * n for n in levels)), dtype=cells.dtype)
    plan = level_plan(levels)
    _in_parts(lambda start, stop: _pool_range(cells, windows, plan, pooled, start, stop), count, threads)
    return pooled


def pool_bins(cells: NDArray[Any], windows: NDArray[np.int64], levels: Sequence[int], threads: int = 1) -> NDArray[Any]:
    """The same maxima, bin after bin instead of channel after channel: (R, Σn², C), bins as `bin_order` says.

    `cells` as in `pool_cells`, or int16 codes of bfloat16 numbers (`bfloat16_codes`), which give int16 bit patterns of
    bfloat16. Nothing is transposed: a bin is written where it is computed.
    """
    pooled = np.empty((len(windows), sum(n * n for n in levels), cells.shape[2]), dtype=cells.dtype)
    plan = level_plan(levels)
    fill = _pool_codes_range if cells.dtype == np.int16 else _pool_bins_range
    _in_parts(lambda start, stop: fill(cells, windows, plan, pooled, start, stop), len(windows), threads)
    return pooled


def bin_order(levels: Sequence[int]) -> NDArray[np.int64]:
    """(Σn²,): which bin of the pyramid vector, counted over its levels, each bin of `pool_bins` is."""
    return np.concatenate([np.arange(first, first + n * n) for n, _, _, first in level_plan(levels)])


def bfloat16_codes(bits: NDArray[np.int16]) -> NDArray[np.int16]:
    """Bit patterns of bfloat16 numbers -> integers in the same order as the numbers; the function is its own inverse.

    A maximum of codes costs half the memory of one of float32, and is the code of the maximum. Rounding keeps order
    too, so the largest of rounded numbers is the largest number, rounded.
    """
    return bits ^ ((bits >> 15) & np.int16(0x7FFF))


def _in_parts(run: Callable[[int, int], None], count: int, threads: int) -> None:
    """Call run(start, stop) over `count` windows, in parts shared by the threads."""
    parts = max(1, min(threads * PARTS_PER_THREAD if threads > 1 else 1, count // WINDOWS_PER_PART))
    bounds = [count * part // parts for part in range(parts + 1)]
    if parts == 1:
        run(0, count)
        return
    with ThreadPoolExecutor(min(threads, parts)) as pool:
        list(pool.map(run, bounds[:-1], bounds[1:]))


def level_plan(levels: Sequence[int]) -> NDArray[np.int64]:
    """How to compute the levels, finest first: rows (n, parent, scratch row, first bin in the vector).

    `parent` is the plan row of the smallest level already computed that n divides; -1 reads the map itself.
    """
    firsts = np.cumsum([0, *(n * n for n in levels)])
    plan: list[tuple[int, int, int, int]] = []
    scratch_row = 0
    for k in sorted(range(len(levels)), key=lambda k: -levels[k]):
        n = levels[k]
        parents = [row for row, (m, *_) in enumerate(plan) if m % n == 0]
        plan.append((n, parents[-1] if parents else -1, scratch_row, int(firsts[k])))
        scratch_row += n * n
    return np.array(plan, dtype=np.int64)


def channels_last(feature_map: NDArray[Any]) -> NDArray[Any]:
    """(C, H, W) -> C-contiguous (H, W, C); a map that already lies so in memory is not copied."""
    cells = feature_map.transpose(1, 2, 0)
    if cells.flags.c_contiguous:
        return cells
    copied = np.empty(cells.shape, dtype=cells.dtype)
    channels = feature_map.shape[0]
    _transpose(np.ascontiguousarray(feature_map).reshape(channels, -1), copied.reshape(-1, channels))
    return copied


def has_nan(values: NDArray[Any]) -> bool:
    """Whether any value of an array is NaN, read once in memory order."""
    return bool(_count_nan(values.ravel(order="K")))


def _compiled(function: Callable[..., Any]) -> Any:
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache is writable: compile in every process
        return numba.njit(nogil=True)(function)


@_compiled
def _count_nan(values: Any) -> int:
    count = 0
    for k in range(values.shape[0]):
        count += values[k] != values[k]
    return count


@_compiled
def _larger(a: Any, b: Any) -> Any:
    return a if a > b else b  # compiles to one instruction per vector; np.maximum's care for NaN does not


@_compiled
def _max_of_cells(cells: Any, y1: int, y2: int, x1: int, x2: int, largest: Any) -> None:
    """Maximum over cells[y1:y2, x1:x2] per channel, four cells at a time.

    At an odd edge the last row or column stands in for its missing neighbour: it is read twice, which a maximum
    does not notice, and keeps this to one loop.
    """
    untouched = True
    for y in range(y1, y2, 2):
        upper, lower = cells[y], cells[min(y + 1, y2 - 1)]
        for x in range(x1, x2, 2):
            neighbour = min(x + 1, x2 - 1)
            a, b, c, d = upper[x], upper[neighbour], lower[x], lower[neighbour]
            if untouched:
                for k in range(largest.shape[0]):
                    largest[k] = _larger(_larger(a[k], b[k]), _larger(c[k], d[k]))
                untouched = False
            else:
                for k in range(largest.shape[0]):
                    largest[k] = _larger(largest[k], _larger(_larger(a[k], b[k]), _larger(c[k], d[k])))


@_compiled
def _pool_level(cells: Any, x1: int, y1: int, x2: int, y2: int, n: int, bins: Any) -> None:
    """The n × n bins of one window: bin i covers floor(i·h / n) … ceil((i + 1)·h / n) - 1 (app. A)."""
    height, width = y2 - y1, x2 - x1
    for i in range(n):
        top, bottom = y1 + i * height // n, y1 + ((i + 1) * height + n - 1) // n
        for j in range(n):
            left, right = x1 + j * width // n, x1 + ((j + 1) * width + n - 1) // n
            _max_of_cells(cells, top, bottom, left, right, bins[i * n + j])


@_compiled
def _transpose(rows: Any, columns: Any) -> None:
    """columns[j, i] = rows[i, j], in blocks that stay in the nearest cache."""
    block = 32
    for i0 in range(0, rows.shape[0], block):
        for j0 in range(0, rows.shape[1], block):
            for j in range(j0, min(j0 + block, rows.shape[1])):
                for i in range(i0, min(i0 + block, rows.shape[0])):
                    columns[j, i] = rows[i, j]


@_compiled
def _write_level(bins: Any, vector: Any) -> None:
    """(n², C) bins -> channel-major vector (C · n²)."""
    count, channels = bins.shape
    for channel in range(channels):
        for k in range(count):
            vector[channel * count + k] = bins[k, channel]


@_compiled
def _pool_range(cells: Any, windows: Any, plan: Any, pooled: Any, start: int, stop: int) -> None:
    channels = cells.shape[2]
    scratch = np.empty((pooled.shape[1] // channels, channels), cells.dtype)
    for r in range(start, stop):
        x1, y1, x2, y2 = windows[r]
        for level in range(plan.shape[0]):
            n, parent, row, first = plan[level]
            bins = scratch[row : row + n * n]
            if parent < 0:
                _pool_level(cells, x1, y1, x2, y2, n, bins)
            else:
                m, parent_row = plan[parent, 0], plan[parent, 2]
                finer = scratch[parent_row : parent_row + m * m].reshape(m, m, channels)
                _pool_level(finer, 0, 0, m, m, n, bins)
            _write_level(bins, pooled[r, first * channels : (first + n * n) * channels])


@_compiled
def _pool_bins_of(cells: Any, window: Any, plan: Any, pooled: Any) -> None:
    channels = cells.shape[2]
    for level in range(plan.shape[0]):
        n, parent, row, _ = plan[level]
        bins = pooled[row : row + n * n]
        if parent < 0:
            _pool_level(cells, window[0], window[1], window[2], window[3], n, bins)
        else:
            m, parent_row = plan[parent, 0], plan[parent, 2]
            finer = pooled[parent_row : parent_row + m * m].reshape(m, m, channels)
            _pool_level(finer, 0, 0, m, m, n, bins)


@_compiled
def _pool_bins_range(cells: Any, windows: Any, plan: Any, pooled: Any, start: int, stop: int) -> None:
    for r in range(start, stop):
        _pool_bins_of(cells, windows[r], plan, pooled[r])


@_compiled
def _pool_codes_range(codes: Any, windows: Any, plan: Any, pooled: Any, start: int, stop: int) -> None:
    for r in range(start, stop):
        _pool_bins_of(codes, windows[r], plan, pooled[r])
        _decode(pooled[r].reshape(-1))


@_compiled
def _decode(codes: Any) -> None:
    """`bfloat16_codes` in place: a code below zero has all bits but the sign turned over."""
    for k in range(codes.shape[0]):
        code = codes[k]
        codes[k] = code if code >= 0 else code ^ 0x7FFF
