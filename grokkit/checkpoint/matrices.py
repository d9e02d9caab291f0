"""One parameter of a checkpoint, block by block, as another layout stores it.

Whatever the parameter's size, one block of it is in memory; when it is being rounded to integers,
its scales too.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Shaped

from grokkit.checkpoint.dialect import Storage
from grokkit.checkpoint.int4 import INT4_LARGEST, pack
from grokkit.checkpoint.official import Entry
from grokkit.checkpoint.pickle_objects import BFLOAT16, INT8
from grokkit.checkpoint.tensor_file import INT4

_COPIED = 1 << 24  # entries of a block that is copied as it is
_COMPUTED = 1 << 22  # and of one that becomes floats on the way
_LARGEST = {INT8: 127, INT4: INT4_LARGEST}

Chunks = Iterator[Shaped[np.ndarray, "..."]]


def stored_as(entry: Entry) -> Storage:
    """How a parameter is stored where it is."""
    scales = entry.file.scales
    return Storage(entry.file.weight.dtype, None if scales is None else scales.shape[-2])


class Conversion:
    """One parameter on its way from one way of storing it to another."""

    def __init__(self, entry: Entry, storage: Storage, k_last: bool) -> None:
        """Prepare to read `entry`.

        **Arguments:**

        - `entry`: the parameter.
        - `storage`: how it is to be stored.
        - `k_last`: whether a matrix is to lie as [..., n, k] instead of [..., k, n].
        """
        self.entry, self.storage, self.k_last = entry, storage, k_last
        self.now = stored_as(entry)
        self._scales: dict[tuple[int, ...], np.ndarray] = {}

    def weight_chunks(self) -> Chunks:
        """The array's bytes, or those of the integers of a quantised one, in order."""
        shape = self.entry.key.shape
        if len(shape) < 2:
            file = self.entry.file
            yield np.asarray(file.open(file.weight)).astype(self.storage.dtype)
            return
        *lead, k, n = shape
        copied = self.storage == self.now
        entries = _COPIED if copied else _COMPUTED
        for place in np.ndindex(*lead):
            if self.k_last:
                for columns in _ranges(n, max(entries // k, 1)):
                    block = self._block(place, slice(0, k), columns, copied)
                    block = contiguous(block.swapaxes(0, 1))
                    yield pack(block) if self.storage.dtype == INT4 else block
            else:
                for rows in _ranges(k, max(entries // n, 1)):
                    yield contiguous(self._block(place, rows, slice(0, n), copied))
            self._scales.pop(place, None)

    def scales_chunks(self) -> Chunks:
        """The scales' bytes, a matrix after the other."""
        for place in np.ndindex(*self.entry.key.shape[:-2]):
            yield np.ascontiguousarray(self._new_scales(place))

    def _raw(self, place: tuple[int, ...], rows: slice, columns: slice) -> np.ndarray:
        """A part of a matrix as it is stored, [k, n]."""
        file = self.entry.file
        whole: Any = file.open(file.weight)
        if file.k_last:
            return whole[(*place, columns, rows)].swapaxes(0, 1)
        return whole[(*place, rows, columns)]

    def _floats(
        self, place: tuple[int, ...], rows: slice, columns: slice
    ) -> Float[np.ndarray, "k n"]:
        """A part of the matrix that is meant, in float32."""
        values = self._raw(place, rows, columns).astype(np.float32)
        if self.now.groups is None:
            return values
        file = self.entry.file
        assert file.scales is not None
        scales: Any = file.open(file.scales)
        part = self._rows_of_scales(scales[place][:, columns], rows)
        return values * part.astype(np.float32)

    def _rows_of_scales(self, scales: np.ndarray, rows: slice) -> np.ndarray:
        """Each row's scales, for scales [group, n] of the whole contracting axis."""
        size = self.entry.key.shape[-2] // scales.shape[0]
        return scales[np.arange(rows.start, rows.stop) // size]

    def _block(
        self, place: tuple[int, ...], rows: slice, columns: slice, copied: bool
    ) -> np.ndarray:
        """A part of the matrix in the new precision, [k, n]; 4-bit integers as int8."""
        if copied:
            return self._raw(place, rows, columns)
        if self.storage.groups is None:
            if self.now.groups is None:
                return self._raw(place, rows, columns).astype(self.storage.dtype)
            return self._floats(place, rows, columns).astype(self.storage.dtype)
        scales = self._rows_of_scales(self._new_scales(place)[:, columns], rows).astype(np.float32)
        return round_to_integers(self._floats(place, rows, columns), scales, self.storage.dtype)

    def _new_scales(self, place: tuple[int, ...]) -> np.ndarray:
        """Scales [group, n] of one matrix."""
        file = self.entry.file
        if self.storage == self.now:
            assert file.scales is not None
            return np.asarray(file.open(file.scales))[place]
        if place not in self._scales:
            assert self.storage.groups is not None
            *_, k, n = self.entry.key.shape
            parts = [
                group_scales(
                    self._floats(place, slice(0, k), columns),
                    self.storage.groups,
                    self.storage.dtype,
                )
                for columns in _ranges(n, max(_COMPUTED // k, 1))
            ]
            self._scales[place] = np.concatenate(parts, axis=1)
        return self._scales[place]


def group_scales(
    values: Float[np.ndarray, "k n"], groups: int, dtype: np.dtype
) -> Shaped[np.ndarray, "g n"]:
    """bfloat16 scales of a matrix in `groups` parts along k, for int8 or int4.

    As `grokkit.quant.quantize` has them: the largest magnitude of a group and column over the
    largest integer.
    """
    k, n = values.shape
    largest = np.abs(values.reshape(groups, k // groups, n)).max(axis=1)
    return (largest / np.float32(_LARGEST[dtype])).astype(BFLOAT16)


def round_to_integers(
    values: Float[np.ndarray, "k n"], scales: Float[np.ndarray, "k n"], dtype: np.dtype
) -> Shaped[np.ndarray, "k n"]:
    """The nearest multiples of the scales, within int8's or int4's range, as int8."""
    largest = _LARGEST[dtype]
    divisor = np.where(scales == 0, np.float32(1), scales)
    return np.clip(np.round(values / divisor), -largest, largest).astype(np.int8)


def contiguous(values: np.ndarray) -> np.ndarray:
    """The same values in C order."""
    if values.flags.c_contiguous:
        return values
    if values.ndim > 1 and values.strides[-1] != values.itemsize:
        # JAX turns a matrix round ten times as fast as numpy.
        try:
            return np.asarray(jax.device_put(values, jax.local_devices(backend="cpu")[0]))
        except RuntimeError:  # this process was told to leave the CPU alone
            pass
    return np.ascontiguousarray(values)


def _ranges(total: int, size: int) -> Iterator[slice]:
    for i in range(math.ceil(total / size)):
        yield slice(i * size, min((i + 1) * size, total))
