"""The compiled CPU loop behind `winograd.convolve`.

Each thread takes some tiles through all three steps, so that what lies between them stays in its caches, and threads
meet once a layer. Matrix products of torch between compiled loops were a third slower: its threads wait for the next
product by spinning, which takes the cores from the loops. The products here run at nine tenths of what a core can do.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sppnet.compiling import compiled, in_parts
from sppnet.network.memory import ReusedMemory
from sppnet.network.tile_vectors import (
    COLUMNS,
    FIELD,
    ROWS,
    from_points_to_2,
    from_points_to_3,
    from_points_to_4,
    product,
    to_points,
)
from sppnet.network.vectors import EIGHT, LINE, copy_bytes

TILES = 8 * ROWS  # that a thread works on at once: values of 256 + 384 channels then take 4 MB
DEPTH = 256  # channels of a product at once: six rows of values and a panel of filters then lie in the first cache
POINTS = FIELD * FIELD
SCRATCH = 2**21  # numbers of a thread: enough for nearly all layers, so that one block serves all of a trunk

scratch_memory = ReusedMemory()


def convolve_tiles(
    cells: NDArray[np.float32],
    filters: NDArray[np.float32],
    bias: NDArray[np.float32],
    result: NDArray[np.float32],
    side: int,
    stride: int,
    padding: tuple[int, int],
    threads: int = 1,
) -> None:
    """Fill `result` (N, H', W', O) from `cells` (N, H, W, C), tiles of `side` × `side` cells at a time.

    C is a multiple of 8, O of 16; each cell lies contiguous, so do all arrays but `cells`. filters: (36, O / 16,
    stride² · C, 16), the channels of the cells of a square of `stride` cells one after the other; bias: (O,).
    `padding`: rows and columns of zeros in front of `cells`; what a filter sees behind them is zeros too.
    """
    count, height, width, outputs = result.shape
    tall, wide = -(-height // side), -(-width // side)
    values = POINTS * (TILES * (filters.shape[2] + outputs) + 2 * LINE)
    scratch = deque(scratch_memory.array((max(1, threads), max(values, SCRATCH)), np.float32))

    tiles = count * tall * wide

    def run(start: int, stop: int) -> None:
        own = scratch.pop()
        place = (side, stride, *padding, tall, wide, start * ROWS, min(stop * ROWS, tiles))
        _convolve(cells.ctypes.data, cells.shape, cells.strides, filters, bias, result, own, *place)
        scratch.append(own)

    groups = -(-tiles // ROWS)
    # Each part reads all filters: as few parts as fill all threads and the memory of each.
    rounds = max(1, round(tiles / (threads * TILES)))
    in_parts(run, groups, threads, least=max(1, groups // (threads * rounds)))


@compiled()
def _convolve(
    cells: int,  # not an array: there would be a compiled loop for those that lie contiguous and one for the others
    shape: tuple[int, int, int, int],
    strides: tuple[int, int, int, int],
    filters: Any,
    bias: Any,
    result: Any,
    scratch: Any,
    side: int,
    stride: int,
    above: int,
    left: int,
    tall: int,
    wide: int,
    start: int,
    stop: int,
) -> None:
    """The tiles start … stop - 1 of all images, row after row."""
    inputs, panels = filters.shape[2], filters.shape[1]
    # A line more from point to point: at a multiple of 4 kB all points would compete for the same lines of a cache.
    tile, step = 4 * inputs, 4 * TILES * inputs + LINE
    tile_sum, step_sum = 4 * COLUMNS * panels, 4 * TILES * COLUMNS * panels + LINE
    values = scratch.ctypes.data
    sums = values + POINTS * step
    border = np.empty((FIELD, FIELD, max(shape[3], result.shape[3])), np.float32)
    for first in range(start, stop, TILES):
        count = min(TILES, stop - first)
        for t in range(count):
            y, x = (first + t) // wide % tall * side * stride - above, (first + t) % wide * side * stride - left
            image = cells + (first + t) // (tall * wide) * strides[0]
            _values(image, shape, strides, y, x, stride, border, values + t * tile, step)
        for point in range(POINTS):
            for depth in range(0, inputs, DEPTH):
                for panel in range(panels):
                    right = filters.ctypes.data + 4 * COLUMNS * ((point * panels + panel) * inputs + depth)
                    for t in range(0, count, ROWS):
                        product(  # type: ignore[call-arg]
                            values + point * step + t * tile + 4 * depth,
                            tile,
                            right,
                            min(DEPTH, inputs - depth),
                            sums + point * step_sum + t * tile_sum + 4 * COLUMNS * panel,
                            tile_sum,
                            depth,
                        )
        for t in range(count):
            y, x = (first + t) // wide % tall * side, (first + t) % wide * side
            _results(sums + t * tile_sum, step_sum, bias, result[(first + t) // (tall * wide)], y, x, side, border)


@compiled()
def _values(
    cells: int,
    shape: tuple[int, int, int, int],
    strides: tuple[int, int, int, int],
    y: int,
    x: int,
    stride: int,
    border: Any,
    target: int,
    step: int,
) -> None:
    """The values at the points of a tile whose input begins at (y, x): those of every cell of a square of `stride`."""
    _, height, width, channels = shape
    _, row, column, _ = strides
    last = (FIELD - 1) * stride
    for phase in range(stride * stride):
        top, left = y + phase // stride, x + phase % stride
        into = target + 4 * channels * phase
        if top >= 0 and left >= 0 and top + last < height and left + last < width:
            source = cells + top * row + left * column
            for c in range(0, 4 * channels, 4 * EIGHT):
                to_points(source + c, stride * row, stride * column, into + c, step)  # type: ignore[call-arg]
            continue
        for i in range(FIELD):
            for j in range(FIELD):
                at_y, at_x = top + i * stride, left + j * stride
                if 0 <= at_y < height and 0 <= at_x < width:
                    copy_bytes(cells + at_y * row + at_x * column, border[i, j].ctypes.data, 4 * channels)  # type: ignore[call-arg]
                else:
                    border[i, j, :channels] = 0
        for c in range(0, 4 * channels, 4 * EIGHT):
            to_points(border.ctypes.data + c, border.strides[0], border.strides[1], into + c, step)  # type: ignore[call-arg]


@compiled()
def _results(source: int, step: int, bias: Any, result: Any, y: int, x: int, side: int, border: Any) -> None:
    """The cells of a tile at (y, x) of one result (H', W', O), as far as they lie inside."""
    height, width, outputs = result.shape
    inside = y + side <= height and x + side <= width
    if inside:
        row, column = result.strides[0], result.strides[1]
        into = result.ctypes.data + y * row + x * column
    else:
        into, row, column = border.ctypes.data, border.strides[0], border.strides[1]
    for c in range(0, 4 * outputs, 4 * EIGHT):
        if side == 4:
            from_points_to_4(source + c, step, bias.ctypes.data + c, into + c, row, column)
        elif side == 3:
            from_points_to_3(source + c, step, bias.ctypes.data + c, into + c, row, column)
        else:
            from_points_to_2(source + c, step, bias.ctypes.data + c, into + c, row, column)
    if not inside:
        for i in range(min(side, height - y)):
            for j in range(min(side, width - x)):
                result[y + i, x + j] = border[i, j, :outputs]
