"""The compiled CPU loops behind ``pool_windows``.

The map lies channels last, (H, W, C), so that the inner loop runs over the channels of a cell, which are
neighbours in memory, and becomes vector instructions. In ``pool_cells`` a window's bins go to a scratch buffer
(M, C) first and are transposed into the order of the pyramid vector from there; ``pool_bins`` writes them where
they are computed. What remains is the time of writing the result (``ResultMemory``, ``vectors``).

Bins are floor / ceil of exact fractions, so level n is the exact maximum over blocks of level m wherever n
divides m. Only levels that divide no other one read the map: (1, 2, 3, 6) is a single pass over a window.

Thousands of windows read every cell hundreds of times. So the maxima of all squares of 2, 4 and 8 cells a side are
computed first (a sparse table), and a bin is covered by the largest squares that fit into it, overlapping where they
must: a maximum does not notice. A bin of 5 × 7 cells takes 4 reads instead of 35.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from sppnet.compiling import compiled, in_parts
from sppnet.network.vectors import EIGHT, LINE, store_line, stores_done, transpose_eight

SIDES = 3  # squares of 2, 4 and 8 cells; the bins of few windows are larger
READS_PER_SQUARE = 4  # that many reads of cells saved pay for the maximum of a square
BEYOND_CACHES = 2**25  # bytes of a result that no cache holds until it is read
WINDOWS_PER_PART = 32  # fewer than this are not worth a thread


class ResultMemory:
    """Memory for large results, that of an earlier result once nobody holds it any longer.

    Filling 100 MB that are fresh from the system takes twice as long as filling 100 MB that were used before, and far
    longer where memory is in pieces. One block stays, of at most `largest` bytes.
    """

    def __init__(self, smallest: int = 2**20, largest: int = 2**28) -> None:
        self.smallest, self.largest = smallest, largest
        self._lock = threading.Lock()
        self._block = np.empty(0, np.uint8)
        self._free = sys.getrefcount(self._block)  # every array on the block, and every view of one, adds to it

    def array(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """As np.empty; from `smallest` bytes on the array starts on a cache line."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if not self.smallest <= size <= self.largest:
            return np.empty(shape, dtype)
        with self._lock:
            # Not a much larger block: whoever keeps a small result would keep all of it.
            whole = size + LINE
            if not whole <= self._block.nbytes <= 2 * whole or sys.getrefcount(self._block) > self._free:
                self._block = np.empty(whole, np.uint8)  # huge pages where they are to be had, unlike torch.empty
            first = -self._block.ctypes.data % LINE
            return self._block[first : first + size].view(dtype).reshape(shape)


result_memory = ResultMemory()


def pool_cells(
    cells: NDArray[Any], windows: NDArray[np.int64], levels: Sequence[int], threads: int = 1
) -> NDArray[Any]:
    """Maximum of every bin of every window.

    cells: C-contiguous (H, W, C) map, float32 or float64, without NaN; windows: (R, 4) int64 xyxy cells, half-open,
    not empty and inside the map (not checked here). Returns (R, C · Σn²) in the order of the pyramid vector.
    """
    channels, count = cells.shape[2], len(windows)
    pooled = result_memory.array((count, channels * sum(n * n for n in levels)), cells.dtype)
    plan, squares = level_plan(levels), _squares(cells, windows, threads)
    in_parts(lambda a, b: _pool_range(squares, windows, plan, pooled, a, b), count, threads, WINDOWS_PER_PART)
    return pooled


def pool_bins(cells: NDArray[Any], windows: NDArray[np.int64], levels: Sequence[int], threads: int = 1) -> NDArray[Any]:
    """The same maxima, bin after bin instead of channel after channel: (R, Σn², C), bins as `bin_order` says.

    `cells` as in `pool_cells`, or int16 codes of bfloat16 numbers (`bfloat16_codes`), which give int16 bit patterns of
    bfloat16. Nothing is transposed: a bin is written where it is computed.
    """
    pooled = result_memory.array((len(windows), sum(n * n for n in levels), cells.shape[2]), cells.dtype)
    plan, squares = level_plan(levels), _squares(cells, windows, threads)
    fill = _pool_codes_range if cells.dtype == np.int16 else _pool_bins_range
    in_parts(lambda a, b: fill(squares, windows, plan, pooled, a, b), len(windows), threads, WINDOWS_PER_PART)
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


