"""The product of many rows in bfloat16: each row times one of some matrices that lie as [n, k].

int8 entries are exact in bfloat16, products of two bfloat16 numbers in float32; sums are in float32.
Rows come packed, `ROWS` to a block: [block, k / 2, row, 2]. A block of the matrix is converted once
for all rows that meet it, while both lie in the caches (Goto and van de Geijn, "Anatomy of
High-Performance Matrix Multiplication", 2008).
"""

from typing import Any

from llvmlite import ir

from grokkit.kernels.cpu.code import F32, I8, I16, I32, Code, multiply_add, splat, widened

ROWS = 16
"""Rows of a block: the lanes of a vector of 512 bits."""
STEP = 32
"""Entries that are converted at a time: a group of scales is of a multiple of these."""
OUTPUTS = 6
"""Of a tile, which has 1 to 4 blocks: its sums leave some of 32 registers for what they are of."""
_BLOCKS = 4
_PANEL = 48  # outputs whose sums are kept while the entries are gone through
_MOST = 16  # blocks of rows whose sums are kept
_CHUNK = 256  # entries that are converted at once: those of a tile stay in the first cache
_TOTALS = 4 * ROWS * (_MOST + 1)  # bytes from output to output of the sums: no power of two
_VECTOR = ir.VectorType(F32, ROWS)
_ZEROS = ir.Constant(_VECTOR, [0.0] * ROWS)


def write(module: ir.Module) -> ir.Function:
    """Write the product, with the arguments of the skinny one; but `x` is packed, and counted, as
    `out` is, in blocks of rows."""
    kernels = [_micro_kernel(module, blocks) for blocks in range(1, _BLOCKS + 1)]
    convert = _converter(module)
    code = Code(module, "gemm", 11)
    x, weight, scales, out, blocks, first, last, k, groups, n, _ = code.arguments
    totals, panel = code.words(_PANEL * _TOTALS // 8), code.words(OUTPUTS * _CHUNK // 4)
    panel_scales, size = code.words(OUTPUTS), k // groups
    with code.range(0, blocks, _MOST) as block, code.range(first, last, _PANEL) as start:
        some, stop = code.least(blocks - block, _MOST), code.least(start + _PANEL, last)
        with code.range(totals, totals + _PANEL * _TOTALS, 4 * ROWS) as at:
            code.store(_ZEROS, at, 4)
        with code.range(0, groups) as group, code.range(0, size, _CHUNK) as chunk:
            entries, entry = code.least(size - chunk, _CHUNK), group * size + chunk
            with code.range(start, stop, OUTPUTS) as output:
                where = weight + entry, scales + group * n * 2, output, last
                code.call(convert, *where, k, entries, panel, panel_scales)
                with code.range(0, some, _BLOCKS) as b:
                    rows = x + ((block + b) * k + entry) * (2 * ROWS)
                    sums = totals + (output - start) * _TOTALS + b * (4 * ROWS)
                    where = rows, k, panel, panel_scales, sums, entries // 2
                    code.call_one(code.least(some - b, _BLOCKS), kernels, *where)
        with code.range(0, some * ROWS) as row, code.range(start, stop) as output:
            found = code.load(totals + (output - start) * _TOTALS + row * 4, F32, 4)
            code.store(found, out + ((block * ROWS + row) * n + output) * 4, 4)
    return code.finish()


def _converter(module: ir.Module) -> ir.Function:
    """Convert some entries of some outputs to bfloat16, and their scales to float32."""
    code = Code(module, "gemm_convert", 8)
    weight, scales, first, last, k, entries, panel, panel_scales = code.arguments
    integers, values = ir.VectorType(I8, STEP), ir.VectorType(F32, STEP)
    words = ir.VectorType(I32, STEP)
    for j in range(OUTPUTS):
        output = code.least(first + j, last - 1)  # beyond the last, something to be left out
        source, target = weight + output * k, panel + j * (2 * _CHUNK)
        with code.range(0, entries, STEP) as e:
            code.prefetch(source + e + k * _PANEL)
            found = code.builder.sitofp(code.load(source + e, integers), values)
            # The upper half of the float32 holds such small numbers exactly.
            bits = code.builder.bitcast(found, words)
            bits = code.builder.lshr(bits, ir.Constant(words, [16] * STEP))
            code.store(code.builder.trunc(bits, ir.VectorType(I16, STEP)), target + e * 2, 2)
        scale = code.load(scales + output * 2, I16, 2)
        code.store(widened(code, scale), panel_scales + 4 * j, 4)
    return code.finish()


def _micro_kernel(module: ir.Module, blocks: int) -> ir.Function:
    """Add to the totals of some outputs their products with some pairs of entries of some blocks."""
    code = Code(module, f"gemm_{blocks}", 6)
    x, k, panel, panel_scales, totals, steps = code.arguments
    each = [(j, b) for j in range(OUTPUTS) for b in range(blocks)]
    sums = {at: code.variable(_ZEROS) for at in each}
    with code.range(0, steps) as step:
        row_at = [x + k * (2 * ROWS * b) + step * (4 * ROWS) for b in range(blocks)]
        rows = [code.load(at, _VECTOR, 4) for at in row_at]
        for j in range(OUTPUTS):
            pair = splat(code, code.load(panel + j * (2 * _CHUNK) + step * 4, F32, 4), ROWS)
            for b in range(blocks):
                code.set(sums[j, b], _add_pairs(code, rows[b], pair, code.get(sums[j, b])))
    for j, b in each:
        scale = splat(code, code.load(panel_scales + 4 * j, F32, 4), ROWS)
        at = totals + (j * _TOTALS + b * 4 * ROWS)
        total = multiply_add(code, code.get(sums[j, b]), scale, code.load(at, _VECTOR, 4))
        code.store(total, at, 4)
    return code.finish()


def _add_pairs(code: Code, a: Any, b: Any, total: Any) -> Any:
    """total + a[0] * b[0] + a[1] * b[1] in each lane, of pairs of bfloat16 numbers."""
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    instruction = ir.InlineAsm(kind, "vdpbf16ps $3, $2, $0", "=v,0,v,v", side_effect=False)
    return code.builder.call(instruction, [total, a, b])
