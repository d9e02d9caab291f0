"""Arrays that are the very pages of their files, which nothing copies.

That is possible on CPU devices, for what lies in a file just as the model holds it.
"""

import ctypes
import errno
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from grokkit.checkpoint.ahead import Ahead, Piece
from grokkit.checkpoint.loading import LeafPlan
from grokkit.checkpoint.tensor_file import PAGE, TensorFile

_ALIGNMENT = 64  # bytes: what XLA asks of host memory that it uses in place
_AT_ONCE = 1 << 26  # bytes between calls for more from the disk
_MADV_DONTNEED, _MADV_POPULATE_READ = 4, 22  # Linux's numbers


def can_be_mapped(plan: LeafPlan) -> bool:
    """Whether a leaf's parts are stretches of its file, on devices that can use them there."""
    (source, *more), places = plan.sources, _places(plan)
    return (
        not more
        and isinstance(source.file, TensorFile)
        and source.layer is None
        and not source.turned
        and source.span.dtype == plan.dtype
        and source.span.offset % _ALIGNMENT == 0
        and all(device.platform == "cpu" for device in places)
        and all(_is_stretch(plan, index) for index in places.values())
    )


def _places(plan: LeafPlan) -> Mapping[Any, Any]:
    return plan.sharding.addressable_devices_indices_map(plan.shape)


def _is_stretch(plan: LeafPlan, index: tuple[slice, ...]) -> bool:
    """Whether a part is in one piece, and where XLA can use it."""
    ranges = [range(*s.indices(n)) for s, n in zip(index, plan.shape, strict=True)]
    last_cut = max((i for i, n in enumerate(plan.shape) if len(ranges[i]) < n), default=0)
    offset = plan.dtype.itemsize * np.ravel_multi_index([r.start for r in ranges], plan.shape)
    return offset % _ALIGNMENT == 0 and all(len(r) == 1 for r in ranges[:last_cut])


def map_leaves(
    plans: Sequence[LeafPlan], then: Sequence[LeafPlan] = ()
) -> tuple[list[Array], list[np.ndarray]]:
    """Some leaves as pages of their files, which are in memory, if it has the room.

    **Arguments:**

    - `plans`: as `can_be_mapped` wants.
    - `then`: what will be read next: the disk is told of its beginning.

    **Returns:** the leaves, and the files' arrays, to `let_go` of.

    **Raises:** `CheckpointError` if a file is gone or has changed since its header was read;
    `OSError` if it cannot be read.
    """
    leaves, mapped = [], []
    ahead = Ahead(_piece(plan) for plan in [*plans, *then])
    for plan in plans:
        source = plan.sources[0]
        values = np.asarray(source.file.open(source.span))
        mapped.append(values)
        parts = [jax.device_put(values[i], device) for device, i in _places(plan).items()]
        leaves.append(jax.make_array_from_single_device_arrays(plan.shape, plan.sharding, parts))
        for address, size in _stretches(values):
            ahead.call_for(size)
            failed = _advise(address, size, _MADV_POPULATE_READ)
            if failed == errno.EINVAL:  # not known here
                first = max(0, address - values.ctypes.data)
                np.bitwise_or.reduce(values.reshape(-1).view(np.uint8)[first:][:size:PAGE])
            elif failed:
                raise OSError(failed, os.strerror(failed), str(source.file.path))
    return leaves, mapped


def let_go(mapped: Sequence[np.ndarray]) -> None:
    """Give pages back: the system may keep them, but they do not count as this process's memory
    any more. To use the arrays is to read them again."""
    for values in mapped:
        for address, size in _stretches(values):
            _advise(address, size, _MADV_DONTNEED)


def _stretches(values: np.ndarray) -> list[tuple[int, int]]:
    """Addresses and sizes of the pages of an array."""
    start, end = values.ctypes.data, values.ctypes.data + values.nbytes
    start -= start % PAGE
    return [(at, min(_AT_ONCE, end - at)) for at in range(start, end, _AT_ONCE)]


def _advise(address: int, n_bytes: int, advice: int) -> int:
    """Tell the system what to do with pages; 0, or the error's number. Unlike `mmap.madvise` it
    leaves other threads alone."""
    if os.name != "posix":
        return errno.EINVAL
    return ctypes.get_errno() if _madvise()(address, n_bytes, advice) else 0


@functools.cache
def _madvise() -> Any:
    found = ctypes.CDLL(None, use_errno=True).madvise
    found.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return found


def _piece(plan: LeafPlan) -> Piece:
    source: Any = plan.sources[0]
    return source.file, source.span.offset, source.span.nbytes
