"""Writes official tensor files, byte for byte as CPython pickles them under protocol 4.

The pickler's work is done again on descriptions of arrays, instruction by instruction: the memo, and
the frames that a stream is cut into. So a file's size and header are known without its data, and the
data goes straight from its array to the file.

Source: CPython's `Modules/_pickle.c` for the framing rules (a frame closes once it holds 64 KiB;
bytes of 64 KiB and more stand outside), `Lib/pickletools.py` for the instructions.
"""

import os
from typing import Any

import numpy as np
from jaxtyping import Shaped

from grokkit.checkpoint.pickle_objects import (
    BFLOAT16,
    INT8,
    INTEGERS,
    MAX_NDIM,
    PAYLOADS,
    QUANTIZED,
    RECONSTRUCT,
    SUPPORTED_DTYPES,
    TUPLES,
    Global,
    Object,
    Payload,
    array_object,
)
from grokkit.checkpoint.refusal import refusal
from grokkit.runtime.files import replacing

_LARGEST_DIMENSION = (1 << 31) - 1
_FRAME_TARGET = 64 * 1024
_FRAME_MIN = 4

Pieces = list[bytes | Payload]


def encoded_size(
    shape: tuple[int, ...], dtype: np.dtype, scales_shape: tuple[int, ...] | None = None
) -> int:
    """Bytes of a tensor file, known without its data.

    **Arguments:**

    - `shape`: of the array, or of the int8 matrix.
    - `dtype`: of the array: float32, int8 or bfloat16.
    - `scales_shape`: of the bfloat16 scales; `None` for a plain array.
    """
    scales = None if scales_shape is None else (scales_shape, BFLOAT16)
    return layout_size(layout((shape, np.dtype(dtype)), scales))


def write_tensor(
    path: str | os.PathLike[str],
    weight: Shaped[np.ndarray, "..."],
    scales: Shaped[np.ndarray, "..."] | None = None,
) -> None:
    """Write an official tensor file, to a temporary name first.

    The bytes of an array in C order go to the file without a second copy in memory.

    **Arguments:**

    - `path`: the file to write; one that is there is replaced.
    - `weight`: float32, bfloat16 or int8 array; int8 [..., K, N] if there are scales.
    - `scales`: bfloat16 [..., group, N], where `group` divides K; `None` for a plain array.

    **Raises:** `CheckpointError` for arrays that the format does not hold.
    """
    _check_array(path, weight)
    arrays, of_scales = [weight], None
    if scales is not None:
        _check_array(path, scales)
        _check_quantised(path, weight, scales)
        arrays, of_scales = [weight, scales], (scales.shape, scales.dtype)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        for piece in layout((weight.shape, weight.dtype), of_scales):
            if isinstance(piece, bytes):
                file.write(piece)
            else:
                file.write(np.ascontiguousarray(arrays.pop(0)).reshape(-1).view(np.uint8).data)


def _check_array(path: str | os.PathLike[str], array: np.ndarray) -> None:
    if array.dtype not in SUPPORTED_DTYPES:
        names = ", ".join(dtype.name for dtype in SUPPORTED_DTYPES)
        raise refusal(path, f"a dtype among {names}", str(array.dtype), "convert the array")
    if array.ndim > MAX_NDIM or not all(0 < n <= _LARGEST_DIMENSION for n in array.shape):
        raise refusal(
            path,
            f"at most {MAX_NDIM} axes, each of 1 to {_LARGEST_DIMENSION:,} entries",
            f"shape {array.shape}",
            "split the array, or leave it out",
        )


def _check_quantised(path: str | os.PathLike[str], weight: np.ndarray, scales: np.ndarray) -> None:
    *lead, k, n = weight.shape if weight.ndim > 1 else (0, 0)
    *lead_of_scales, groups, n_scales = scales.shape if scales.ndim > 1 else (0, 0)
    expected, found = "an int8 weight with bfloat16 scales", f"{weight.dtype} with {scales.dtype}"
    if (weight.dtype, scales.dtype) == (INT8, BFLOAT16):
        if groups and (lead, n) == (lead_of_scales, n_scales) and k % groups == 0:
            return
        expected = (
            f"scales [..., group, N] for a weight of shape {weight.shape}, with group dividing the "
            "last axis but one"
        )
        found = f"scales of shape {scales.shape}"
    raise refusal(path, expected, found, "quantise with grokkit.quant.quantize")


def layout(
    weight: tuple[tuple[int, ...], np.dtype],
    scales: tuple[tuple[int, ...], np.dtype] | None = None,
    reconstruct: Global = RECONSTRUCT,
) -> Pieces:
    """A tensor file as literal bytes and the arrays' payloads, in order: the weight comes first.

    **Arguments:**

    - `weight`: shape and dtype of the array.
    - `scales`: shape and dtype of the scales; `None` for a plain array.
    - `reconstruct`: numpy's name of the function that rebuilds arrays; official files have that of
        numpy 1.
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
        if isinstance(value, str | bytes | Global) and value in self.memo:
            add(b"h" + bytes([self.memo[value]]))
            return
        match value:
            case None | bool() | ():
                add({None: b"N", True: b"\x88", False: b"\x89", (): b")"}[value])
                return  # these are not remembered
            case int():
                wide = b"J" + value.to_bytes(4, "little", signed=True)
                add(_counted(value, INTEGERS) if 0 <= value < 1 << 16 else wide)
                return
            case str():
                add(b"\x8c" + bytes([len(value)]) + value.encode("ascii"))
            case bytes():
                add(_counted(len(value), PAYLOADS) + value)
            case Payload():
                header = _counted(value.nbytes, PAYLOADS)
                if value.nbytes < _FRAME_TARGET:
                    self.frame += [header, value]
                else:
                    self.close_frame()
                    self.out += [header, value]
            case tuple():
                if len(value) > 3:
                    add(b"(")
                for entry in value:
                    self.save(entry)
                add(TUPLES.get(len(value), b"t"))
            case Global():
                self.save(value.module)
                self.save(value.name)
                add(b"\x93")
            case dict():
                add(b"}")
                self.memoize(value)
                add(b"(")
                for entry in (entry for item in value.items() for entry in item):
                    self.save(entry)
                add(b"u")
                return
            case Object():
                self.save(value.maker)
                self.save(value.arguments)
                add(b"\x81" if value.maker is QUANTIZED else b"R")
                self.memoize(value)
                self.save(value.state)
                add(b"b")
                return
        self.memoize(value)

    def memoize(self, value: Any) -> None:
        is_shared = isinstance(value, str | bytes | Global)  # one object in Python's memory too
        self.memo[value if is_shared else object()] = len(self.memo)
        self.frame.append(b"\x94")

    def close_frame(self) -> None:
        length = layout_size(self.frame)
        if length >= _FRAME_MIN:
            self.out.append(b"\x95" + length.to_bytes(8, "little"))
        self.out += self.frame
        self.frame.clear()


def _counted(n: int, instructions: dict[bytes, int]) -> bytes:
    """The shortest instruction with this number, of those with so many bytes for it."""
    opcode, width = next((o, w) for o, w in instructions.items() if n < 1 << 8 * w)
    return opcode + n.to_bytes(width, "little")
