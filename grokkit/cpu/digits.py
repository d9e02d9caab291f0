"""Rows of floats as whole numbers of three digits of 8 bits each, as fast as they are read."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from grokkit.cpu.instructions import LANES, instruction, load, splat

DIGITS = 3
LARGEST = 0x7F7F7F
"""The largest number that has three digits from -128 to 127."""
_MIDDLES = 0x808080

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_F32, _F64 = ir.FloatType(), ir.DoubleType()


@instruction
def largest_bits(typing_context, entries, n):
    """The bits of the largest of float32 entries, without signs; of an infinity or what is no
    number, if there is one, more than all others'. The arguments are an address and an integer."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        entries, n = arguments
        found = [cgutils.alloca_once_value(builder, _zeros(width)) for width in (LANES, 1)]
        for place, (first, last, width) in zip(found, _parts(builder, n), strict=True):
            kind = _several(_I32, width)
            with cgutils.for_range_slice(builder, first, last, _I64(width)) as (i, _):
                bits = load(builder, builder.add(entries, builder.mul(i, _I64(4))), kind, 4)
                bits = builder.and_(bits, _each(kind, 0x7FFFFFFF))
                most = builder.load(place)
                larger = builder.icmp_signed(">", bits, most)
                builder.store(builder.select(larger, bits, most), place)
        kind = ir.FunctionType(_I32, [_several(_I32, LANES)])
        name = f"llvm.vector.reduce.smax.v{LANES}i32"
        reduce = cgutils.get_or_insert_function(builder.module, kind, name)
        most, other = builder.call(reduce, [builder.load(found[0])]), builder.load(found[1])
        most = builder.select(builder.icmp_signed(">", other, most), other, most)
        return builder.zext(most, _I64)

    return types.int64(types.int64, types.int64), codegen


@instruction
def write_digits(typing_context, entries, n, factor, digits, digit_bytes):
    """Write float32 entries times a factor, rounded to whole numbers, as digits.

    The arguments are integers, but for `factor`, in float64: the address of the entries, how many,
    the factor, where to write the lowest digits, in int8, and how far on the next ones.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        entries, n, factor, digits, digit_bytes = arguments
        for first, last, width in _parts(builder, n):
            doubles, words = _several(_F64, width), _several(_I32, width)
            suffix = f"v{width}f64" if width > 1 else "f64"
            kind = ir.FunctionType(doubles, [doubles])
            nearest = cgutils.get_or_insert_function(
                builder.module, kind, f"llvm.roundeven.{suffix}"
            )
            factors = splat(builder, factor, width) if width > 1 else factor
            with cgutils.for_range_slice(builder, first, last, _I64(width)) as (i, _):
                at = builder.add(entries, builder.mul(i, _I64(4)))
                numbers = builder.fpext(load(builder, at, _several(_F32, width), 4), doubles)
                numbers = builder.call(nearest, [builder.fmul(numbers, factors)])
                # So that each byte, less 128, is a digit; to take 128 off is to turn its first bit.
                bits = builder.add(builder.fptosi(numbers, words), _each(words, _MIDDLES))
                bits = builder.xor(bits, _each(words, _MIDDLES))
                for d in range(DIGITS):
                    digit = builder.lshr(bits, _each(words, 8 * d))
                    digit = builder.trunc(digit, _several(_I8, width))
                    to = builder.add(builder.add(digits, i), builder.mul(digit_bytes, _I64(d)))
                    place = builder.inttoptr(to, digit.type.as_pointer())
                    builder.store(digit, place, align=1)
        return context.get_dummy_value()

    integer = types.int64
    return types.void(integer, integer, types.float64, integer, integer), codegen


def _parts(builder: Any, n: Any) -> list[tuple[Any, Any, int]]:
    """What to do a register at a time, and what is left one by one: from, to and width."""
    whole = builder.mul(builder.sdiv(n, _I64(LANES)), _I64(LANES))
    return [(_I64(0), whole, LANES), (whole, n, 1)]


def _several(kind: Any, width: int) -> Any:
    return ir.VectorType(kind, width) if width > 1 else kind


def _each(kind: Any, number: int) -> Any:
    return ir.Constant(kind, [number] * kind.count if isinstance(kind, ir.VectorType) else number)


def _zeros(width: int) -> Any:
    return _each(_several(_I32, width), 0)