def _squares(cells: NDArray[Any], windows: NDArray[np.int64], threads: int) -> NDArray[Any]:
    """(K + 1, H, W, C): the map, then at [k, y, x] the maximum of the 2ᵏ × 2ᵏ cells from (y, x) on, where they fit.

    What lies nearer to the edge is not filled in. K = 0 where the windows read too little for more to pay.
    """
    height, width, channels = cells.shape
    reads = int(((windows[:, 2] - windows[:, 0]) * (windows[:, 3] - windows[:, 1])).sum())
    sides = min(SIDES, min(height, width).bit_length() - 1)
    if sides == 0 or reads < READS_PER_SQUARE * sides * height * width:
        return cells[None]
    squares = np.empty((sides + 1, height, width, channels), cells.dtype)
    squares[0] = cells
    for k in range(1, sides + 1):
        rows = height - (1 << k) + 1
        in_parts(lambda a, b, k=k: _double(squares, k, a, b), rows, threads, WINDOWS_PER_PART)  # type: ignore[misc]
    return squares


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


@compiled()
def _count_nan(values: Any) -> int:
    count = 0
    for k in range(values.shape[0]):
        count += values[k] != values[k]
    return count


@compiled()
def _larger(a: Any, b: Any) -> Any:
    return a if a > b else b  # compiles to one instruction per vector; np.maximum's care for NaN does not


@compiled()
def _double(squares: Any, k: int, start: int, stop: int) -> None:
    """Rows of the maxima of squares of 2ᵏ cells a side, each from four of half the side."""
    half = 1 << (k - 1)
    finer, coarser = squares[k - 1], squares[k]
    for y in range(start, stop):
        for x in range(coarser.shape[1] - 2 * half + 1):
            a, b, c, d = finer[y, x], finer[y, x + half], finer[y + half, x], finer[y + half, x + half]
            largest = coarser[y, x]
            for i in range(largest.shape[0]):
                largest[i] = _larger(_larger(a[i], b[i]), _larger(c[i], d[i]))


@compiled()
def _max_of_cells(squares: Any, y1: int, y2: int, x1: int, x2: int, largest: Any) -> None:
    """Maximum over the cells y1 … y2 - 1, x1 … x2 - 1 per channel, from the largest squares that fit, four at a time.

    At the far edges the last square that fits stands in for one that does not: cells are read twice there, which a
    maximum does not notice, and this stays one loop.
    """
    k, side = 0, 1
    while k + 1 < squares.shape[0] and 2 * side <= min(y2 - y1, x2 - x1):
        k, side = k + 1, 2 * side
    cells, last_y, last_x = squares[k], y2 - side, x2 - side
    if (y1 == last_y and x1 + side >= last_x) or (x1 == last_x and y1 + side >= last_y):  # one square, or two
        first, last = cells[y1, x1], cells[last_y, last_x]
        for i in range(largest.shape[0]):
            largest[i] = _larger(first[i], last[i])
        return
    untouched = True
    for y in range(y1, y2, 2 * side):
        upper, lower = cells[min(y, last_y)], cells[min(y + side, last_y)]
        for x in range(x1, x2, 2 * side):
            left, right = min(x, last_x), min(x + side, last_x)
            a, b, c, d = upper[left], upper[right], lower[left], lower[right]
            if untouched:
                for i in range(largest.shape[0]):
                    largest[i] = _larger(_larger(a[i], b[i]), _larger(c[i], d[i]))
                untouched = False
            else:
                for i in range(largest.shape[0]):
                    largest[i] = _larger(largest[i], _larger(_larger(a[i], b[i]), _larger(c[i], d[i])))


