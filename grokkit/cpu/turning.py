"""Turning matrices round: of bytes, as fast as memory takes them, and of words of 4 bytes."""

import functools
from typing import Any

import numpy as np
from jaxtyping import Int8
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.np.numpy_support import carray

from grokkit.cpu.instructions import LANES, called_from_c, compiled, instruction, pointer

_SQUARE = 16
"""Bytes each way that are turned round at once: all processors have registers of this width."""
_LINE = 64
"""Bytes that are written at once, past the caches: else each line would first be read, and where
rows lie a power of two apart, many would have to share a few places of the cache."""

_BYTE, _WORD = ir.IntType(8), ir.IntType(32)


def turn(rows: Int8[np.ndarray, "row column"], to: Int8[np.ndarray, "column row"]) -> None:
    """Write a matrix turned round. Other threads of Python run meanwhile.

    It is fast where rows of `to` begin at multiples of 64 bytes.

    **Arguments:**

    - `rows`: to read, with entries of a row side by side.
    - `to`: to write, likewise.
    """
    assert rows.shape == to.shape[::-1] and rows.strides[1] == to.strides[1] == 1
    _function()(rows.ctypes.data, *rows.shape, rows.strides[0], to.ctypes.data, to.strides[0])


@functools.cache
def _function() -> Any:
    return called_from_c(_turn).ctypes


def _turn(
    source: int, n_rows: int, n_columns: int, source_bytes: int, target: int, target_bytes: int
) -> int:
    """Of addresses, and of distances from row to row in bytes."""
    aligned = target % _LINE == 0 and target_bytes % _LINE == 0
    for j in range(0, n_columns, _SQUARE):
        width = min(_SQUARE, n_columns - j)
        for i in range(0, n_rows, _LINE):
            height = min(_LINE, n_rows - i)
            a, b = source + i * source_bytes + j, target + j * target_bytes + i
            if aligned and width == _SQUARE and height == _LINE:
                _turn_squares(a, source_bytes, b, target_bytes)
            else:
                _turn_bytes(a, height, width, source_bytes, b, target_bytes)
    _finish_writing()
    return 0


@compiled
def _turn_bytes(
    source: int, n_rows: int, n_columns: int, source_bytes: int, target: int, target_bytes: int
) -> None:
    for j in range(n_columns):
        to = carray(pointer(target + j * target_bytes), n_rows, np.int8)
        for i in range(n_rows):
            to[i] = carray(pointer(source + i * source_bytes + j), 1, np.int8)[0]


@instruction
def _turn_squares(typing_context, source, source_bytes, target, target_bytes):
    """Write `_LINE` rows of `_SQUARE` bytes turned round."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, source_bytes, target, target_bytes = arguments

        def place(address: Any, i: int, row_bytes: Any, size: int) -> Any:
            address = builder.add(address, builder.mul(cgutils.intp_t(i), row_bytes))
            return builder.inttoptr(address, ir.VectorType(_BYTE, size).as_pointer())

        squares = []
        for first in range(0, _LINE, _SQUARE):
            places = [place(source, first + i, source_bytes, _SQUARE) for i in range(_SQUARE)]
            squares.append(_turned(builder, [builder.load(at, align=1) for at in places]))
        past_caches = builder.module.add_metadata([_WORD(1)])
        for i, (a, b, c, d) in enumerate(zip(*squares, strict=True)):
            upper, lower = (
                _shuffled(builder, *pair, range(_LINE // 2)) for pair in ((a, b), (c, d))
            )
            line = _shuffled(builder, upper, lower, range(_LINE))
            store = builder.store(line, place(target, i, target_bytes, _LINE), align=_LINE)
            store.set_metadata("nontemporal", past_caches)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 4), codegen


def _turned(builder: Any, rows: list[Any]) -> list[Any]:
    """A square, turned round.

    Each step lays the bytes of an upper row between those of a lower one, as cards are riffled;
    after as many steps as halve the square to nothing, each is in its place.
    """
    n = len(rows)
    riffled = [place // 2 + n * (place % 2) for place in range(2 * n)]
    for _ in range(n.bit_length() - 1):
        rows = [
            _shuffled(builder, a, b, half)
            for a, b in zip(rows[: n // 2], rows[n // 2 :], strict=True)
            for half in (riffled[:n], riffled[n:])
        ]
    return rows


def _shuffled(builder: Any, a: Any, b: Any, lanes: Any) -> Any:
    lanes = list(lanes)
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_WORD, len(lanes)), lanes))


@instruction
def _finish_writing(typing_context):
    """Let other threads see what was written past the caches."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


# Words


@compiled
def turn_words(
    source: int, height: int, width: int, source_bytes: int, target: int, target_bytes: int
) -> None:
    """Write rows of words as columns. Distances from row to row are in bytes."""
    for i in range(0, height, LANES):
        for j in range(0, width, LANES):
            a, b = source + i * source_bytes + 4 * j, target + j * target_bytes + 4 * i
            if i + LANES <= height and j + LANES <= width:
                _turn_square_of_words(a, source_bytes, b, target_bytes)
                continue
            for row in range(min(LANES, height - i)):
                for column in range(min(LANES, width - j)):
                    word = carray(pointer(a + row * source_bytes + 4 * column), 1, np.uint32)
                    to = carray(pointer(b + column * target_bytes + 4 * row), 1, np.uint32)
                    to[0] = word[0]


@instruction
def _turn_square_of_words(typing_context, source, source_bytes, target, target_bytes):
    """Write a square of `LANES` words each way, turned round."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, source_bytes, target, target_bytes = arguments
        words, places = ir.VectorType(_WORD, LANES), range(LANES)

        def place(address: Any, i: int, row_bytes: Any) -> Any:
            address = builder.add(address, builder.mul(cgutils.intp_t(i), row_bytes))
            return builder.inttoptr(address, words.as_pointer())

        rows = [builder.load(place(source, i, source_bytes), align=4) for i in places]
        # Exchange the off-diagonal halves of squares of 2, 4, ... words.
        half = 1
        while half < LANES:
            low = [i if not i & half else i - half + LANES for i in places]
            high = [i + half for i in low]
            for i in places:
                if not i & half:
                    pair = rows[i], rows[i + half]
                    rows[i], rows[i + half] = (
                        _shuffled(builder, *pair, lanes) for lanes in (low, high)
                    )
            half *= 2
        for i in places:
            builder.store(rows[i], place(target, i, target_bytes), align=4)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 4), codegen
