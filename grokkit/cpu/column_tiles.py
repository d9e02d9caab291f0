"""The innermost part of products of few rows with a matrix that lies as [k, n]: a tile of outputs
and rows, in the compiler's own language.

Outputs lie across the lanes, as in the matrix; an entry of a row is met by all of them at once.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from grokkit.cpu.instructions import (
    LANES,
    call_for_line,
    instruction,
    load,
    multiply_add,
    on,
    splat,
)

ROWS = 5 if LANES == 16 else 4
"""The most rows of a tile: as many as its sums leave registers for."""
OUTPUTS = (4 if LANES == 16 else 2) * LANES
"""Of a tile."""
LINES = 8
"""Lines beside each other that are gone through together: memory does not give one after the other
of entries that lie far apart at its full speed."""

_I8, _I64, _F32 = ir.IntType(8), ir.IntType(64), ir.FloatType()
_VECTOR = ir.VectorType(_F32, LANES)
_ZEROS = ir.Constant(_VECTOR, [0.0] * LANES)


def column_tile(rows: int) -> Any:
    """A function for compiled code that adds so many rows' products with some entries to totals.

    In an order that does not depend on how many rows there are. Its arguments are integers:

    - `x`, `row_bytes`: address of the first row's first entry, in float32, and from row to row.
    - `weight`, `entry_bytes`: address of the outputs' first entry, in int8, and from there to the
      next one.
    - `steps`: how many entries.
    - `scales`: address of a float32 for each output, which its sums are multiplied by.
    - `totals`, `totals_bytes`: address of the totals, in float32, and from row to row.
    - `soon`, `soon_bytes`, `line`: address of what comes next, `LINES` lines of the caches wide, and
      from there to what lies below; and which of these lines to call for from memory with the first
      entry. With each of the others, it is the line on the right, or the first one below.
    """

    def compute(
        typing_context, x, row_bytes, weight, entry_bytes, steps, scales, totals, totals_bytes,
        soon, soon_bytes, line,
    ):  # fmt: skip
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _compute(builder, rows, *arguments)
            return context.get_dummy_value()

        return types.void(*(types.int64,) * 11), codegen

    return instruction(compute)


def _compute(
    builder: Any, rows: int, x: Any, row_bytes: Any, weight: Any, entry_bytes: Any, steps: Any,
    scales: Any, totals: Any, totals_bytes: Any, soon: Any, soon_bytes: Any, line: Any,
) -> None:  # fmt: skip
    vectors = range(OUTPUTS // LANES)
    sums = {
        (r, v): cgutils.alloca_once_value(builder, _ZEROS) for r in range(rows) for v in vectors
    }
    for place in sums.values():
        builder.store(_ZEROS, place)
    with cgutils.for_range(builder, steps) as loop:
        call_for_line(builder, soon, soon_bytes, builder.add(line, loop.index), LINES)
        x_at = on(builder, x, loop.index, _I64(4))
        entries_at = on(builder, weight, loop.index, entry_bytes)
        entries = []
        for v in vectors:
            address = on(builder, entries_at, v, _I64(LANES))
            found = load(builder, address, ir.VectorType(_I8, LANES), 1)
            entries.append(builder.sitofp(found, _VECTOR))
        for r in range(rows):
            number = load(builder, on(builder, x_at, r, row_bytes), _F32, 4)
            numbers = splat(builder, number, LANES)
            for v in vectors:
                found = multiply_add(builder, entries[v], numbers, builder.load(sums[r, v]))
                builder.store(found, sums[r, v])
    for (r, v), place in sums.items():
        scale = load(builder, on(builder, scales, v, _I64(4 * LANES)), _VECTOR, 4)
        at = on(builder, on(builder, totals, r, totals_bytes), v, _I64(4 * LANES))
        total = load(builder, at, _VECTOR, 4)
        total = multiply_add(builder, builder.load(place), scale, total)
        builder.store(total, builder.inttoptr(at, _VECTOR.as_pointer()), 4)
