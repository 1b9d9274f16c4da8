"""Max-pooling pyramids of thousands of windows of one map, on a CPU: the compiled loops behind ``pool_windows``.

1. Windows on the same cells are found, to be computed once (`_group_windows`).
2. The map is copied into a table: blocks of channels, channels last, so that a maximum is one of whole vectors. Where
   there are enough windows to pay for it, the table also holds the maxima of all squares of 2, 4 and 8 cells (a sparse
   table), and the four corner squares of a bin cover it in nearly all cases (`_fill`).
3. Per window and block, the bins of every level are computed from the table. A level n that divides a finer level m
   is computed from the bins of m instead: bins are floor / ceil of exact fractions, so this is exact (`_pool`).
4. A block of bins is transposed to the order of the pyramid vector and copied into the result.

Plain Python threads share the work, in loops that release the interpreter lock: that is safe in a forked process, too.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import DTypeLike, NDArray

from .compiling import compiled

Ints = NDArray[np.int64]
LANES = 256  # most channels of a block
LANE_STEP = 16  # a block has a multiple of that many, the last ones of the last block unused
TILE = 8  # numbers a side that are transposed at once
CACHE_LINE = 64
SQUARE_SIZES = 3  # squares of 2, 4 and 8 cells a side; larger bins are rare
READS_PER_SQUARE = 4  # the maximum of a square costs that many reads of the table
TABLE_BYTES = 2**28  # no squares where the table would take more
LARGEST_BLOCK = 2**28  # bytes that a thread keeps for its next result, and for its next table
WINDOWS_PER_PART, PARTS_PER_THREAD = 32, 8  # parts take different times: several per thread even out the work


def pool_cells(maps: NDArray[Any], rows: Ints, levels: Sequence[int], threads: int = 1) -> NDArray[Any]:
    """Maximum of every bin of every window.

    maps: (N, C, H, W), float32 or float64, without NaN, at least one cell each; rows: (K, 5) int64, the index of a map
    and xyxy cells, half-open, not empty and inside the map (neither is checked here). Returns (K, C · Σn²): level after
    level, and within a level channel-major.
    """
    pooled = _reused("result", (len(rows), maps.shape[1] * sum(n * n for n in levels)), maps.dtype)
    for image, feature_map in enumerate(maps):
        if len(own := np.flatnonzero(rows[:, 0] == image)) > 0:
            _pool_map(feature_map, rows[:, 1:], own, _plan(levels), pooled, threads)
    return pooled


def _pool_map(feature_map: NDArray[Any], windows: Ints, own: Ints, plan: Ints, pooled: Any, threads: int) -> None:
    """The windows of one map, (C, H, W), into their rows of the result."""
    channels, height, width = feature_map.shape
    unique, begins, order = _group_windows(windows[own], height, width)
    blocks = -(-channels // LANES)
    lanes = -(-channels // (blocks * LANE_STEP)) * LANE_STEP
    plane_bytes = blocks * lanes * height * width * feature_map.itemsize
    planes = _count_planes(unique, plan, height, width, TABLE_BYTES // plane_bytes)
    table = feature_map.transpose(1, 2, 0)[None, None]
    if planes > 1 or channels % LANE_STEP or not table.flags.c_contiguous:  # else few windows read the map itself
        table = _reused("table", (blocks, planes, height, width, lanes), feature_map.dtype)
        in_parts(lambda a, b: _fill(feature_map, table, a, b), blocks, threads, 1)
    groups = unique, begins, own[order]
    in_parts(lambda a, b: _pool(table, groups, plan, pooled, a, b), len(unique), threads, WINDOWS_PER_PART)


def _plan(levels: Sequence[int]) -> Ints:
    """How to compute the levels, finest first: rows (n, m, row, source, first bin).

    Bins are computed into consecutive rows: those of level n begin at `row`, and are computed from those of level m,
    which begin at `source`; m = 0 stands for the map itself. In the pyramid vector they begin at `first bin`.
    """
    first_bins, row = np.cumsum([0, *(n * n for n in levels)]), 0
    plan: list[tuple[int, int, int, int, int]] = []
    for k in sorted(range(len(levels)), key=lambda k: -levels[k]):
        n = levels[k]
        m, source = min(((m, start) for m, _, start, *_ in plan if m % n == 0), default=(0, 0))
        plan.append((n, m, row, source, int(first_bins[k])))
        row += n * n
    return np.array(plan, dtype=np.int64)


def _group_windows(windows: Ints, height: int, width: int) -> tuple[Ints, Ints, Ints]:
    """(R, 4) -> (U, 4) different windows, from top to bottom; window u is that of rows[begins[u]:begins[u + 1]]."""
    x1, y1, x2, y2 = windows.T
    key = np.ravel_multi_index((y1, x1, y2, x2), (height, width, height + 1, width + 1))
    rows = np.argsort(key, kind="stable")
    begins = np.flatnonzero(np.diff(key[rows], prepend=-1))
    return windows[rows[begins]], np.append(begins, len(rows)), rows


def _count_planes(windows: Ints, plan: Ints, height: int, width: int, limit: int) -> int:
    """How many planes the table has: the cells themselves, and squares where they save more reads than they cost."""
    squares = max(0, min(SQUARE_SIZES, min(height, width).bit_length() - 1, limit - 1))
    reads = (windows[:, 2:] - windows[:, :2]).prod(axis=1).sum() * (plan[:, 1] == 0).sum()  # at least, without squares
    return 1 + squares * int(reads >= READS_PER_SQUARE * squares * height * width)


def in_parts(run: Callable[[int, int], None], count: int, threads: int, least: int) -> None:
    """Call run(start, stop) over `count` things, in parts of at least `least` shared by the threads."""
    count_parts = min(threads * PARTS_PER_THREAD, count // least)
    if threads == 1 or count_parts <= 1:
        run(0, count)
        return
    parts = pairwise(count * part // count_parts for part in range(count_parts + 1))
    with ThreadPoolExecutor(min(threads, count_parts)) as pool:
        list(pool.map(run, *zip(*parts, strict=True)))


_blocks = threading.local()


def _references(name: str) -> int:
    """To this thread's array of the name, as Python counts them here; an array on it adds one."""
    block = getattr(_blocks, name, None)
    return sys.getrefcount(block)


