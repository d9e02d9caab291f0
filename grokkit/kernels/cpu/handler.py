"""What XLA calls, through its foreign function interface.

The C structures are those of `xla/ffi/api/c_api.h`, which XLA keeps compatible. Every field that is
used here takes 8 bytes.
"""

from typing import NamedTuple

from llvmlite import ir

from grokkit.kernels.cpu import gemm, sharing, skinny, sums
from grokkit.kernels.cpu.code import F32, I32, I64, Code, Int

NAME = "grokkit_product"

# Places in the call's frame, in a buffer, and in the extension by which XLA asks for a version.
_EXTENSION, _API, _CONTEXT, _ARGUMENTS, _RESULTS = 1, 2, 3, 9, 14
_DATA, _SIZES = 3, 5
_EXTENSION_TYPE, _METADATA, _METADATA_VERSION = 1, 3, 3
_IS_METADATA = 1
_VERSION = 3 << 32  # 0.3: the major number lies in the lower half

KIND, K, N, GROUPS, PLACE, THREADS, MATRICES, STARTS = range(8)
"""Places in a call's first argument, int32 numbers: which kernel; entries of a row, and outputs;
groups of scales; where in the stack the first matrix is; threads; how many matrices; where the rows
(or blocks of rows) of each begin, and the last ones' end; and then how far each matrix reaches: how
many of its outputs are wanted, or for sums how many of its rows."""
_UNIT = 32  # outputs of which pieces are made: a multiple of what any kernel computes at once
_PIECES = 8  # for each thread, so that none waits long for another at the end


class Kernel(NamedTuple):
    """A function with the arguments of `skinny.write`'s, which computes so many outputs at once and
    counts so many rows of `x` as one; and the bytes of the entries of its arrays."""

    function: ir.Function
    x_bytes: int
    entry_bytes: int
    outputs: int
    rows: int = 1


PRODUCT_INT8, PRODUCT_FLOAT32, PRODUCT_BFLOAT16, SUMS_FLOAT32, SUMS_BFLOAT16, GEMM = range(6)
"""The kernels; the last only where the processor multiplies bfloat16 numbers in pairs."""
SUMS = (SUMS_FLOAT32, SUMS_BFLOAT16)


def write(module: ir.Module, lanes: int, has_pairs: bool) -> None:
    """Write all kernels, and `NAME`, by which XLA calls them."""
    kernels = []
    for e in (skinny.INT8, skinny.FLOAT32, skinny.BFLOAT16):
        function = skinny.write(module, e, lanes)
        kernels.append(Kernel(function, 4, skinny.BYTES[e], skinny.OUTPUTS))
    for e in (skinny.FLOAT32, skinny.BFLOAT16):
        function = sums.write(module, e, lanes)
        kernels.append(Kernel(function, 4, skinny.BYTES[e], sums.VECTORS * lanes))
    if has_pairs:
        kernels.append(Kernel(gemm.write(module), 2, 1, 1, gemm.ROWS))
    share = sharing.write(module, _piece(module, kernels))
    code = Code(module, NAME, 1, is_public=True)
    (frame,) = code.arguments
    extension = code.word(frame, _EXTENSION)
    with code.builder.if_else(extension == 0) as (is_call, is_question):
        with is_call:
            _share(code, frame, share)
        with is_question:
            kind = code.load(extension + 8 * _EXTENSION_TYPE, I32, 4)
            with code.when(Int(code, code.builder.zext(kind, I64)) == _IS_METADATA):
                metadata = code.word(extension, _METADATA)
                code.store(I64(_VERSION), metadata + 8 * _METADATA_VERSION, 8)
    code.finish()


def _share(code: Code, frame: Int, share: ir.Function) -> None:
    """Cut a call into pieces, and have them run."""
    arguments, results = code.word(frame, _ARGUMENTS), code.word(frame, _RESULTS)
    buffers = [*(code.word(arguments, i) for i in range(4)), code.word(results)]
    data = [code.word(buffer, _DATA) for buffer in buffers]
    threads, n = code.number(data[0], THREADS), code.number(data[0], N)
    pieces = code.least(threads * _PIECES, (n + _UNIT - 1) // _UNIT)
    work = code.words(sharing.SIZE)
    code.store_words(work, *data, pieces)
    code.call(share, work, pieces, threads, code.word(frame, _API), code.word(frame, _CONTEXT))


def _piece(module: ir.Module, kernels: list[Kernel]) -> ir.Function:
    """A piece of a call: some outputs of each matrix's rows. Of its address, and which."""
    code = Code(module, "piece", 2)
    work, which = code.arguments
    numbers, x, weight, scales, out, pieces = (code.word(work, i) for i in range(sharing.SIZE))
    kind, k, n, groups, place, _, matrices = (code.number(numbers, i) for i in range(STARTS))
    units = (n + _UNIT - 1) // _UNIT
    first = units * which // pieces * _UNIT
    last = code.least(n, units * (which + 1) // pieces * _UNIT)
    for i, kernel in enumerate(kernels):
        with code.when(kind == i), code.range(0, matrices) as m:
            start, stop = code.number(numbers, m + STARTS), code.number(numbers, m + STARTS + 1)
            reach = code.number(numbers, matrices + m + STARTS + 1)
            wanted = last if i in SUMS else code.least(last, code.most(reach, first))
            end = code.least(last, code.most(wanted, first + kernel.outputs))
            rows, to = stop - start, out + start * n * (4 * kernel.rows)
            with code.when(code.builder.and_(start < stop, first < wanted)):
                code.call(
                    kernel.function, x + start * k * (kernel.x_bytes * kernel.rows),
                    weight + (place + m) * n * k * kernel.entry_bytes,
                    scales + (place + m) * groups * n * 2,
                    to, rows, first, end, k, groups, n, reach,
                )  # fmt: skip
            with code.range(0, rows * kernel.rows) as row, code.range(wanted, last) as output:
                code.store(ir.Constant(F32, 0.0), to + (row * n + output) * 4, 4)
    return code.finish()
