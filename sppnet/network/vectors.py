"""What compiled loops cannot say in Python: maxima and 8 × 8 transpositions in registers, stores past the caches.

All work on addresses, so callers see to sizes, alignment and contiguity. numba keeps callers on disk and does not see
changes here: after one, delete ``__pycache__/kernels.*.nb*``.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

EIGHT = 8  # floats of a vector that every machine has, or splits in two
LINE = 64  # bytes of a cache line
WIDE = 2 * LINE  # bytes that a maximum works on: enough to hide the time of a load, few enough for all registers


@intrinsic
def transpose_eight(context: Any, source: Any, source_step: Any, target: Any, target_step: Any) -> Any:
    """target[j, i] = source[i, j] of 8 × 8 floats of four bytes: addresses of the first, bytes from row to row."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first, step, target_first, target_rows = arguments
        kind, half = (ir.VectorType(ir.FloatType(), count) for count in (EIGHT, EIGHT // 2))
        # The blocks of 4 × 4 change places by how they are loaded, which is cheaper than another round of shuffles.
        rows = [None] * EIGHT
        for k in range(EIGHT // 2):
            for side in (0, 1):
                start = builder.add(first, ir.Constant(first.type, 16 * side))
                parts = [builder.load(_row(builder, half, start, step, row), align=4) for row in (k, k + 4)]
                rows[k + 4 * side] = builder.shuffle_vector(*parts, _mask(list(range(EIGHT))))
        for size in (1, 2):  # swap the off-diagonal blocks of this size
            for k in (k for k in range(EIGHT) if not k & size):
                upper, lower = rows[k], rows[k | size]
                left = [j if not j & size else EIGHT + (j ^ size) for j in range(EIGHT)]
                right = [j | size if not j & size else EIGHT + j for j in range(EIGHT)]
                rows[k] = builder.shuffle_vector(upper, lower, _mask(left))
                rows[k | size] = builder.shuffle_vector(upper, lower, _mask(right))
        for k in range(EIGHT):
            builder.store(rows[k], _row(builder, kind, target_first, target_rows, k), align=4)

    return types.void(types.uintp, types.intp, types.uintp, types.intp), generate


def _largest_of_four(again: bool) -> Any:
    @intrinsic
    def largest(context: Any, element: Any, base: Any, places: Any, target: Any) -> Any:
        """`WIDE` bytes at target = the largest, number by number, of those at base + each of four int64 at `places`.

        `element` is any number of the kind that lies there: float32, float64 without NaN, or int16.
        """
        floating, align = isinstance(element, types.Float), element.bitwidth // 8

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kind = ir.VectorType(context.get_value_type(element), WIDE // align)

            def larger(a: Any, b: Any) -> Any:
                above = builder.fcmp_ordered(">", a, b) if floating else builder.icmp_signed(">", a, b)
                return builder.select(above, a, b)

            def load(address: Any) -> Any:
                return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)

            _, first, four, into = arguments
            offsets = builder.inttoptr(four, first.type.as_pointer())
            steps = [builder.load(builder.gep(offsets, [ir.Constant(ir.IntType(32), k)])) for k in range(4)]
            a, b, c, d = (load(builder.add(first, step)) for step in steps)
            largest = larger(larger(a, b), larger(c, d))
            if again:
                largest = larger(load(into), largest)
            builder.store(largest, builder.inttoptr(into, kind.as_pointer()), align=align)

        return types.void(element, types.intp, types.intp, types.intp), generate

    return largest


largest_of_four = _largest_of_four(again=False)
larger_of_four = _largest_of_four(again=True)  # and of what lies at the target already


@intrinsic
def copy_bytes(context: Any, source: Any, target: Any, count: Any) -> Any:
    """Copy `count` bytes from address to address."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        first, into = (builder.inttoptr(address, byte) for address in arguments[:2])
        cgutils.raw_memcpy(builder, into, first, arguments[2], 1)

    return types.void(types.intp, types.intp, types.intp), generate


@intrinsic
def store_line(context: Any, source: Any, target: Any) -> Any:
    """Copy 64 bytes to an address that is a multiple of 64, without reading what was there into the caches."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.VectorType(ir.FloatType(), LINE // 4)
        line = builder.load(builder.inttoptr(arguments[0], kind.as_pointer()), align=4)
        store = builder.store(line, builder.inttoptr(arguments[1], kind.as_pointer()), align=LINE)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))

    return types.void(types.uintp, types.uintp), generate


@intrinsic
def stores_done(context: Any) -> Any:
    """Wait until what `store_line` wrote can be read by other threads."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")

    return types.void(), generate


def _row(builder: Any, kind: Any, first: Any, step: Any, k: int) -> Any:
    address = builder.add(first, builder.mul(step, ir.Constant(step.type, k)))
    return builder.inttoptr(address, kind.as_pointer())


def _mask(places: list[int]) -> Any:
    return ir.Constant(ir.VectorType(ir.IntType(32), EIGHT), places)
