"""The skinny product: few rows times each of some matrices that lie as [n, k], at memory's speed.

A tile is `OUTPUTS` outputs of one to a few rows. Every vector of the matrix that is loaded is used
for all rows of the tile while it is in a register; sums stay in registers to the end. A sum's order
does not depend on the tile, so that a row's bits are the same alone and beside others.
"""

from typing import Any

from llvmlite import ir

from grokkit.kernels.cpu.code import (
    F32,
    I8,
    I16,
    Code,
    Int,
    add_lanes,
    multiply_add,
    splat,
    widened,
)

INT8, FLOAT32, BFLOAT16 = range(3)
"""What a matrix's entries are. Only `INT8` has scales."""
BYTES = (1, 4, 2)
OUTPUTS = 4
_CACHED = (
    2**18
)  # bytes of the matrix that stay in the second cache while tile after tile meets them
_AHEAD = 2 * OUTPUTS  # outputs between those that are computed and those that are prefetched


def write(module: ir.Module, entry: int, lanes: int) -> ir.Function:
    """Write the product for one kind of entry.

    The function's arguments are addresses and sizes: `x` (float32 [row, k]), `weight` ([n, k]),
    `scales` (bfloat16 [group, n]), `out` (float32 [row, n]); how many `rows`; the outputs `first` to
    `last` that are wanted, at least `OUTPUTS`; `k`; `groups`; `n`; and `reach`, which only sums use.
    """
    # With the sums of its rows a tile takes all but a few of the registers: 32, or 16 without AVX-512.
    most = 5 if lanes == 16 else 2
    tiles = [_tile(module, entry, lanes, rows) for rows in range(1, most + 1)]
    code = Code(module, f"skinny_{entry}", 11)
    x, weight, scales, out, rows, first, last, k, groups, n, _ = code.arguments
    at_once = (code.integer(_CACHED // OUTPUTS) // (k * BYTES[entry]) + 1) * OUTPUTS
    with code.range(first, last, at_once) as start:
        stop = code.least(start + at_once, last)
        with code.range(0, rows, most) as row:
            some = code.least(rows - row, most)
            row_at, to = x + row * k * 4, out + row * n * 4
            where = row_at, weight, scales, to, start, stop, last, k, groups, n
            code.call_one(some, tiles, *where)
    return code.finish()


def _tile(module: ir.Module, entry: int, lanes: int, rows: int) -> ir.Function:
    """Outputs `start` to `stop` of so many rows."""
    code = Code(module, f"skinny_{entry}_{rows}", 10)
    x, weight, scales, out, start, stop, last, k, groups, n = code.arguments
    vector = ir.VectorType(F32, lanes)
    zeros = ir.Constant(vector, [0.0] * lanes)
    size, width = k // groups, BYTES[entry]
    each = [(j, r) for j in range(OUTPUTS) for r in range(rows)]
    totals, sums = ({at: code.variable(zeros) for at in each} for _ in range(2))
    with code.range(start, stop, OUTPUTS) as wanted:
        output = code.least(wanted, last - OUTPUTS)  # at the end some are computed twice
        for at in each:
            code.set(totals[at], zeros)
        with code.range(0, groups) as group:
            for at in each:
                code.set(sums[at], zeros)
            with code.range(group * size, (group + 1) * size, lanes) as e:
                row = [code.load(x + e * 4 + k * (4 * r), vector, 4) for r in range(rows)]
                for j in range(OUTPUTS):
                    address = weight + ((output + j) * k + e) * width
                    values = floats(code, address, entry, lanes)
                    code.prefetch(address + k * (_AHEAD * width))
                    for r in range(rows):
                        total = multiply_add(code, values, row[r], code.get(sums[j, r]))
                        code.set(sums[j, r], total)
            for j, r in each:
                scale = ir.Constant(vector, [1.0] * lanes)
                if entry == INT8:
                    bits = code.load(scales + (group * n + output + j) * 2, I16, 2)
                    scale = splat(code, widened(code, bits), lanes)
                total = multiply_add(code, code.get(sums[j, r]), scale, code.get(totals[j, r]))
                code.set(totals[j, r], total)
        for j, r in each:
            code.store(add_lanes(code, code.get(totals[j, r])), out + (n * r + output + j) * 4, 4)
    return code.finish()


def floats(code: Code, address: Int, entry: int, lanes: int) -> Any:
    """Entries at an address as float32."""
    vector = ir.VectorType(F32, lanes)
    if entry == FLOAT32:
        return code.load(address, vector, 4)
    if entry == INT8:
        return code.builder.sitofp(code.load(address, ir.VectorType(I8, lanes)), vector)
    return widened(code, code.load(address, ir.VectorType(I16, lanes), 2))
