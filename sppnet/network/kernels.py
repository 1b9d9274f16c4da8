"""The compiled CPU loops behind ``pool_windows``.

Thousands of windows read every cell hundreds of times. So the maxima of all squares of 2, 4 and 8 cells a side are
computed first (a sparse table), and a bin is the largest of the few squares that cover it (`bins`): of proposals on the
map of a photograph two on average. Which these are is worked out once for all channels, and windows on the same cells
are computed once.

Channels are split into blocks, so that the bins of a window stay near until they are written. A block
lies channels last, so that a maximum is one of vectors; in ``pool_cells`` its bins are transposed into the order of the
pyramid vector on their way to the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sppnet.compiling import compiled, in_parts
from sppnet.network.bins import level_plan, reads_of_bins, reads_of_windows
from sppnet.network.memory import ReusedMemory
from sppnet.network.vectors import (
    EIGHT,
    LINE,
    WIDE,
    copy_bytes,
    larger_of_four,
    largest_of_four,
    store_line,
    stores_done,
    transpose_eight,
)

SIDES = 3  # squares of 2, 4 and 8 cells; the bins of few windows are larger
READS_PER_SQUARE = 4  # that many reads of cells saved pay for the maximum of a square
BLOCK = (
    4 * WIDE
)  # bytes of a bin's channels in a block: the bins of (1, 2, 3, 6) then take 25 kB (measured: not 13 or 50)
TABLE_BYTES = 2**28  # more squares than that are not made
BEYOND_CACHES = 2**25  # bytes of a result that no cache holds until it is read
WINDOWS_PER_PART = 32  # fewer than this are not worth a thread
BINS_AT_ONCE = 10_000  # whose reads are worked out together

result_memory = ReusedMemory()
table_memory = ReusedMemory(largest=2**26)


def pool_cells(
    feature_map: NDArray[Any], windows: NDArray[np.int64], levels: Sequence[int], threads: int = 1
) -> NDArray[Any]:
    """Maximum of every bin of every window.

    feature_map: (C, H, W), float32 or float64, without NaN, fastest where it is contiguous in this order or channels
    last; windows: (R, 4) int64 xyxy cells, half-open, not empty and inside the map (not checked here). Returns
    (R, C · Σn²) in the order of the pyramid vector.
    """
    bins = sum(n * n for n in levels)
    pooled = result_memory.array((len(windows), len(feature_map) * bins), feature_map.dtype)
    _pool(feature_map, windows, level_plan(levels), pooled, threads, by_bin=False)
    return pooled


def pool_bins(
    feature_map: NDArray[Any], windows: NDArray[np.int64], levels: Sequence[int], threads: int = 1
) -> NDArray[Any]:
    """The same maxima, bin after bin instead of channel after channel: (R, Σn², C), bins as `bin_order` says.

    `feature_map` as in `pool_cells`, or int16 codes of bfloat16 numbers (`bfloat16_codes`), which give int16 bit
    patterns of bfloat16. Nothing is transposed.
    """
    bins = sum(n * n for n in levels)
    pooled = result_memory.array((len(windows), bins * len(feature_map)), feature_map.dtype)
    _pool(feature_map, windows, level_plan(levels), pooled, threads, by_bin=True)
    return pooled.reshape(len(windows), bins, len(feature_map))


def bfloat16_codes(bits: NDArray[np.int16]) -> NDArray[np.int16]:
    """Bit patterns of bfloat16 numbers -> integers in the same order as the numbers; the function is its own inverse.

    A maximum of codes costs half the memory of one of float32, and is the code of the maximum. Rounding keeps order
    too, so the largest of rounded numbers is the largest number, rounded.
    """
    return bits ^ ((bits >> 15) & np.int16(0x7FFF))


def has_nan(values: NDArray[Any]) -> bool:
    """Whether any value of an array is NaN, read once in memory order."""
    return bool(_count_nan(values.ravel(order="K")))


def _pool(
    feature_map: NDArray[Any],
    windows: NDArray[np.int64],
    plan: NDArray[np.int64],
    pooled: NDArray[Any],
    threads: int,
    by_bin: bool,
) -> None:
    different, rows = _same_cells(windows, feature_map.shape[1:])
    table = _squares(feature_map, different, plan, threads)
    finer = reads_of_bins(tuple(map(tuple, plan.tolist())), table.shape[-1] * table.itemsize)
    lines = len(feature_map) * pooled.itemsize % LINE == 0 and pooled.ctypes.data % LINE == 0
    past_caches = lines and pooled.nbytes >= BEYOND_CACHES
    in_parts(
        lambda a, b: _pool_range(table, different, rows, plan, finer, pooled, by_bin, past_caches, a, b),
        len(different),
        threads,
        WINDOWS_PER_PART,
    )


def _same_cells(
    windows: NDArray[np.int64], shape: tuple[int, ...]
) -> tuple[NDArray[np.int64], tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """(R, 4) on a map of `shape` -> (U, 4) different windows, from top to bottom, and the rows that have them.

    Window u has the rows order[begins[u]:begins[u + 1]] of (begins, order).
    """
    height, width = shape
    x1, y1, x2, y2 = windows.T
    key = np.ravel_multi_index((y1, x1, y2, x2), (height, width, height + 1, width + 1))
    order = np.argsort(key, kind="stable")
    begins = np.flatnonzero(np.diff(key[order], prepend=-1))
    return windows[order[begins]], (np.append(begins, len(order)), order)


def _lanes(channels: int, itemsize: int) -> int:
    """Channels of a block: of quarters of `BLOCK` those that leave least empty, then the most."""
    least = WIDE // itemsize
    return min(range(least, BLOCK // itemsize + 1, least), key=lambda lanes: (-(-channels // lanes) * lanes, -lanes))


def _sides(windows: NDArray[np.int64], plan: NDArray[np.int64], height: int, width: int) -> int:
    """How many sizes of squares, of 2, 4 and 8 cells a side, save these windows more reads than they cost."""
    cost, most = READS_PER_SQUARE * height * width, min(SIDES, min(height, width).bit_length() - 1)
    reads, sizes = np.zeros(most + 1), windows[:, 2:] - windows[:, :2]
    for n in plan[plan[:, 1] < 0, 0]:
        bins = -(-sizes // n)  # the largest of a window
        if n * n * bins.prod(axis=1).sum() < cost:
            continue  # too few in all
        fit = np.frexp(bins.min(axis=1))[1] - 1  # squares of at most 2 ** fit cells a side
        for k in range(most + 1):
            reads[k] += n * n * (-(-bins // (1 << np.minimum(fit, k)[:, None]))).prod(axis=1).sum()
    return int(np.append(reads[:-1] - reads[1:] >= cost, False).argmin())


def _squares(
    feature_map: NDArray[Any], windows: NDArray[np.int64], plan: NDArray[np.int64], threads: int
) -> NDArray[Any]:
    """(B, K + 1, H, W, L): the map in blocks of L channels, and the maxima of the 2ᵏ × 2ᵏ cells from (y, x) on.

    What lies nearer to the edge than 2ᵏ cells is not filled in, nor are the channels of the last block that the map
    does not have. K is what pays for these windows (`_sides`) and is not too large; where that is nothing a map that
    lies channels last is not copied.
    """
    channels, height, width = feature_map.shape
    sides = _sides(windows, plan, height, width)
    if not feature_map.flags.c_contiguous:
        feature_map = np.ascontiguousarray(feature_map.transpose(1, 2, 0)).transpose(2, 0, 1)
        if sides == 0 and channels * feature_map.itemsize % WIDE == 0:
            return feature_map.transpose(1, 2, 0)[None, None]
    lanes = _lanes(channels, feature_map.itemsize)
    blocks = -(-channels // lanes)
    if (sides + 1) * blocks * lanes * height * width * feature_map.itemsize > TABLE_BYTES:
        sides = 0
    table = table_memory.array((blocks, sides + 1, height, width, lanes), feature_map.dtype)
    fill = _fill_from_first if feature_map.flags.c_contiguous else _fill_from_last
    in_parts(lambda a, b: fill(feature_map, table, a, b), blocks, threads, 1)
    return table


@compiled()
def _count_nan(values: Any) -> int:
    count = 0
    for k in range(values.shape[0]):
        count += values[k] != values[k]
    return count


@compiled()
def _fill_from_last(feature_map: Any, table: Any, start: int, stop: int) -> None:
    """Blocks `start` … of the table from a map that lies channels last."""
    channels, height, width = feature_map.shape
    size, lanes = table.itemsize, table.shape[4]
    source, target = feature_map.ctypes.data, table.ctypes.data
    for block in range(start, stop):
        own = min(lanes, channels - block * lanes)
        first = target + block * table[0].nbytes
        for cell in range(height * width):
            place = source + (cell * channels + block * lanes) * size
            copy_bytes(place, first + cell * lanes * size, own * size)  # type: ignore[call-arg]
        _double(table[block])


@compiled()
def _fill_from_first(feature_map: Any, table: Any, start: int, stop: int) -> None:
    """Blocks `start` … of the table from a map that lies channel after channel."""
    lanes, cells = table.shape[4], table.shape[2] * table.shape[3]
    rows = feature_map.reshape(feature_map.shape[0], cells)
    for block in range(start, stop):
        own = rows[block * lanes : (block + 1) * lanes]
        _transpose(own, table[block, 0].reshape(cells, lanes)[:, : len(own)], False)
        _double(table[block])


@compiled()
def _double(squares: Any) -> None:
    """The maxima of squares of 2ᵏ cells a side, each from four of half the side."""
    sides, height, width, lanes = squares.shape
    step, element, first = lanes * squares.itemsize, squares[0, 0, 0, 0], squares.ctypes.data
    for k in range(1, sides):
        half = 1 << (k - 1)
        places = step * np.array([0, half, half * width, half * width + half])
        for y in range(height - 2 * half + 1):
            source = first + ((k - 1) * height + y) * width * step
            target = source + height * width * step
            for lane in range(0, step * (width - 2 * half + 1), WIDE):
                largest_of_four(element, source + lane, places.ctypes.data, target + lane)


@compiled()
def _transpose(rows: Any, columns: Any, slack: bool) -> None:
    """columns[j, i] = rows[i, j], of arrays with contiguous rows; at the far edges the last eight are written twice.

    `slack`: behind the last of fewer than eight rows there is memory that may be read, and behind the last column
    memory that may be written, to the width of eight.
    """
    count, width = rows.shape
    if rows.itemsize != 4 or width < EIGHT or (count < EIGHT and not slack):
        for j in range(width):
            for i in range(count):
                columns[j, i] = rows[i, j]
        return
    source, source_step = rows.ctypes.data, rows.strides[0]
    target, target_step = columns.ctypes.data, columns.strides[0]
    for j in range(0, width, EIGHT):
        j = min(j, width - EIGHT)
        for i in range(0, count, EIGHT):
            i = max(0, min(i, count - EIGHT))  # what fewer than eight write too far, the next column overwrites
            first, into = source + i * source_step + 4 * j, target + j * target_step + 4 * i
            transpose_eight(first, source_step, into, target_step)  # type: ignore[call-arg]


@compiled()
def _maxima(element: Any, base: int, firsts: Any, groups: Any, first: int, count: int, target: int, step: int) -> None:
    """`count` bins of `step` bytes each, one after the other from the address `target` on."""
    places = groups.ctypes.data
    for current in range(first, first + count):
        start, stop = firsts[current], firsts[current + 1]
        for lane in range(0, step, WIDE):
            largest_of_four(element, base + lane, places + 32 * start, target + lane)
        for group in range(start + 1, stop):
            for lane in range(0, step, WIDE):
                larger_of_four(element, base + lane, places + 32 * group, target + lane)
        target += step


@compiled()
def _write(source: int, target: int, size: int, past_caches: bool) -> None:
    """Copy bytes from address to address, which with `past_caches` are whole cache lines that lie on such."""
    if not past_caches:
        copy_bytes(source, target, size)  # type: ignore[call-arg]
        return
    for k in range(0, size, LINE):
        store_line(source + k, target + k)  # type: ignore[call-arg]


@compiled()
def _decode(codes: Any) -> None:
    """`bfloat16_codes` in place."""
    for k in range(codes.shape[0]):
        codes[k] ^= (codes[k] >> 15) & 0x7FFF


@compiled()
def _pool_range(
    table: Any,
    windows: Any,
    rows: Any,
    plan: Any,
    finer: Any,
    pooled: Any,
    by_bin: bool,
    past_caches: bool,
    start: int,
    stop: int,
) -> None:
    """The windows `start` … of `_same_cells` into their rows of the result (R, C · Σn²)."""
    blocks, squares, height, width, lanes = table.shape
    size, (begins, order), (finer_firsts, finer_groups) = table.itemsize, rows, finer
    step, bins, inner = lanes * size, plan[-1, 2] + plan[-1, 0] ** 2, len(finer_firsts) - 1
    roots, channels = bins - inner, pooled.shape[1] // bins
    scratch = np.zeros((bins + EIGHT, lanes), table.dtype)
    vector = np.zeros((bins + plan.shape[0]) * lanes, table.dtype)
    # By address, and plan[level, k]: threads that count references of the same arrays wait for each other.
    table_at, scratch_at, vector_at, pooled_at = _address(table), _address(scratch), _address(vector), _address(pooled)
    element = table[0, 0, 0, 0, 0]
    at_once = max(1, BINS_AT_ONCE // roots)
    for chunk in range(start, stop, at_once):
        some = windows[chunk : min(chunk + at_once, stop)]
        firsts, groups = reads_of_windows(some, plan, squares, height, width, step)
        for k in range(len(some)):
            for block in range(blocks):
                block_at = table_at + block * squares * height * width * step
                _maxima(element, block_at, firsts, groups, k * roots, roots, scratch_at, step)
                _maxima(element, scratch_at, finer_firsts, finer_groups, 0, inner, scratch_at + roots * step, step)
                if not by_bin:
                    _turn(scratch, plan, vector)
                elif size == 2:
                    _decode(scratch.reshape(-1).view(np.int16))
                first_channel = block * lanes
                own = min(lanes, channels - first_channel)
                for at in range(begins[chunk + k], begins[chunk + k + 1]):
                    row_at = pooled_at + order[at] * bins * channels * size
                    if by_bin:
                        for current in range(bins):
                            target = row_at + (current * channels + first_channel) * size
                            _write(scratch_at + current * step, target, own * size, past_caches)
                    else:
                        for level in range(plan.shape[0]):
                            n, first, first_bin = plan[level, 0], plan[level, 2], plan[level, 3]
                            target = row_at + (first_bin * channels + first_channel * n * n) * size
                            _write(vector_at + (first + level) * step, target, own * n * n * size, past_caches)
    if past_caches:
        stores_done()  # type: ignore[call-arg]


@compiled()
def _address(values: Any) -> int:
    return values.ctypes.data


@compiled()
def _turn(scratch: Any, plan: Any, vector: Any) -> None:
    """The bins of a block, level after level, and in a level channel after channel; `_transpose` has room between."""
    lanes = scratch.shape[1]
    for level in range(plan.shape[0]):
        n, first = plan[level, 0], plan[level, 2]
        into = vector[(first + level) * lanes : (first + n * n + level) * lanes]
        if n == 1:
            into[:] = scratch[first]
        else:
            _transpose(scratch[first : first + n * n], into.reshape(lanes, n * n), True)
