"""Writes one official tensor file, byte for byte as the original's pickler would."""

import os
from typing import BinaryIO

import numpy as np
from jaxtyping import Shaped

from grokkit.checkpoint.pickle_layout import layout, layout_size
from grokkit.checkpoint.pickle_objects import BFLOAT16, INT8, MAX_NDIM, SUPPORTED_DTYPES
from grokkit.checkpoint.refusal import refusal
from grokkit.runtime import files

_LARGEST_DIMENSION = (1 << 31) - 1


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

    The array's bytes go to the file without a second copy of the array in memory.

    **Arguments:**

    - `path`: the file to write; one that is there is replaced.
    - `weight`: float32, bfloat16 or int8 array; int8 [..., K, N] if there are scales.
    - `scales`: bfloat16 [..., group, N], where `group` divides K; `None` for a plain array.

    **Raises:** `CheckpointError` for arrays that the format does not hold.
    """
    _check(path, weight, scales)
    arrays = [weight] if scales is None else [weight, scales]
    of_scales = None if scales is None else (scales.shape, scales.dtype)
    pieces = layout((weight.shape, weight.dtype), of_scales)
    with files.replacing(path) as temporary, open(temporary, "wb") as file:
        for piece in pieces:
            if isinstance(piece, bytes):
                file.write(piece)
            else:
                _write_array(file, arrays.pop(0))


def _write_array(file: BinaryIO, array: np.ndarray) -> None:
    """The bytes in C order; of an array that is not contiguous, a slice at a time."""
    if array.flags.c_contiguous or array.ndim <= 1:
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    else:
        for part in array:
            _write_array(file, part)


def _check(path: str | os.PathLike[str], weight: np.ndarray, scales: np.ndarray | None) -> None:
    names = ", ".join(dtype.name for dtype in SUPPORTED_DTYPES)
    for array in (weight,) if scales is None else (weight, scales):
        if array.dtype not in SUPPORTED_DTYPES:
            raise refusal(path, f"a dtype among {names}", str(array.dtype), "convert the array")
        if (
            array.size == 0
            or array.ndim > MAX_NDIM
            or any(n > _LARGEST_DIMENSION for n in array.shape)
        ):
            raise refusal(
                path,
                f"at most {MAX_NDIM} axes, each of 1 to {_LARGEST_DIMENSION:,} entries",
                f"shape {array.shape}",
                "split the array, or leave it out",
            )
    if scales is None:
        return
    if weight.dtype != INT8 or scales.dtype != BFLOAT16:
        raise refusal(
            path,
            "an int8 weight with bfloat16 scales",
            f"{weight.dtype} with {scales.dtype}",
            "quantise with grokkit.quant.quantize",
        )
    if (
        weight.ndim < 2
        or scales.ndim != weight.ndim
        or scales.shape[:-2] != weight.shape[:-2]
        or scales.shape[-1] != weight.shape[-1]
        or weight.shape[-2] % scales.shape[-2]
    ):
        raise refusal(
            path,
            f"scales [..., group, N] for a weight of shape {weight.shape}, with group "
            f"dividing the last axis but one",
            f"scales of shape {scales.shape}",
            "quantise with grokkit.quant.quantize",
        )
