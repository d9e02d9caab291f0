"""Intel's Advanced Matrix Extensions: registers, here tiles of 16 rows of 64 bytes, and an
instruction that multiplies two of them.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18, and
volume 2 (LDTILECFG, TILELOADD, TDPBF16PS); for the permission, the Linux kernel's
Documentation/arch/x86/xstate.rst.
"""

import ctypes
import functools
import sys

from llvmlite import ir

from grokkit.kernels.cpu.code import I8, Code, Int, intrinsic

ROWS, ROW_BYTES = 16, 64


@functools.cache
def are_allowed() -> bool:
    """Whether the system lets this process use them: Linux saves such large registers only for a
    process that has asked."""
    if sys.platform != "linux":
        return False
    arch_prctl, request, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request, tile_data) == 0


def configure(code: Code) -> None:
    """Make all tiles whole, in the function that is being written and those that it calls."""
    # The layout's number, and for 16 registers bytes of a row, in two bytes each, and rows.
    numbers = [1] + 15 * [0] + 8 * [ROW_BYTES, 0] + 16 * [0] + 8 * [ROWS] + 8 * [0]
    room = code.words(len(numbers) // 8)
    code.store(ir.Constant(ir.ArrayType(I8, len(numbers)), numbers), room)
    instruction(code, "ldtilecfg", room)


def instruction(code: Code, name: str, *operands: int | Int) -> None:
    """Write an instruction: of tiles, which are numbers from 0 to 7; an address; and a distance from
    row to row in bytes."""
    values = [I8(o) if isinstance(o, int) else o.value for o in operands]
    at = next((i for i, o in enumerate(operands) if isinstance(o, Int)), None)
    if at is not None:
        values[at] = code.builder.inttoptr(values[at], I8.as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
    code.builder.call(intrinsic(code, f"llvm.x86.{name}", kind), values)
