"""The innermost part of products of many rows: a tile of outputs and rows, in the compiler's own
language.

Rows lie across the lanes, 16 of them in a register of 16 lanes; an entry of the matrix is met by
all of them at once. Where the processor has the instruction and bfloat16 is asked for, two entries
at a time: products exact in float32, sums in float32.
"""

from typing import Any

import llvmlite.binding
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

llvmlite.binding.initialize_native_asmparser()  # for the instruction named below

OUTPUTS = 6
LINES = 3
"""Lines of the caches beside each other that are called for together."""
MOST_VECTORS = 4 if LANES == 16 else 2
"""With these a tile's sums, and what they are made of, just fit in the processor's registers."""

_I16, _I32, _I64, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_VECTOR = ir.VectorType(_F32, LANES)
_ZEROS = ir.Constant(_VECTOR, [0.0] * LANES)
_VECTOR_BYTES = 4 * LANES


def wide_tile(vectors: int, pairs: bool) -> Any:
    """A function for compiled code that adds a tile's products to its totals.

    Its arguments are integers:

    - `x`: address of the rows' first entries, [vector, entry, lane] in float32; with `pairs` of
      bfloat16 [vector, pair of entries, lane, 2].
    - `x_bytes`: from vector to vector of `x`.
    - `panel`: address of the matrix's in the same numbers, for each output an entry or a pair.
    - `output_bytes`, `step_bytes`: from output to output of it, and to the next entry or pair.
    - `steps`: how many entries, or pairs of them.
    - `scales`: address of a float32 for each output, which its sums are multiplied by.
    - `totals`: address of the totals, [output, row] in float32.
    - `totals_bytes`: from output to output of them.
    """

    def compute(
        typing_context, x, x_bytes, panel, output_bytes, step_bytes, steps, scales, totals,
        totals_bytes,
    ):  # fmt: skip
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _compute(builder, vectors, pairs, *arguments)
            return context.get_dummy_value()

        return types.void(*(types.int64,) * 9), codegen

    return instruction(compute)


def _compute(
    builder: Any, vectors: int, pairs: bool, x: Any, x_bytes: Any, panel: Any, output_bytes: Any,
    step_bytes: Any, steps: Any, scales: Any, totals: Any, totals_bytes: Any,
) -> None:  # fmt: skip
    each = [(j, v) for j in range(OUTPUTS) for v in range(vectors)]
    sums = {at: cgutils.alloca_once_value(builder, _ZEROS) for at in each}
    for place in sums.values():
        builder.store(_ZEROS, place)
    with cgutils.for_range(builder, steps) as loop:
        x_at = builder.add(x, builder.mul(loop.index, _I64(_VECTOR_BYTES)))
        panel_at = on(builder, panel, loop.index, step_bytes)
        rows = [
            load(builder, on(builder, x_at, v, x_bytes), _VECTOR, _VECTOR_BYTES)
            for v in range(vectors)
        ]
        for j in range(OUTPUTS):
            entry = load(builder, on(builder, panel_at, j, output_bytes), _F32, 4)
            entries = splat(builder, entry, LANES)
            for v in range(vectors):
                add = _add_pairs if pairs else multiply_add
                builder.store(add(builder, rows[v], entries, builder.load(sums[j, v])), sums[j, v])
    for j in range(OUTPUTS):
        scale = splat(builder, load(builder, on(builder, scales, j, _I64(4)), _F32, 4), LANES)
        for v in range(vectors):
            place = on(builder, on(builder, totals, j, totals_bytes), v, _I64(_VECTOR_BYTES))
            total = load(builder, place, _VECTOR, 4)
            total = multiply_add(builder, builder.load(sums[j, v]), scale, total)
            builder.store(total, builder.inttoptr(place, _VECTOR.as_pointer()), 4)


def converter(pairs: bool) -> Any:
    """A function for compiled code that turns int8 entries into a panel's numbers.

    Its arguments are integers: the address of the entries, of the numbers, and how many; and of as
    many entries that will be wanted soon, which are called for from memory.
    """

    def convert(typing_context, entries, numbers, n, soon):
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            entries, numbers, n, soon = arguments
            with cgutils.for_range_slice(builder, _I64(0), n, _I64(LINE)) as (i, _):
                prefetch(builder, builder.add(soon, i))
            whole = builder.mul(builder.sdiv(n, _I64(2 * LANES)), _I64(2 * LANES))
            for first, last, width in ((_I64(0), whole, 2 * LANES), (whole, n, 1)):
                with cgutils.for_range_slice(builder, first, last, _I64(width)) as (i, _):
                    _convert(
                        builder,
                        builder.add(entries, i),
                        on(builder, numbers, i, _I64(2 if pairs else 4)),
                        width,
                        pairs,
                    )
            return context.get_dummy_value()

        return types.void(*(types.int64,) * 4), codegen

    return instruction(convert)


def _convert(builder: Any, source: Any, target: Any, width: int, pairs: bool) -> None:
    def kind(of: Any) -> Any:
        return ir.VectorType(of, width) if width > 1 else of

    numbers = builder.sitofp(load(builder, source, kind(ir.IntType(8)), 1), kind(_F32))
    if pairs:
        # The upper half of the float32 holds such small numbers exactly.
        bits = builder.bitcast(numbers, kind(_I32))
        sixteen = ir.Constant(kind(_I32), [16] * width if width > 1 else 16)
        numbers = builder.trunc(builder.lshr(bits, sixteen), kind(_I16))
    builder.store(numbers, builder.inttoptr(target, numbers.type.as_pointer()), 2)


