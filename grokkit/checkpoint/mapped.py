"""Arrays that are the very pages of their files, which nothing copies.

That is possible on CPU devices, for what lies in a file just as the model holds it.
"""

import ctypes
import errno
import functools
import mmap
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from grokkit.checkpoint.ahead import Ahead, Piece
from grokkit.checkpoint.loading import LeafPlan
from grokkit.checkpoint.tensor_file import PAGE, ArraySpan, TensorFile

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


class MappedLeaves:
    """Some leaves as pages of their files, there until they are let go."""

    def __init__(self, plans: Sequence[LeafPlan], then: Sequence[LeafPlan] = ()) -> None:
        """Read them: their pages are in memory, if it has the room, when this returns.

        **Arguments:**

        - `plans`: as `can_be_mapped` wants.
        - `then`: what will be read next: the disk is told of its beginning.

        **Raises:** `CheckpointError` if a file is gone or has changed since its header was read;
        `OSError` if it cannot be read.
        """
        self._mappings: list[mmap.mmap] = []
        self.arrays: list[Array] = []
        """The leaves, until `let_go`."""
        ahead = Ahead(_piece(plan) for plan in [*plans, *then])
        for plan in plans:
            file, span = _source(plan)
            mapping, values = file.map(span)
            self._mappings.append(mapping)
            parts = [jax.device_put(values[i], device) for device, i in _places(plan).items()]
            self.arrays.append(
                jax.make_array_from_single_device_arrays(plan.shape, plan.sharding, parts)
            )
            for pages in _stretches(mapping):
                ahead.call_for(pages.size)
                failed = _advise(pages, _MADV_POPULATE_READ)
                if failed == errno.EINVAL:  # not known here
                    np.bitwise_or.reduce(pages[::PAGE])
                elif failed:
                    raise OSError(failed, os.strerror(failed), str(file.path))

    def let_go(self) -> None:
        """Give the pages back: the system may keep them, but they do not count as this process's
        memory any more. To use the arrays is to read them again."""
        self.arrays = []
        for mapping in self._mappings:
            for pages in _stretches(mapping):
                _advise(pages, _MADV_DONTNEED)
        self._mappings = []


def _stretches(mapping: mmap.mmap) -> list[np.ndarray]:
    pages = np.frombuffer(mapping, np.uint8)
    return [pages[start : start + _AT_ONCE] for start in range(0, pages.size, _AT_ONCE)]


def _advise(pages: np.ndarray, advice: int) -> int:
    """Tell the system what to do with pages; 0, or the error's number. Unlike `mmap.madvise` it
    leaves other threads alone."""
    if os.name != "posix":
        return errno.EINVAL
    failed = _madvise()(pages.ctypes.data, pages.nbytes, advice)
    return ctypes.get_errno() if failed else 0


@functools.cache
def _madvise() -> Any:
    found = ctypes.CDLL(None, use_errno=True).madvise
    found.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return found


def _piece(plan: LeafPlan) -> Piece:
    file, span = _source(plan)
    return file, span.offset, span.nbytes


def _source(plan: LeafPlan) -> tuple[TensorFile, ArraySpan]:
    (source,) = plan.sources
    assert isinstance(source.file, TensorFile)
    return source.file, source.span
