"""The arithmetic of convolutions by tiles (`winograd`) in registers, eight channels at a time.

All work on addresses of float32, so callers see to sizes and contiguity. Products and sums may be fused (FMA), so
results may differ by rounding from one kind of processor to another, never from call to call. numba keeps callers on
disk and does not see changes here: after one, delete ``__pycache__/tile_kernels.*.nb*``.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sppnet.network.vectors import EIGHT

FIELD = 6  # points each way, so cells each way of the input of a tile
ROWS, COLUMNS = 6, 2 * EIGHT  # of a block of products: with its twelve sums all sixteen registers of AVX2 are in use

_VECTOR = ir.VectorType(ir.FloatType(), EIGHT)
_ALL = range(FIELD)
_FUSED = ("contract",)


@intrinsic
def to_points(context: Any, source: Any, row: Any, column: Any, target: Any, step: Any) -> Any:
    """The values of a tile of 6 × 6 cells of eight channels at 6 × 6 points.

    `row`, `column`: bytes from cell to cell; the values lie `step` bytes apart.
    """

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first, row, column, into, step = arguments
        down = [_at_points(builder, [_load(builder, first, (row, i), (column, j)) for i in range(FIELD)]) for j in _ALL]
        for i in _ALL:
            for j, value in enumerate(_at_points(builder, [down[k][i] for k in _ALL])):
                _store(builder, value, into, (step, FIELD * i + j))

    return types.void(*[types.intp] * 5), generate


def _from_points(side: int) -> Any:
    @intrinsic
    def from_points(context: Any, source: Any, step: Any, bias: Any, target: Any, row: Any, column: Any) -> Any:
        """The `side` × `side` cells of a result from values at 6 × 6 points, plus the bias; eight channels.

        Values lie `step` bytes apart; `row`, `column`: bytes from cell to cell.
        """

        def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            first, step, bias, into, row, column = arguments
            offset = _load(builder, bias)
            values = [[_load(builder, first, (step, FIELD * i + j)) for i in _ALL] for j in _ALL]
            down = [_cells(builder, own, side) for own in values]
            for i in range(side):
                for j, cell in enumerate(_cells(builder, [down[k][i] for k in _ALL], side)):
                    _store(builder, builder.fadd(cell, offset), into, (row, i), (column, j))

        return types.void(*[types.intp] * 6), generate

    return from_points


from_points_to_4, from_points_to_3, from_points_to_2 = (_from_points(side) for side in (4, 3, 2))


@intrinsic
def product(
    context: Any, left: Any, left_step: Any, right: Any, count: Any, target: Any, target_step: Any, again: Any
) -> Any:
    """target (6, 16) = left (6, count) · right (count, 16), added to what lies there where `again` is not 0.

    Steps are bytes from row to row; `right` is contiguous; `count` is at least 1.
    """

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        left, left_step, right, count, target, target_step, again = arguments
        begin = builder.block
        held, loop, done = (builder.function.append_basic_block(name) for name in ("held", "loop", "done"))
        builder.cbranch(builder.icmp_signed("!=", again, _number(0)), held, loop)
        places = [(i, half) for i in range(ROWS) for half in (0, 1)]

        builder.position_at_end(held)
        sums_before = [_load(builder, target, (target_step, i), (_number(32), half)) for i, half in places]
        builder.branch(loop)

        builder.position_at_end(loop)
        at = builder.phi(ir.IntType(64))
        sums = [builder.phi(_VECTOR) for _ in places]
        for before, block in ((None, begin), (sums_before, held)):
            at.add_incoming(_number(0), block)
            for k, total in enumerate(sums):
                total.add_incoming(_same(0) if before is None else before[k], block)
        halves = [_load(builder, right, (_number(64), at), (_number(32), half)) for half in (0, 1)]
        added = []
        for i in range(ROWS):
            own = _everywhere(builder, _address(builder, left, (left_step, i), (_number(4), at)))
            for half in (0, 1):
                added.append(_plus_product(builder, sums[2 * i + half], own, halves[half]))
        following = builder.add(at, _number(1))
        at.add_incoming(following, loop)
        for total, more in zip(sums, added, strict=True):
            total.add_incoming(more, loop)
        builder.cbranch(builder.icmp_signed("<", following, count), loop, done)

        builder.position_at_end(done)
        for (i, half), total in zip(places, added, strict=True):
            _store(builder, total, target, (target_step, i), (_number(32), half))

    return types.void(*[types.intp] * 7), generate


def _at_points(builder: Any, x: list[Any]) -> list[Any]:
    """Six cells in a row at the points 0, 1, -1, 2, -2 and infinity: what ± share is computed once."""
    even, odd = _plus(builder, x[4], -4, x[2]), _plus(builder, x[3], -4, x[1])
    even_2, odd_2 = builder.fsub(x[4], x[2]), builder.fsub(x[3], x[1])
    return [
        _plus(builder, _plus(builder, x[4], -5, x[2]), 4, x[0]),
        builder.fadd(even, odd),
        builder.fsub(even, odd),
        _plus(builder, even_2, 2, odd_2),
        _plus(builder, even_2, -2, odd_2),
        _plus(builder, _plus(builder, x[5], -5, x[3]), 4, x[1]),
    ]


def _cells(builder: Any, values: list[Any], side: int) -> list[Any]:
    """`side` cells in a row from values at these points: cell i is the sum of value · pointⁱ, the last at infinity."""
    zero, plus, minus, plus_2, minus_2, infinity = values
    even, odd = builder.fadd(plus, minus), builder.fsub(plus, minus)
    even_2, odd_2 = builder.fadd(plus_2, minus_2), builder.fsub(plus_2, minus_2)
    cells = [builder.fadd(zero, builder.fadd(even, even_2))]
    for power in range(1, side):
        own, own_2 = (odd, odd_2) if power % 2 else (even, even_2)
        cells.append(_plus(builder, own, 2**power, own_2))
    cells[-1] = builder.fadd(cells[-1], infinity)
    return cells


def _plus(builder: Any, value: Any, factor: int, other: Any) -> Any:
    return _plus_product(builder, value, _same(factor), other)


def _plus_product(builder: Any, value: Any, factor: Any, other: Any) -> Any:
    """value + factor · other."""
    return builder.fadd(builder.fmul(factor, other, flags=_FUSED), value, flags=_FUSED)


def _number(value: int) -> Any:
    return ir.Constant(ir.IntType(64), value)


def _same(value: float) -> Any:
    return ir.Constant(_VECTOR, [float(value)] * EIGHT)


def _everywhere(builder: Any, address: Any) -> Any:
    """The number at an address, in all eight places."""
    number = builder.load(builder.inttoptr(address, ir.FloatType().as_pointer()), align=4)
    places = ir.Constant(ir.VectorType(ir.IntType(32), EIGHT), [0] * EIGHT)
    one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), number, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, one, places)


def _address(builder: Any, first: Any, *steps: tuple[Any, Any]) -> Any:
    for step, count in steps:
        first = builder.add(first, builder.mul(step, _number(count) if isinstance(count, int) else count))
    return first


def _load(builder: Any, first: Any, *steps: tuple[Any, Any]) -> Any:
    return builder.load(builder.inttoptr(_address(builder, first, *steps), _VECTOR.as_pointer()), align=4)


def _store(builder: Any, value: Any, first: Any, *steps: tuple[Any, Any]) -> None:
    builder.store(value, builder.inttoptr(_address(builder, first, *steps), _VECTOR.as_pointer()), align=4)
