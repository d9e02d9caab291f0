"""The innermost part of products of few rows with a matrix that lies as [k, n]: a tile of outputs
and rows, in the compiler's own language.

Outputs lie across the lanes, as in the matrix; an entry of a row is met by all of them at once.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from grokkit.cpu.instructions import (
    LANES,
    LINE,
    instruction,
    load,
    multiply_add,
    on,
    prefetch,
    splat,
)

ROWS = 5 if LANES == 16 else 4
"""The most rows of a tile: as many as its sums leave registers for."""
OUTPUTS = (4 if LANES == 16 else 2) * LANES
"""Of a tile."""
WIDE_ROWS = 3 if LANES == 16 else 2
"""The most rows of a tile with twice as many outputs."""

_I8, _I64, _F32 = ir.IntType(8), ir.IntType(64), ir.FloatType()
_VECTOR = ir.VectorType(_F32, LANES)
_ZEROS = ir.Constant(_VECTOR, [0.0] * LANES)


def column_tile(rows: int, outputs: int) -> Any:
    """A function for compiled code that adds so many rows' products with some entries to totals.

    In an order that does not depend on how many rows there are. Its arguments are integers:

    - `x`, `row_bytes`: address of the first row's first entry, in float32, and from row to row.
    - `weight`, `entry_bytes`: address of the outputs' first entry, in int8, and from there to the
      next one.
    - `steps`: how many entries.
    - `scales`: address of a float32 for each output, which its sums are multiplied by.
    - `totals`, `totals_bytes`: address of the totals, in float32, and from row to row.
    - `soon`, `soon_bytes`, `lines`, `line`: address of what comes next, from there to what lies
      below, how many lines of the caches wide it is; and which of these lines to call for from
      memory with the first entry. With each of the others, it is the line on the right, or the
      first one below.
    """

    def compute(
        typing_context, x, row_bytes, weight, entry_bytes, steps, scales, totals, totals_bytes,
        soon, soon_bytes, lines, line,
    ):  # fmt: skip
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _compute(builder, rows, outputs, *arguments)
            return context.get_dummy_value()

        return types.void(*(types.int64,) * 12), codegen

    return instruction(compute)


def _compute(
    builder: Any, rows: int, outputs: int, x: Any, row_bytes: Any, weight: Any, entry_bytes: Any, steps: Any,
    scales: Any, totals: Any, totals_bytes: Any, soon: Any, soon_bytes: Any, lines: Any, line: Any,
) -> None:  # fmt: skip
    vectors = range(outputs // LANES)
    sums = {
        (r, v): cgutils.alloca_once_value(builder, _ZEROS) for r in range(rows) for v in vectors
    }
    for place in sums.values():
        builder.store(_ZEROS, place)
    call_for_next = _caller(builder, soon, soon_bytes, lines, line)
    with cgutils.for_range(builder, steps) as loop:
        for _ in range(max(1, outputs // LINE)):
            call_for_next()
        x_at = on(builder, x, loop.index, _I64(4))
        entries_at = on(builder, weight, loop.index, entry_bytes)

        def number(r: int) -> Any:
            place = on(builder, x_at, r, row_bytes)
            return splat(builder, load(builder, place, _F32, 4), LANES)

        def entries(v: int) -> Any:
            place = on(builder, entries_at, v, _I64(LANES))
            return builder.sitofp(load(builder, place, ir.VectorType(_I8, LANES), 1), _VECTOR)

        def add(r: int, v: int, number: Any, entries: Any) -> None:
            total = multiply_add(builder, entries, number, builder.load(sums[r, v]))
            builder.store(total, sums[r, v])

        # Registers have room for all of what is fewer, and one of the other.
        if rows < len(vectors):
            numbers = [number(r) for r in range(rows)]
            for v in vectors:
                some = entries(v)
                for r in range(rows):
                    add(r, v, numbers[r], some)
        else:
            all_entries = [entries(v) for v in vectors]
            for r in range(rows):
                one = number(r)
                for v in vectors:
                    add(r, v, one, all_entries[v])
    for (r, v), place in sums.items():
        scale = load(builder, on(builder, scales, v, _I64(4 * LANES)), _VECTOR, 4)
        at = on(builder, on(builder, totals, r, totals_bytes), v, _I64(4 * LANES))
        total = load(builder, at, _VECTOR, 4)
        total = multiply_add(builder, builder.load(place), scale, total)
        builder.store(total, builder.inttoptr(at, _VECTOR.as_pointer()), 4)


def _caller(
    builder: Any, address: Any, row_bytes: Any, lines: Any, line: Any
) -> Callable[[], None]:
    """What calls for one line of the caches after the other, from left to right and on in the next
    row, from the one of that number on; of rows that are so many lines wide."""
    below, right = builder.udiv(line, lines), builder.urem(line, lines)
    first = on(builder, on(builder, address, below, row_bytes), right, LINE)
    at = cgutils.alloca_once_value(builder, first)
    column = cgutils.alloca_once_value(builder, right)
    builder.store(first, at)
    builder.store(right, column)
    to_next_row = builder.sub(row_bytes, builder.mul(lines, _I64(LINE)))

    def call() -> None:
        prefetch(builder, builder.load(at))
        following = builder.add(builder.load(column), _I64(1))
        is_end = builder.icmp_unsigned("==", following, lines)
        skipped = builder.select(is_end, to_next_row, _I64(0))
        builder.store(builder.add(on(builder, builder.load(at), 1, LINE), skipped), at)
        builder.store(builder.select(is_end, _I64(0), following), column)

    return call
