"""Weighted sums of a matrix's rows: attention's values, few rows of weights each.

`out[row, n] = sum over k of x[row, k] * weight[k, n]`, of float32 or bfloat16 entries. Each sum goes
through k in order, whatever the tile.
"""

from typing import Any

from llvmlite import ir

from grokkit.kernels.cpu.code import F32, Code, multiply_add, splat
from grokkit.kernels.cpu.skinny import BYTES, floats

_ROWS = 4
VECTORS = 2


def write(module: ir.Module, entry: int, lanes: int) -> ir.Function:
    """Write the sums, with the arguments of the skinny product."""
    tiles = [_tile(module, entry, lanes, rows) for rows in range(1, _ROWS + 1)]
    code = Code(module, f"sums_{entry}", 11)
    x, weight, _, out, rows, first, last, k, _, n, reach = code.arguments
    with code.range(first, last, lanes * VECTORS) as output, code.range(0, rows, _ROWS) as row:
        some = code.least(rows - row, _ROWS)
        weight_at, to = weight + output * BYTES[entry], out + (row * n + output) * 4
        code.call_one(some, tiles, x + row * k * 4, weight_at, to, k, n, code.least(k, reach))
    return code.finish()


def _tile(module: ir.Module, entry: int, lanes: int, rows: int) -> ir.Function:
    """A few columns of so many rows."""
    code = Code(module, f"sums_{entry}_{rows}", 6)
    x, weight, out, k, n, reach = code.arguments
    zeros = ir.Constant(ir.VectorType(F32, lanes), [0.0] * lanes)
    places = [(r, v) for r in range(rows) for v in range(VECTORS)]
    sums: dict[Any, Any] = {place: code.variable(zeros) for place in places}
    with code.range(0, reach) as key:
        at = weight + key * n * BYTES[entry]
        values = [floats(code, at + lanes * v * BYTES[entry], entry, lanes) for v in range(VECTORS)]
        for r in range(rows):
            factor = splat(code, code.load(x + (k * r + key) * 4, F32, 4), lanes)
            for v in range(VECTORS):
                total = multiply_add(code, factor, values[v], code.get(sums[r, v]))
                code.set(sums[r, v], total)
    for r, v in places:
        code.store(code.get(sums[r, v]), out + (n * r + lanes * v) * 4, 4)
    return code.finish()