_blocks.none_but_ours = np.empty(0)
FREE = _references("none_but_ours")  # versions of Python differ


def _reused(name: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """As np.empty, from a cache line on, in the memory of this thread's array before of the name, once that is free.

    To fill fresh memory takes twice as long.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    held = _references(name) > FREE
    whole, block = size + CACHE_LINE, getattr(_blocks, name, None)
    if held or block is None or not whole <= block.nbytes <= 2 * whole:  # a small array does not keep a large block
        block = np.empty(whole, np.uint8)
        if size <= LARGEST_BLOCK:
            setattr(_blocks, name, block)
    first = -block.ctypes.data % CACHE_LINE
    return block[first : first + size].view(dtype).reshape(shape)


_copy_bytes: Any = types.ExternalFunction("memcpy", types.intp(types.intp, types.intp, types.uintp))


@intrinsic
def _transpose_tile(context: Any, number: Any, source: Any, source_step: Any, target: Any, target_step: Any) -> Any:
    """target[j, i] = source[i, j] of 8 × 8 numbers of the type of `number`: addresses, and bytes from row to row.

    In registers, which takes a sixth of the time of a loop over single numbers.
    """
    align = number.bitwidth // 8

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        vector = ir.VectorType(context.get_value_type(number), TILE)

        def place(address: Any, step: Any, row: int) -> Any:
            address = builder.add(address, builder.mul(step, ir.Constant(step.type, row)))
            return builder.inttoptr(address, vector.as_pointer())

        rows = [builder.load(place(arguments[1], arguments[2], row), align=align) for row in range(TILE)]
        for size in (1, 2, 4):  # swap the off-diagonal blocks of this size
            for k in (k for k in range(TILE) if not k & size):
                pair = rows[k], rows[k | size]
                for side in (0, size):
                    order = [(j & ~size | side) + (TILE if j & size else 0) for j in range(TILE)]
                    mask = ir.Constant(ir.VectorType(ir.IntType(32), TILE), order)
                    rows[k | side] = builder.shuffle_vector(*pair, mask)
        for row in range(TILE):
            builder.store(rows[row], place(arguments[3], arguments[4], row), align=align)

    return types.void(number, types.intp, types.intp, types.intp, types.intp), generate


@compiled()
def _fill(feature_map: Any, table: Any, start: int, stop: int) -> None:
    """Blocks `start` … of the table (blocks, planes, H, W, lanes).

    Plane k holds at (y, x) the maximum of the 2ᵏ × 2ᵏ cells from there on; what would reach over the edge is not set.
    """
    _, planes, height, width, lanes = table.shape
    for block in range(start, stop):
        own = min(lanes, feature_map.shape[0] - block * lanes)
        for y in range(height):
            for x in range(width):
                for c in range(own):
                    table[block, 0, y, x, c] = feature_map[block * lanes + c, y, x]
                for c in range(own, lanes):
                    table[block, 0, y, x, c] = 0
        for k in range(1, planes):
            half = 1 << (k - 1)
            for y in range(height - 2 * half + 1):
                for x in range(width - 2 * half + 1):
                    for c in range(lanes):
                        above = max(table[block, k - 1, y, x, c], table[block, k - 1, y, x + half, c])
                        below = max(table[block, k - 1, y + half, x, c], table[block, k - 1, y + half, x + half, c])
                        table[block, k, y, x, c] = max(above, below)


@compiled()
def _largest(grid: Any, first: int, width: int, box: Any, side: int, out: Any, row: int) -> None:
    """out[row] = the largest vectors of grid in box = (y1, y2, x1, x2).

    Row first + y · width + x of `grid` stands for the square of `side` cells from (y, x) on. Squares are taken four at
    a time and overlap where they must: a maximum does not notice.
    """
    y1, y2, x1, x2 = box
    for y in range(y1, y2, 2 * side):
        upper, lower = first + min(y, y2 - side) * width, first + min(y + side, y2 - side) * width
        for x in range(x1, x2, 2 * side):
            left, right = min(x, x2 - side), min(x + side, x2 - side)
            a, b, c, d = upper + left, upper + right, lower + left, lower + right
            if y == y1 and x == x1:
                for k in range(grid.shape[1]):
                    out[row, k] = max(max(grid[a, k], grid[b, k]), max(grid[c, k], grid[d, k]))
            else:
                for k in range(grid.shape[1]):
                    out[row, k] = max(out[row, k], max(max(grid[a, k], grid[b, k]), max(grid[c, k], grid[d, k])))


@compiled()
def _pool(table: Any, groups: Any, plan: Any, pooled: Any, start: int, stop: int) -> None:
    """Windows `start` … of `_group_windows` into their rows of the result (R, C · Σn²)."""
    (blocks, planes, height, width, lanes), (windows, begins, rows) = table.shape, groups
    vectors, size = table.reshape(-1, lanes), table.itemsize
    bins = plan[-1, 2] + plan[-1, 0] ** 2
    channels = pooled.shape[1] // bins
    # The tiles of levels of few bins read a little behind the bins found, and write a little behind those turned.
    found = np.zeros((bins + TILE, lanes), table.dtype)
    turned = np.empty(lanes * plan[0, 0] ** 2 + TILE, table.dtype)
    found_at, pooled_at = found.ctypes.data, pooled.ctypes.data
    for u in range(start, stop):
        x, y, w, h = windows[u, 0], windows[u, 1], windows[u, 2] - windows[u, 0], windows[u, 3] - windows[u, 1]
        for block in range(blocks):
            own = min(lanes, channels - block * lanes)
            for level in range(plan.shape[0]):
                n, m, row, source = plan[level, 0], plan[level, 1], plan[level, 2], plan[level, 3]
                for b in range(n * n):
                    i, j = b // n, b % n
                    if m > 0:
                        q = m // n
                        _largest(found, source, m, (i * q, (i + 1) * q, j * q, (j + 1) * q), 1, found, row + b)
                    else:
                        box = y + i * h // n, y - (-(i + 1) * h // n), x + j * w // n, x - (-(j + 1) * w // n)
                        k = 0
                        while k + 1 < planes and 2 << k <= min(box[1] - box[0], box[3] - box[2]):
                            k += 1
                        _largest(vectors, (block * planes + k) * height * width, width, box, 1 << k, found, row + b)
                for c in range(0, own, TILE):
                    for b in range(0, n * n, TILE):
                        b = max(0, min(b, n * n - TILE))
                        start_at = found_at + ((row + b) * lanes + c) * size
                        end_at = turned.ctypes.data + (c * n * n + b) * size  # asked here: so numba keeps it that long
                        _transpose_tile(found[0, 0], start_at, lanes * size, end_at, n * n * size)  # type: ignore[call-arg]
                column = plan[level, 4] * channels + block * lanes * n * n
                for k in range(begins[u], begins[u + 1]):
                    _copy_bytes(
                        pooled_at + (rows[k] * pooled.shape[1] + column) * size, turned.ctypes.data, own * n * n * size
                    )
