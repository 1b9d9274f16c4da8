"""Two things that compiled loops cannot say in Python: an 8 × 8 transposition in registers, stores past the caches.

Both work on addresses, so callers see to sizes, alignment and contiguity. numba keeps callers on disk and does not see
changes here: after one, delete ``__pycache__/kernels.*.nb*``.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

EIGHT = 8  # floats of a vector that every machine has, or splits in two
LINE = 64  # bytes of a cache line


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
