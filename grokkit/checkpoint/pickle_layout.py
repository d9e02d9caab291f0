"""The bytes around the payloads of an official tensor file, from shapes alone.

What CPython's pickler writes under protocol 4 for a `numpy.ndarray`, or for an object with an
int8 and a bfloat16 array, is reproduced instruction by instruction: the memo, and the frames
that protocol 4 cuts a stream into. So a file's size and header are known without its data, and
the data goes straight from its array to the file.

Source: CPython's `Modules/_pickle.c` for the framing rules (a frame closes once it holds 64 KiB;
bytes of 64 KiB and more stand outside), `Lib/pickletools.py` for the instructions.
"""

import dataclasses
import math
from collections.abc import Hashable

import numpy as np

from grokkit.checkpoint.pickle_objects import (
    BFLOAT16,
    BFLOAT16_TYPE,
    DTYPE,
    FLOAT32,
    INT8,
    NDARRAY,
    QUANTIZED,
    RECONSTRUCT,
    Global,
)

_FRAME_TARGET = 64 * 1024
_FRAME_MIN = 4


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where the bytes of an array go: number 0 is the weight, 1 the scales."""

    number: int
    nbytes: int


# numpy's arguments and state for each dtype, as it pickles them.
_DTYPE_CODES: dict[np.dtype, tuple[str | Global, tuple[object, ...]]] = {
    FLOAT32: ("f4", (3, "<", None, None, None, -1, -1, 0)),
    INT8: ("i1", (3, "|", None, None, None, -1, -1, 0)),
    BFLOAT16: (BFLOAT16_TYPE, (3, "<", None, None, None, 2, 2, 64)),
}
SUPPORTED_DTYPES = tuple(_DTYPE_CODES)


def layout(
    weight: tuple[tuple[int, ...], np.dtype],
    scales: tuple[tuple[int, ...], np.dtype] | None = None,
    reconstruct: Global = RECONSTRUCT,
) -> list[bytes | Slot]:
    """A tensor file as literal bytes and slots for the arrays' bytes, in order.

    **Arguments:**

    - `weight`: shape and dtype of the array.
    - `scales`: shape and dtype of the scales; `None` for a plain array.
    - `reconstruct`: the name of numpy's function that rebuilds arrays; official files have
        numpy 1's.
    """
    stream = _Stream()
    if scales is None:
        stream.array(*weight, 0, reconstruct)
    else:
        stream.quantized(weight, scales, reconstruct)
    return stream.finish()


def layout_size(pieces: list[bytes | Slot]) -> int:
    """Bytes in the file."""
    return sum(piece.nbytes if isinstance(piece, Slot) else len(piece) for piece in pieces)


class _Stream:
    def __init__(self) -> None:
        self.out: list[bytes | Slot] = [b"\x80\x04"]
        self.frame: list[bytes | Slot] = []
        self.memo: dict[Hashable, int] = {}

    def finish(self) -> list[bytes | Slot]:
        self.frame.append(b".")
        self._close_frame()
        merged: list[bytes | Slot] = []
        for piece in self.out:
            if merged and isinstance(piece, bytes) and isinstance(merged[-1], bytes):
                merged[-1] += piece
            else:
                merged.append(piece)
        return merged

    # Objects, in the order in which numpy's __reduce__ gives them

    def quantized(
        self,
        weight: tuple[tuple[int, ...], np.dtype],
        scales: tuple[tuple[int, ...], np.dtype],
        reconstruct: Global,
    ) -> None:
        self._global(QUANTIZED)
        self._add(b")\x81")
        self._memoize(object())
        self._boundary()
        self._add(b"}")
        self._memoize(object())
        self._add(b"(")
        self._text("weight")
        self.array(*weight, 0, reconstruct)
        self._text("scales")
        self.array(*scales, 1, reconstruct)
        self._add(b"ub")

    def array(
        self, shape: tuple[int, ...], dtype: np.dtype, number: int, reconstruct: Global
    ) -> None:
        self._boundary()
        self._global(reconstruct)
        self._global(NDARRAY)
        self._tuple((0,))
        self._type_code()
        self._add(b"\x87")
        self._memoize(object())
        self._add(b"R")
        self._memoize(object())
        self._add(b"(K\x01")
        self._tuple(shape)
        self._dtype(dtype)
        self._add(b"\x89")
        self._payload(Slot(number, math.prod(shape) * dtype.itemsize))
        self._add(b"t")
        self._memoize(object())
        self._add(b"b")

    def _type_code(self) -> None:
        """The placeholder b"b" that every array is rebuilt from; one object, so remembered."""
        if self._recall(b"b"):
            return
        self._add(b"C\x01b")
        self._memoize(b"b")

    def _dtype(self, dtype: np.dtype) -> None:
        if self._recall(dtype):
            return
        code, state = _DTYPE_CODES[dtype]
        self._global(DTYPE)
        if isinstance(code, Global):
            self._global(code)
        else:
            self._text(code)
        self._add(b"\x89\x88\x87")
        self._memoize(object())
        self._add(b"R")
        self._memoize(dtype)
        self._tuple(state)
        self._add(b"b")

    # Values

    def _global(self, name: Global) -> None:
        if self._recall(name):
            return
        self._text(name.module)
        self._text(name.name)
        self._add(b"\x93")
        self._memoize(name)

    def _text(self, text: str) -> None:
        if self._recall(text):
            return
        raw = text.encode("utf-8")
        self._add(b"\x8c" + bytes([len(raw)]) + raw)
        self._memoize(text)

    def _tuple(self, values: tuple[object, ...]) -> None:
        self._boundary()
        if not values:
            self._add(b")")
            return
        if len(values) > 3:
            self._add(b"(")
        for value in values:
            match value:
                case str():
                    self._text(value)
                case int():
                    self._integer(value)
                case None:
                    self._boundary()
                    self._add(b"N")
        self._add({1: b"\x85", 2: b"\x86", 3: b"\x87"}.get(len(values), b"t"))
        self._memoize(object())

    def _integer(self, value: int) -> None:
        self._boundary()
        if 0 <= value < 1 << 8:
            self._add(b"K" + value.to_bytes(1, "little"))
        elif 0 <= value < 1 << 16:
            self._add(b"M" + value.to_bytes(2, "little"))
        else:
            self._add(b"J" + value.to_bytes(4, "little", signed=True))

    def _payload(self, slot: Slot) -> None:
        self._boundary()
        if slot.nbytes < 1 << 8:
            header = b"C" + slot.nbytes.to_bytes(1, "little")
        elif slot.nbytes < 1 << 32:
            header = b"B" + slot.nbytes.to_bytes(4, "little")
        else:
            header = b"\x8e" + slot.nbytes.to_bytes(8, "little")
        if slot.nbytes < _FRAME_TARGET:
            self._add(header)
            self.frame.append(slot)
        else:
            self._close_frame()
            self.out += [header, slot]
        self._memoize(slot)

    # The memo and the frames

    def _recall(self, key: Hashable) -> bool:
        self._boundary()
        index = self.memo.get(key)
        if index is None:
            return False
        self._add(b"h" + bytes([index]))
        return True

    def _memoize(self, key: Hashable) -> None:
        self.memo[key] = len(self.memo)
        self._add(b"\x94")

    def _add(self, instruction: bytes) -> None:
        self.frame.append(instruction)

    def _boundary(self) -> None:
        """The pickler's check before each value: a full frame is closed."""
        if layout_size(self.frame) >= _FRAME_TARGET:
            self._close_frame()

    def _close_frame(self) -> None:
        length = layout_size(self.frame)
        if length >= _FRAME_MIN:
            self.out.append(b"\x95" + length.to_bytes(8, "little"))
        self.out += self.frame
        self.frame = []
