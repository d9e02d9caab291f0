"""Turning matrices round: of bytes, as fast as memory takes them, and of words of 4 bytes."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int8
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.np.numpy_support import carray

from grokkit.cpu.instructions import (
    LANES,
    LINE,
    address_of,
    called_from_c,
    compiled,
    instruction,
    pointer,
    prefetch,
    words,
)

_LANE = 16
"""Bytes that processors shuffle fast: in wider registers each such part by itself."""

_BYTE, _WORD = ir.IntType(8), ir.IntType(32)


def turn(
    rows: Int8[np.ndarray, "row column"],
    places: Sequence[tuple[int, Int8[np.ndarray, "some_columns row"]]],
) -> None:
    """Write columns of a matrix turned round. Other threads of Python run meanwhile.

    Lines are written whole, past the caches: else each would first be read.

    It is fast where rows of what is written begin at multiples of 64 bytes.

    **Arguments:**

    - `rows`: to read, with entries of a row side by side.
    - `places`: first columns, and where to write as many as there is room for, likewise.
    """
    listed = np.empty((len(places), _PLACE), np.int64)
    for i, (first, to) in enumerate(places):
        assert to.shape[1] == rows.shape[0] and first + to.shape[0] <= rows.shape[1]
        assert rows.strides[1] == to.strides[1] == 1
        listed[i] = first, to.shape[0], _address(to), to.strides[0]
    _function()(_address(rows), rows.shape[0], rows.strides[0], _address(listed), len(places))


_PLACE = 4  # numbers: the first column, how many, an address and a distance from row to row


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]  # in half the time that array.ctypes takes


@functools.cache
def _function() -> Any:
    return called_from_c(_turn).ctypes


def _turn(source: int, n_rows: int, source_bytes: int, places_at: int, n_places: int) -> int:
    """Of addresses, and of distances from row to row in bytes."""
    for i in range(0, n_rows, LINE):
        height, strip = min(LINE, n_rows - i), source + i * source_bytes
        for p in range(n_places):
            place = words(places_at + 8 * _PLACE * p, _PLACE)
            n_columns, target_bytes = place[1], place[3]
            a, b = strip + place[0], place[2] + i
            aligned = b % LINE == 0 and target_bytes % LINE == 0 and height == LINE
            for j in range(0, n_columns, LINE):
                width, to = min(LINE, n_columns - j), b + j * target_bytes
                if aligned and width == LINE:
                    _turn_square(a + j, source_bytes, to, target_bytes)
                else:
                    _turn_bytes(a + j, height, width, source_bytes, to, target_bytes)
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


def _square_turner(past_caches: bool) -> Any:
    """A function for compiled code that writes `LINE` rows of as many bytes turned round: past the
    caches, or into them."""

    def turn_square(typing_context, source, source_bytes, target, target_bytes):
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            source, source_bytes, target, target_bytes = arguments

            def place(address: Any, i: int, row_bytes: Any) -> Any:
                address = builder.add(address, builder.mul(cgutils.intp_t(i), row_bytes))
                return builder.inttoptr(address, ir.VectorType(_BYTE, LINE).as_pointer())

            # The next square's rows, which the processor does not foresee: on the right, or below.
            rows_on = builder.mul(cgutils.intp_t(LINE), source_bytes)
            step = cgutils.intp_t(LINE) if past_caches else rows_on
            turned = []  # of each lane a square
            for first in range(0, LINE, _LANE):
                places = [place(source, first + i, source_bytes) for i in range(_LANE)]
                for at in places:
                    prefetch(builder, builder.add(builder.ptrtoint(at, cgutils.intp_t), step))
                turned.append(_turned(builder, [builder.load(at, align=1) for at in places]))
            only = builder.module.add_metadata([_WORD(1)])
            for i, rows in enumerate(zip(*turned, strict=True)):
                for lane, line in enumerate(_exchanged(builder, rows)):
                    at = place(target, _LANE * lane + i, target_bytes)
                    store = builder.store(line, at, align=LINE)
                    if past_caches:
                        store.set_metadata("nontemporal", only)
            return context.get_dummy_value()

        return types.void(*(types.int64,) * 4), codegen

    return instruction(turn_square)


_turn_square, _turn_square_into_cache = _square_turner(True), _square_turner(False)


@compiled
def first_line(memory: Any) -> int:
    """The address of the first line of the caches that begins in some memory."""
    return address_of(memory) + -address_of(memory) % LINE


@compiled
def turn_into_cache(
    source: int, n_rows: int, n_columns: int, source_bytes: int, target: int, target_bytes: int
) -> None:
    """Write a matrix of bytes turned round, to be read at once.

    Of addresses, and distances from row to row in bytes. It is fast where rows of what is written
    begin at lines of the caches; there must be room for a multiple of `LINE` of them.
    """
    aligned = target % LINE == 0 and target_bytes % LINE == 0
    square = np.empty((LINE, LINE), np.int8)
    for i in range(0, n_rows, LINE):
        height = min(LINE, n_rows - i)
        for j in range(0, n_columns, LINE):
            width = min(LINE, n_columns - j)
            a, b = source + i * source_bytes + j, target + j * target_bytes + i
            if not aligned or height < LINE:
                _turn_bytes(a, height, width, source_bytes, b, target_bytes)
            elif width == LINE:
                _turn_square_into_cache(a, source_bytes, b, target_bytes)
            else:  # the last columns; what is turned besides is in nobody's way
                for row in range(LINE):
                    square[row, :width] = carray(pointer(a + row * source_bytes), width, np.int8)
                _turn_square_into_cache(address_of(square), LINE, b, target_bytes)


def _turned(builder: Any, rows: list[Any]) -> list[Any]:
    """A square, turned round; of longer rows that of each lane.

    Each step lays the bytes of an upper row between those of a lower one, as cards are riffled;
    after as many steps as halve the square to nothing, each is in its place.
    """
    n, width = len(rows), rows[0].type.count
    halves = [
        [lane + first + place // 2 + width * (place % 2)
         for lane in range(0, width, n) for place in range(n)]
        for first in (0, n // 2)
    ]  # fmt: skip
    for _ in range(n.bit_length() - 1):
        rows = [
            _shuffled(builder, a, b, half)
            for a, b in zip(rows[: n // 2], rows[n // 2 :], strict=True)
            for half in halves
        ]
    return rows


def _exchanged(builder: Any, rows: Any) -> list[Any]:
    """Of four rows of four lanes the first lanes of each, the second ones, and so on."""

    def lanes(a: Any, b: Any, *which: int) -> Any:
        """Such lanes of the first row, and then of the second."""
        ends = [first + _LANE * lane for first in (0, LINE) for lane in which]
        return _shuffled(builder, a, b, [end + i for end in ends for i in range(_LANE)])

    a, b, c, d = rows
    found = []
    for half in ((0, 1), (2, 3)):
        upper, lower = lanes(a, b, *half), lanes(c, d, *half)
        found += [lanes(upper, lower, first, first + 2) for first in (0, 1)]
    return found


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