@compiled()
def _pool_level(squares: Any, x1: int, y1: int, x2: int, y2: int, n: int, bins: Any) -> None:
    """The n × n bins of one window: bin i covers floor(i·h / n) … ceil((i + 1)·h / n) - 1 (app. A)."""
    height, width = y2 - y1, x2 - x1
    for i in range(n):
        top, bottom = y1 + i * height // n, y1 + ((i + 1) * height + n - 1) // n
        for j in range(n):
            left, right = x1 + j * width // n, x1 + ((j + 1) * width + n - 1) // n
            _max_of_cells(squares, top, bottom, left, right, bins[i * n + j])


@compiled()
def _transpose(rows: Any, columns: Any) -> None:
    """columns[j, i] = rows[i, j] of C-contiguous arrays; at the far edges the last eight are written twice."""
    count, width = rows.shape
    size = rows.itemsize
    if size != 4 or count < EIGHT or width < EIGHT:
        for j in range(width):
            for i in range(count):
                columns[j, i] = rows[i, j]
        return
    source, target = rows.ctypes.data, columns.ctypes.data
    for j in range(0, width, EIGHT):
        j = min(j, width - EIGHT)
        for i in range(0, count, EIGHT):
            i = min(i, count - EIGHT)
            first, into = source + size * (i * width + j), target + size * (j * count + i)
            transpose_eight(first, size * width, into, size * count)  # type: ignore[call-arg]


@compiled()
def _copy_past_caches(vector: Any, target: Any) -> None:
    source, start = vector.ctypes.data, target.ctypes.data
    for k in range(0, vector.nbytes, LINE):
        store_line(source + k, start + k)  # type: ignore[call-arg]


@compiled()
def _pool_window(squares: Any, window: Any, plan: Any, pooled: Any) -> None:
    """All bins of one window, in the order of the plan: (M, C)."""
    channels = squares.shape[3]
    for level in range(plan.shape[0]):
        n, parent, row, _ = plan[level]
        bins = pooled[row : row + n * n]
        if parent < 0:
            _pool_level(squares, window[0], window[1], window[2], window[3], n, bins)
        else:
            m, parent_row = plan[parent, 0], plan[parent, 2]
            finer = pooled[parent_row : parent_row + m * m].reshape(1, m, m, channels)
            _pool_level(finer, 0, 0, m, m, n, bins)


@compiled()
def _pool_range(squares: Any, windows: Any, plan: Any, pooled: Any, start: int, stop: int) -> None:
    """Bins go to a scratch buffer and from there, transposed, to the result: a large one past the caches."""
    channels, width = squares.shape[3], pooled.shape[1]
    scratch, vector = np.empty((width // channels, channels), squares.dtype), np.empty(width, squares.dtype)
    whole_lines = pooled.ctypes.data % LINE == 0 and vector.nbytes % LINE == 0
    past_caches = whole_lines and pooled.shape[0] * vector.nbytes >= BEYOND_CACHES
    for r in range(start, stop):
        _pool_window(squares, windows[r], plan, scratch)
        target = vector if past_caches else pooled[r]
        for level in range(plan.shape[0]):
            n, _, row, first = plan[level]
            level_of_vector = target[first * channels : (first + n * n) * channels].reshape(channels, n * n)
            _transpose(scratch[row : row + n * n], level_of_vector)
        if past_caches:
            _copy_past_caches(vector, pooled[r])
    if past_caches:
        stores_done()  # type: ignore[call-arg]


@compiled()
def _pool_bins_range(squares: Any, windows: Any, plan: Any, pooled: Any, start: int, stop: int) -> None:
    for r in range(start, stop):
        _pool_window(squares, windows[r], plan, pooled[r])


@compiled()
def _pool_codes_range(squares: Any, windows: Any, plan: Any, pooled: Any, start: int, stop: int) -> None:
    for r in range(start, stop):
        _pool_window(squares, windows[r], plan, pooled[r])
        _decode(pooled[r].reshape(-1))


@compiled()
def _decode(codes: Any) -> None:
    """`bfloat16_codes` in place: a code below zero has all bits but the sign turned over."""
    for k in range(codes.shape[0]):
        code = codes[k]
        codes[k] = code if code >= 0 else code ^ 0x7FFF
