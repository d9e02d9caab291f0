"""4-bit integers, packed two a byte along the last axis."""

import ml_dtypes
import numpy as np
from jaxtyping import Int8, UInt8

INT4 = np.dtype(ml_dtypes.int4)
INT4_LARGEST = 7


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