def column_converter(columns: int, pairs: bool) -> Any:
    """A function for compiled code that turns int8 entries of some columns of a matrix into a
    panel's numbers.

    Its arguments are integers:

    - `entries`, `entry_bytes`: address of the columns' first entry, and from there to the next one.
    - `numbers`: where to write, for each entry or pair, all columns' numbers.
    - `n`: how many entries.
    """
    width = 16  # bytes that are loaded at once

    def convert(typing_context, entries, entry_bytes, numbers, n):
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            entries, entry_bytes, numbers, n = arguments
            some = 2 if pairs else 1
            with cgutils.for_range_slice(builder, _I64(0), n, _I64(some)) as (i, _):
                at = [
                    on(builder, entries, builder.add(i, _I64(e)), entry_bytes) for e in range(some)
                ]
                row = on(builder, numbers, builder.sdiv(i, _I64(some)), _I64(4 * columns))
                for first in range(0, columns, width):
                    bits = [_bits(builder, builder.add(a, _I64(first)), width) for a in at]
                    found = _two_halves(builder, *bits) if pairs else bits[0]
                    place = builder.add(row, _I64(4 * first))
                    builder.store(found, builder.inttoptr(place, found.type.as_pointer()), 4)
            return context.get_dummy_value()

        return types.void(*(types.int64,) * 4), codegen

    return instruction(convert)


@instruction
def call_for(typing_context, address, row_bytes, rows):
    """Call for rows from memory, `LINES` wide: for their address, and from one to the next."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, row_bytes, rows = arguments
        with cgutils.for_range(builder, rows) as loop:
            row = on(builder, address, loop.index, row_bytes)
            for line in range(LINES):
                prefetch(builder, builder.add(row, _I64(LINE * line)))
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 3), codegen


def _bits(builder: Any, source: Any, width: int) -> Any:
    """int8 numbers at an address, as the bits of float32 numbers."""
    numbers = load(builder, source, ir.VectorType(ir.IntType(8), width), 1)
    floats = builder.sitofp(numbers, ir.VectorType(_F32, width))
    return builder.bitcast(floats, ir.VectorType(_I32, width))


def _two_halves(builder: Any, low: Any, high: Any) -> Any:
    """The upper halves of two words, of which the lower ones are 0: in the lower half, and in the
    upper one."""
    sixteen = ir.Constant(low.type, [16] * low.type.count)
    return builder.or_(builder.lshr(low, sixteen), high)


def rounder(pairs: bool) -> Any:
    """A function for compiled code that rounds float32 numbers to bfloat16, ties to even.

    With `pairs` two of them are written together, in 4 bytes; else each as a float32. Its arguments
    are integers: the address of the numbers, where to write, and how many, or how many pairs.
    """

    def round_all(typing_context, numbers, rounded, n):
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            numbers, rounded, n = arguments
            whole = builder.mul(builder.sdiv(n, _I64(LANES)), _I64(LANES))
            for first, last, width in ((_I64(0), whole, LANES), (whole, n, 1)):
                with cgutils.for_range_slice(builder, first, last, _I64(width)) as (i, _):
                    source = on(builder, numbers, i, _I64(8 if pairs else 4))
                    bits = ir.VectorType(_I32, 2 * width if pairs else width)
                    found = _rounded(builder, load(builder, source, bits, 4), bits)
                    if pairs:
                        found = _side_by_side(builder, found, ir.VectorType(_I64, width))
                    target = on(builder, rounded, i, _I64(4))
                    builder.store(found, builder.inttoptr(target, found.type.as_pointer()), 4)
            return context.get_dummy_value()

        return types.void(*(types.int64,) * 3), codegen

    return instruction(round_all)


def _rounded(builder: Any, bits: Any, kind: Any) -> Any:
    """The bits of float32 numbers, those below the upper half rounded away."""

    def each(number: int) -> Any:
        return ir.Constant(kind, [number] * kind.count)

    least = builder.and_(builder.lshr(bits, each(16)), each(1))
    nearest = builder.add(builder.add(bits, each(0x7FFF)), least)
    magnitude = builder.and_(bits, each(0x7FFFFFFF))
    is_nan = builder.icmp_unsigned(">", magnitude, each(0x7F800000))
    return builder.and_(builder.select(is_nan, each(0x7FC00000), nearest), each(0xFFFF0000))


def _side_by_side(builder: Any, bits: Any, kind: Any) -> Any:
    """The upper halves of two neighbours as one word, the first one's lower."""

    def each(number: int) -> Any:
        return ir.Constant(kind, [number] * kind.count)

    both = builder.bitcast(bits, kind)
    low = builder.and_(builder.lshr(both, each(16)), each(0xFFFF))
    return builder.trunc(
        builder.or_(low, builder.lshr(both, each(32))), ir.VectorType(_I32, kind.count)
    )


def _add_pairs(builder: Any, a: Any, b: Any, total: Any) -> Any:
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    instruction = ir.InlineAsm(kind, "vdpbf16ps $3, $2, $0", "=v,0,v,v", side_effect=False)
    return builder.call(instruction, [total, a, b])
