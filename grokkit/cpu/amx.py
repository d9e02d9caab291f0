"""Intel's Advanced Matrix Extensions: registers that are tiles of up to 16 rows of 64 bytes, and an
instruction that multiplies two of them.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18, and
volume 2 (LDTILECFG, TILELOADD, TDPBSSD); for the permission, the Linux kernel's
Documentation/arch/x86/xstate.rst.
"""

import ctypes
import functools
import sys
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from grokkit.cpu.instructions import HAS_AMX, instruction, load, prefetch, splat, widened

CHUNK = 64
"""Entries of a row of a tile."""
SIDE = 16
"""Rows of a tile, at most; and sums in each."""
MOST_TILES = 6
"""Tiles of sums that are kept at once."""
TILE_BYTES = SIDE * CHUNK

_SUMS, _MATRIX, _ROWS = 0, MOST_TILES, MOST_TILES + 1
"""The first of the registers for sums, that for the matrix and that for what it meets."""
_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_FLOAT = ir.FloatType()
_INTEGERS, _FLOATS = ir.VectorType(_I32, SIDE), ir.VectorType(_FLOAT, SIDE)


@functools.cache
def is_there() -> bool:
    """Whether the processor has them and the system lets this process use them.

    Linux saves such large registers only for a process that has asked.
    """
    if not HAS_AMX or sys.platform != "linux":
        return False
    arch_prctl, request, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request, tile_data) == 0


def _call(builder: Any, name: str, *arguments: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [a.type for a in arguments])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}")
    builder.call(function, arguments)


def _pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, cgutils.voidptr_t)


@instruction
def configure(typing_context, outputs):
    """Set the tiles' sizes: all are whole, but that the matrix has so many outputs."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        # A number, and for 16 registers bytes of a row, in two bytes each, and how many rows.
        numbers = [1] + 15 * [0] + 8 * [CHUNK, 0] + 16 * [0] + 8 * [SIDE] + 8 * [0]
        memory = cgutils.alloca_once(builder, ir.ArrayType(_I8, len(numbers)))
        builder.store(ir.Constant(memory.type.pointee, numbers), memory)
        for register in range(_ROWS):
            place = cgutils.gep_inbounds(builder, memory, 0, 48 + register)
            builder.store(builder.trunc(arguments[0], _I8), place)
        _call(builder, "ldtilecfg", builder.bitcast(memory, cgutils.voidptr_t))
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@instruction
def release(typing_context):
    """Leave the tiles empty, so that the system need not save them."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), codegen


def product_adder(tiles: int) -> Any:
    """A function for compiled code that adds some groups' products of some outputs to totals.

    Its arguments are integers:

    - `weight`: address of the first output's entries, in int8.
    - `weight_bytes`: from output to output.
    - `groups`, `size`: how many groups, and entries of each, at least `CHUNK`. They are taken
        `CHUNK` at a time; a group's last chunk ends with its last entry, and meets zeros where it
        overlaps the one before.
    - `scales`: address of the outputs' scales, in bfloat16 [group, output].
    - `scales_bytes`: from group to group of these.
    - `outputs`: how many there are.
    - `columns`: address of what they meet, in int8 [group, chunk, entry // 4, column, entry % 4].
        There are so many tiles of them.
    - `column_scales`: address of the columns' scales, in float32 [group, column].
    - `totals`: address of the totals, in float32 [output, column].
    - `columns_bytes`, `totals_bytes`: from tile to tile of columns and their scales, and of totals.
    - `ahead`: bytes from the entries that are multiplied to those that are called for from memory.
    """

    def add(
        typing_context, weight, weight_bytes, groups, size, scales, scales_bytes, outputs, columns,
        column_scales, totals, columns_bytes, totals_bytes, ahead,
    ):  # fmt: skip
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            weight, weight_bytes, groups, size, *arguments = arguments
            scales, scales_bytes, outputs, columns, column_scales, totals, *arguments = arguments
            *distances, ahead = arguments
            with builder.goto_entry_block():  # alloca_once would fill it with zeros at each call
                room = builder.alloca(ir.ArrayType(_I8, TILE_BYTES))
                floats = builder.alloca(ir.ArrayType(_FLOAT, SIDE))
            room.align = floats.align = CHUNK
            sums, by_output = builder.ptrtoint(room, _I64), builder.ptrtoint(floats, _I64)
            chunks = builder.sdiv(builder.add(size, _I64(CHUNK - 1)), _I64(CHUNK))
            group_bytes = builder.mul(chunks, _I64(TILE_BYTES))
            with cgutils.for_range(builder, groups) as loop:

                def of_group(address: Any, width: Any, loop: Any = loop) -> Any:
                    return builder.add(address, builder.mul(loop.index, width))

                def of_tile(address: Any, width: Any, t: int) -> Any:
                    return builder.add(address, builder.mul(width, _I64(t)))

                first = of_group(columns, group_bytes)
                first = [of_tile(first, distances[0], t) for t in range(tiles)]
                entries = of_group(weight, size)
                _sum_products(builder, entries, weight_bytes, size, chunks, first, ahead)
                numbers = _as_floats(builder, of_group(scales, scales_bytes), outputs)
                _store(builder, by_output, numbers)
                for t in range(tiles):
                    # In the same place, which stays in the first cache.
                    at = _pointer(builder, sums)
                    _call(builder, "tilestored64", _I8(_SUMS + t), at, _I64(CHUNK))
                    by_column = of_tile(of_group(column_scales, _I64(CHUNK)), distances[0], t)
                    _add_up(builder, sums, by_output, by_column, of_tile(totals, distances[1], t))
            return context.get_dummy_value()

        return types.void(*(types.int64,) * 13), codegen

    return instruction(add)


