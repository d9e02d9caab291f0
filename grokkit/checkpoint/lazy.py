"""Arrays of a checkpoint that are put together, or unpacked, only where they are sliced.

Both kinds look like the numpy array that they stand for as far as the loader goes: a shape, a
dtype, slices (without steps), and the last two axes exchanged.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int8, Shaped, UInt8

from grokkit.errors import GrokkitError

INT4_LARGEST = 7


class Stack:
    """Arrays of one shape from several places, on a new leading axis."""

    def __init__(self, parts: Sequence[Any], turned: bool = False) -> None:
        """Stack `parts`; `turned` exchanges the last two axes of each."""
        self.parts = list(parts)
        self.turned = turned

    @property
    def dtype(self) -> np.dtype:
        """Of the entries."""
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the stack."""
        *lead, a, b = self.parts[0].shape
        return (len(self.parts), *lead, *((b, a) if self.turned else (a, b)))

    def swapaxes(self, first: int, second: int) -> "Stack":
        """The same with the last two axes exchanged."""
        assert {first, second} == {-1, -2}
        return Stack(self.parts, not self.turned)

    def __getitem__(self, index: Any) -> Shaped[np.ndarray, "..."]:
        """A slice, copied out. Its entries lie as the parts' do, whether turned or not."""
        first, *rest = index if isinstance(index, tuple) else (index,)
        rest += [slice(None)] * (len(self.shape) - 1 - len(rest))
        if self.turned:
            rest[-1], rest[-2] = rest[-2], rest[-1]
        place = tuple(rest)
        if not isinstance(first, slice):
            piece = np.asarray(self.parts[first][place])
        else:
            piece = np.stack([part[place] for part in self.parts[first]])
        return piece.swapaxes(-1, -2) if self.turned else piece


class Unpacked:
    """4-bit integers, packed two a byte along the last axis, as int8."""

    def __init__(self, packed: UInt8[np.ndarray, "..."]) -> None:
        """Stand for what `pack` packed."""
        self.packed = packed

    dtype = np.dtype(np.int8)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the unpacked array."""
        return (*self.packed.shape[:-1], 2 * self.packed.shape[-1])

    def __getitem__(self, index: Any) -> Int8[np.ndarray, "..."]:
        """A slice, unpacked. **Raises:** `GrokkitError` if it would cut a byte in two."""
        index = index if isinstance(index, tuple) else (index,)
        if len(index) < len(self.shape):
            return unpack(self.packed[index])
        *lead, last = index
        start, stop, _ = last.indices(self.shape[-1])
        if start % 2 or stop % 2:
            raise GrokkitError(
                f"4-bit weights are packed in pairs, and the entries {start} to {stop} cut one; "
                f"use a mesh with fewer 'model' devices"
            )
        return unpack(self.packed[(*lead, slice(start // 2, stop // 2))])


def pack(values: Int8[np.ndarray, "*lead k"]) -> UInt8[np.ndarray, "*lead half"]:
    """Integers from -8 to 7, two a byte: of each pair the first in the lower four bits.

    The last axis must be even.
    """
    nibbles = values.view(np.uint8) & 0x0F
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack(packed: UInt8[np.ndarray, "*lead half"]) -> Int8[np.ndarray, "*lead k"]:
    """The inverse of `pack`."""
    out = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.int8)
    signed = packed.view(np.int8)
    # Shifted up and down again, the fourth bit becomes the sign.
    out[..., 0::2] = (signed << 4) >> 4
    out[..., 1::2] = signed >> 4
    return out
