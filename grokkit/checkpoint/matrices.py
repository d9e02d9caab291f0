"""One parameter of a checkpoint, block by block, as another layout stores it.

Whatever the parameter's size, one block of it is in memory; when it is being rounded to integers,
its scales too.
"""

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
        - `k_last`: whether a matrix is to be stored as [..., n, k] instead of [..., k, n].
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
        n_rows, length = (n, k) if self.k_last else (k, n)  # of the new matrix
        size = (_COPIED if self.storage == self.now else _COMPUTED) // length
        for place in np.ndindex(*lead):
            for part in _ranges(n_rows, size):
                if self.k_last:
                    block = contiguous(self._block(place, slice(0, k), part).swapaxes(0, 1))
                else:
                    block = contiguous(self._block(place, part, slice(0, n)))
                yield pack(block) if self.storage.dtype == INT4 else block
            self._scales.pop(place, None)

    def scales_chunks(self) -> Chunks:
        """The scales' bytes, a matrix after the other."""
        for place in np.ndindex(*self.entry.key.shape[:-2]):
            yield np.ascontiguousarray(self._new_scales(place))

    def _block(self, place: tuple[int, ...], rows: slice, columns: slice) -> np.ndarray:
        """A part of a matrix in the new precision, [k, n]; 4-bit integers as int8."""
        if self.storage == self.now:
            return self._raw(place, rows, columns)
        values = self._floats(place, rows, columns)
        if self.storage.groups is None:
            return values.astype(self.storage.dtype)
        scales = self._for_rows(self._new_scales(place)[:, columns], rows)
        largest = _LARGEST[self.storage.dtype]
        divisor = np.where(scales == 0, np.float32(1), scales)
        return np.clip(np.round(values / divisor), -largest, largest).astype(np.int8)

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
        return values * self._for_rows(self._stored_scales(place)[:, columns], rows)

    def _for_rows(self, scales: np.ndarray, rows: slice) -> Float[np.ndarray, "k n"]:
        """The scales of each of some rows, for scales [group, n] of the whole matrix."""
        size = self.entry.key.shape[-2] // scales.shape[0]
        return scales[np.arange(rows.start, rows.stop) // size].astype(np.float32)

    def _stored_scales(self, place: tuple[int, ...]) -> np.ndarray:
        file = self.entry.file
        assert file.scales is not None
        return np.asarray(file.open(file.scales))[place]

    def _new_scales(self, place: tuple[int, ...]) -> np.ndarray:
        """Scales [group, n] of one matrix: as `grokkit.quant.quantize` has them, the largest
        magnitude of a group and column over the largest integer."""
        if self.storage == self.now:
            return self._stored_scales(place)
        if place not in self._scales:
            groups = self.storage.groups
            assert groups is not None
            *_, k, n = self.entry.key.shape
            largest = [
                np.abs(self._floats(place, slice(0, k), columns).reshape(groups, k // groups, -1))
                .max(axis=1)
                for columns in _ranges(n, _COMPUTED // k)
            ]  # fmt: skip
            scales = np.concatenate(largest, axis=1) / np.float32(_LARGEST[self.storage.dtype])
            self._scales[place] = scales.astype(BFLOAT16)
        return self._scales[place]


def contiguous(values: np.ndarray) -> np.ndarray:
    """The same values in C order."""
    if values.flags.c_contiguous:
        return values
    if values.ndim > 1 and values.strides[-1] != values.itemsize:
        # JAX transposes a matrix ten times as fast as numpy.
        try:
            return np.asarray(jax.device_put(values, jax.local_devices(backend="cpu")[0]))
        except RuntimeError:  # this process was told to leave the CPU alone
            pass
    return np.ascontiguousarray(values)


def _ranges(total: int, size: int) -> Iterator[slice]:
    """Slices of at most `size`, but at least one."""
    for i in range(0, total, max(size, 1)):
        yield slice(i, min(i + max(size, 1), total))