def _sum_products(
    builder: Any, weight: Any, weight_bytes: Any, size: Any, chunks: Any, columns: list[Any],
    ahead: Any,
) -> None:  # fmt: skip
    """Leave in registers the sums of a group's products with each tile of columns."""
    for t in range(len(columns)):
        _call(builder, "tilezero", _I8(_SUMS + t))
    last = builder.sub(size, _I64(CHUNK))
    with cgutils.for_range(builder, chunks) as loop:
        entry = builder.mul(loop.index, _I64(CHUNK))
        entry = builder.select(builder.icmp_signed("<", entry, last), entry, last)
        entry = builder.add(weight, entry)
        soon = builder.add(entry, ahead)
        for output in range(SIDE):
            at = builder.add(soon, builder.mul(weight_bytes, _I64(output)))
            prefetch(builder, at)
        _call(builder, "tileloadd64", _I8(_MATRIX), _pointer(builder, entry), weight_bytes)
        for t, first in enumerate(columns):
            at = builder.add(first, builder.mul(loop.index, _I64(TILE_BYTES)))
            _call(builder, "tileloadd64", _I8(_ROWS), _pointer(builder, at), _I64(CHUNK))
            _call(builder, "tdpbssd", _I8(_SUMS + t), _I8(_MATRIX), _I8(_ROWS))


def _as_floats(builder: Any, numbers: Any, n: Any) -> Any:
    """So many numbers in bfloat16, and zeros."""
    halves, mask = ir.VectorType(ir.IntType(16), SIDE), ir.VectorType(ir.IntType(1), SIDE)
    kind = ir.FunctionType(halves, [cgutils.voidptr_t, _I32, mask, halves])
    name = "llvm.masked.load.v16i16.p0"
    masked_load = cgutils.get_or_insert_function(builder.module, kind, name)
    lanes = ir.Constant(_INTEGERS, list(range(SIDE)))
    are_there = builder.icmp_signed("<", lanes, splat(builder, builder.trunc(n, _I32), SIDE))
    zeros = ir.Constant(halves, [0] * SIDE)
    found = builder.call(masked_load, [_pointer(builder, numbers), _I32(2), are_there, zeros])
    return widened(builder, found)


def _add_up(builder: Any, sums: Any, scales: Any, column_scales: Any, totals: Any) -> None:
    """Add a tile's sums, times the scales of their outputs and columns, to its totals.

    Outputs that are not there have scales of zero, and room among the sums and totals.
    """
    by_column = load(builder, column_scales, _FLOATS, 4)
    for output in range(SIDE):
        row = _I64(output * CHUNK)
        scale = load(builder, builder.add(scales, _I64(4 * output)), _FLOAT, 4)
        scale = splat(builder, scale, SIDE)
        found = builder.sitofp(load(builder, builder.add(sums, row), _INTEGERS, 4), _FLOATS)
        found = builder.fmul(builder.fmul(found, by_column), scale, flags=("contract",))
        to = builder.add(totals, row)
        found = builder.fadd(found, load(builder, to, _FLOATS, 4), flags=("contract",))
        _store(builder, to, found)


def _store(builder: Any, address: Any, value: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=4)
