"""What the loops of this package are made of: Numba's functions, and what it lacks."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import cfunc, config, njit, types
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic
from numba.np.numpy_support import carray

_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
_FEATURES = (getattr(config, "CPU_FEATURES", None) or get_host_cpu_features()).split(",")
HAS_512_BITS = "+avx512f" in _FEATURES
HAS_BFLOAT16_PAIRS = HAS_512_BITS and "+avx512bf16" in _FEATURES
"""Whether the processor multiplies bfloat16 numbers two at a time."""
HAS_AMX = HAS_512_BITS and {"+amx-tile", "+amx-int8"} <= set(_FEATURES)
"""Whether the processor multiplies tiles of whole numbers of 8 bits."""
LANES = 16 if HAS_512_BITS else 8
"""Floats that the processor multiplies at once."""
LINE = 64
"""Bytes of a line of the caches. Lines are read whole, and once: where rows lie a power of two
apart, many would have to share a few places of the cache."""


def compiled(function: Callable[..., Any]) -> Any:
    """The function compiled when it is first called from compiled code."""
    # Without what a checker of types may have put round it, which cannot be compiled.
    # Nor with checks for division by nothing.
    return njit(inspect.unwrap(function), error_model="numpy")


def instruction(function: Callable[..., Any]) -> Any:
    """A function that stands for instructions of the compiler's own language."""
    return intrinsic(inspect.unwrap(function))


def called_from_c(function: Callable[..., Any]) -> Any:
    """The function, of integers, compiled for calls from C; takes seconds.

    The compiled code is kept on disk, where Numba finds it again by the date of the function's
    file and by what the function closes over.
    """
    function = inspect.unwrap(function)
    signature = types.int64(*(types.int64,) * function.__code__.co_argcount)
    try:
        return cfunc(signature, cache=True)(function)
    except RuntimeError:  # no folder that could be written to
        return cfunc(signature)(function)


@instruction
def call(typing_context, function, a, b):
    """Call a compiled function of two integers at an address."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function, a, b = arguments
        kind = ir.FunctionType(_I64, [_I64, _I64]).as_pointer()
        return builder.call(builder.inttoptr(function, kind), [a, b])

    return types.int64(*(types.int64,) * 3), codegen


@instruction
def pointer(typing_context, address):
    """An integer as a pointer."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


@instruction
def float_of(typing_context, bits):
    """The float32 of an integer's lower bits."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.trunc(arguments[0], _I32), _F32)

    return types.float32(types.int64), codegen


def prefetch(builder: Any, address: Any) -> None:
    """Call for memory before it is needed; an address where there is none does no harm."""
    kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, _I32, _I32, _I32])
    call = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    to_read, into_second_cache, data = _I32(0), _I32(2), _I32(1)
    address = builder.inttoptr(address, cgutils.voidptr_t)
    builder.call(call, [address, to_read, into_second_cache, data])


def load(builder: Any, address: Any, kind: Any, align: int) -> Any:
    """What is at an address, of a type of the compiler's language."""
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)


def widened(builder: Any, halves: Any) -> Any:
    """Numbers in bfloat16, given as bits, as float32: they are the upper halves of these."""
    words, floats, sixteen = _I32, _F32, 16
    if isinstance(halves.type, ir.VectorType):
        n = halves.type.count
        words, floats, sixteen = ir.VectorType(_I32, n), ir.VectorType(_F32, n), [16] * n
    bits = builder.shl(builder.zext(halves, words), ir.Constant(words, sixteen))
    return builder.bitcast(bits, floats)


def splat(builder: Any, number: Any, lanes: int) -> Any:
    """The number in every lane of a vector."""
    nothing = ir.Constant(ir.VectorType(number.type, lanes), ir.Undefined)
    first = builder.insert_element(nothing, number, _I32(0))
    zeros = ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes)
    return builder.shuffle_vector(first, nothing, zeros)


def on(builder: Any, address: Any, count: Any, width: Any) -> Any:
    """The address so many times so many bytes on."""
    count, width = (_I64(n) if isinstance(n, int) else n for n in (count, width))
    return builder.add(address, builder.mul(count, width))


def multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once where the processor can."""
    product = builder.fmul(a, b, flags=("contract",))
    return builder.fadd(product, c, flags=("contract",))


def one_of(functions: list[Any]) -> Any:
    """A function for compiled code that calls the first, the second, ... of five functions at most
    with the same arguments, given as a tuple."""
    one, two, three, four, five = (functions + functions[-1:] * 4)[:5]

    def call(which: int, arguments: Any) -> None:
        if which == 1:
            one(*arguments)
        elif which == 2:
            two(*arguments)
        elif which == 3:
            three(*arguments)
        elif which == 4:
            four(*arguments)
        else:
            five(*arguments)

    return compiled(call)


@compiled
def address_of(array: Any) -> Any:
    """Where an array's entries lie; nothing keeps them there after the array's last mention."""
    return np.int64(array.ctypes.data)


@compiled
def words(address: int, n: int) -> Any:
    """Memory as an array of integers."""
    return carray(pointer(address), (n,), dtype=np.int64)


@compiled
def copy_rows(
    source: int, source_bytes: int, target: int, target_bytes: int, rows: int, row: int
) -> None:
    """Copy rows of some bytes. Of addresses, and distances from row to row in bytes."""
    for i in range(rows):
        a = carray(pointer(source + i * source_bytes), row, np.int8)
        b = carray(pointer(target + i * target_bytes), row, np.int8)
        for j in range(row):
            b[j] = a[j]


def atomic(operation: str) -> Any:
    """A function that changes the number at an address in one step, and returns the former one."""

    @instruction
    def change(typing_context, address, value):
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            place = builder.inttoptr(arguments[0], cgutils.intp_t.as_pointer())
            return builder.atomic_rmw(operation, place, arguments[1], "seq_cst")

        return types.int64(types.int64, types.int64), codegen

    return change
