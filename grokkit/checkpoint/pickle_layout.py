"""The bytes around the payloads of an official tensor file, from shapes alone.

What CPython's pickler writes under protocol 4 for a `numpy.ndarray`, or for an object with an
int8 and a bfloat16 array, is reproduced instruction by instruction: the memo, and the frames
that protocol 4 cuts a stream into. So a file's size and header are known without its data, and
the data goes straight from its array to the file.

Source: CPython's `Modules/_pickle.c` for the framing rules (a frame closes once it holds 64 KiB;
bytes of 64 KiB and more stand outside), `Lib/pickletools.py` for the instructions.
"""

from typing import Any

import numpy as np

from grokkit.checkpoint.pickle_objects import (
    QUANTIZED,
    RECONSTRUCT,
    Global,
    Object,
    Payload,
    array_object,
)

_FRAME_TARGET = 64 * 1024
_FRAME_MIN = 4
_TUPLES = {1: b"\x85", 2: b"\x86", 3: b"\x87"}

Pieces = list[bytes | Payload]


def layout(
    weight: tuple[tuple[int, ...], np.dtype],
    scales: tuple[tuple[int, ...], np.dtype] | None = None,
    reconstruct: Global = RECONSTRUCT,
) -> Pieces:
    """A tensor file as literal bytes and the arrays' payloads, in order: the weight comes first.

    **Arguments:**

    - `weight`: shape and dtype of the array.
    - `scales`: shape and dtype of the scales; `None` for a plain array.
    - `reconstruct`: the name of numpy's function that rebuilds arrays; official files have
        numpy 1's.
    """
    value = array_object(*weight, reconstruct)
    if scales is not None:
        state = {"weight": value, "scales": array_object(*scales, reconstruct)}
        value = Object(QUANTIZED, (), state)
    return _Stream().pickled(value)


def layout_size(pieces: Pieces) -> int:
    """Bytes in the file."""
    return sum(piece.nbytes if isinstance(piece, Payload) else len(piece) for piece in pieces)


class _Stream:
    def __init__(self) -> None:
        self.out: Pieces = []
        self.frame: Pieces = []
        self.memo: dict[Any, int] = {}
        self.n_memoized = 0

    def pickled(self, value: Object) -> Pieces:
        self.save(value)
        self.frame.append(b".")
        self.close_frame()
        merged: Pieces = [b"\x80\x04"]
        for piece in self.out:
            if isinstance(piece, bytes) and isinstance(merged[-1], bytes):
                merged[-1] += piece
            else:
                merged.append(piece)
        return merged

    def save(self, value: Any) -> None:
        if layout_size(self.frame) >= _FRAME_TARGET:
            self.close_frame()
        add = self.frame.append
        shared = isinstance(value, str | bytes | Global)  # there once, in Python's memory too
        if shared and value in self.memo:
            add(b"h" + bytes([self.memo[value]]))
            return
        match value:
            case None | bool():
                add({None: b"N", True: b"\x88", False: b"\x89"}[value])
                return
            case int():
                add(_integer(value))
                return
            case ():
                add(b")")
                return
            case str():
                add(b"\x8c" + bytes([len(value)]) + value.encode("ascii"))
            case bytes():
                add(b"C" + bytes([len(value)]) + value)
            case tuple():
                if len(value) > 3:
                    add(b"(")
                for entry in value:
                    self.save(entry)
                add(_TUPLES.get(len(value), b"t"))
            case Global():
                self.save(value.module)
                self.save(value.name)
                add(b"\x93")
            case Payload():
                self.save_payload(value)
            case Object():
                self.save_object(value)
                return
            case dict():
                add(b"}")
                self.memoize()
                add(b"(")
                for name, entry in value.items():
                    self.save(name)
                    self.save(entry)
                add(b"u")
                return
        self.memoize(value if shared else None)

    def save_object(self, value: Object) -> None:
        self.save(value.maker)
        self.save(value.arguments)
        self.frame.append(b"\x81" if value.maker is QUANTIZED else b"R")
        self.memoize()
        self.save(value.state)
        self.frame.append(b"b")

    def save_payload(self, value: Payload) -> None:
        n = value.nbytes
        if n < 1 << 8:
            header = b"C" + n.to_bytes(1, "little")
        elif n < 1 << 32:
            header = b"B" + n.to_bytes(4, "little")
        else:
            header = b"\x8e" + n.to_bytes(8, "little")
        if n < _FRAME_TARGET:
            self.frame += [header, value]
        else:
            self.close_frame()
            self.out += [header, value]

    def memoize(self, value: Any = None) -> None:
        if value is not None:
            self.memo[value] = self.n_memoized
        self.n_memoized += 1
        self.frame.append(b"\x94")

    def close_frame(self) -> None:
        length = layout_size(self.frame)
        if length >= _FRAME_MIN:
            self.out.append(b"\x95" + length.to_bytes(8, "little"))
        self.out += self.frame
        self.frame.clear()


def _integer(value: int) -> bytes:
    if 0 <= value < 1 << 8:
        return b"K" + value.to_bytes(1, "little")
    if 0 <= value < 1 << 16:
        return b"M" + value.to_bytes(2, "little")
    return b"J" + value.to_bytes(4, "little", signed=True)
