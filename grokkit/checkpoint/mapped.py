"""Arrays that are the very pages of their files, which nothing copies.

That is possible on CPU devices, for what lies in a file just as the model holds it.
"""

import ctypes
import errno
import functools
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from grokkit.checkpoint.loading import LeafPlan
from grokkit.checkpoint.tensor_file import PAGE, TensorFile

_ALIGNMENT = 64  # bytes: what XLA asks of host memory that it uses in place
_LARGE = 1 << 21  # bytes of a large page, on most processors
_AT_ONCE = 1 << 26  # bytes that a thread waits for
_MADV_DONTNEED, _MADV_HUGEPAGE, _MADV_POPULATE_READ = 4, 14, 22  # Linux's numbers


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
    """Some leaves as pages of their files, which come into memory and are let go of.

    Where the system keeps files in pages of 2 MB, as Linux can on some file systems, the first
    takes next to no time for what it has; and it is asked to read the rest in such pages.
    """

    def __init__(self, plans: Mapping[int, LeafPlan]) -> None:
        """Open nothing yet.

        **Arguments:**

        - `plans`: as `can_be_mapped` wants, each with its place among the leaves.
        """
        self.plans = plans
        self._mapped: dict[int, tuple[np.ndarray, Array]] = {}

    def read(self, pool: ThreadPoolExecutor) -> dict[int, Array]:
        """The leaves, all in memory, if it has the room.

        **Arguments:**

        - `pool`: threads, several of which wait for the disk at a time.

        **Raises:** `CheckpointError` if a file is gone or has changed since its header was read;
        `OSError` if it cannot be read.
        """
        coming = []
        for i, plan in self.plans.items():
            file: Any = plan.sources[0].file
            if i in self._mapped:
                file.check()
            else:  # once: it takes longer than to have the pages again
                self._mapped[i] = _map(plan)
            values, _ = self._mapped[i]
            if values.nbytes < _LARGE:
                _have_in_memory(file.path, values, *_pages(values))
                continue
            coming += [
                pool.submit(_have_in_memory, file.path, values, *stretch)
                for stretch in _stretches(values)
            ]
        wait(coming)
        for stretch in coming:
            stretch.result()
        return {i: leaf for i, (_, leaf) in self._mapped.items()}

    def let_go(self) -> None:
        """Give the pages back: the system may keep them, but they do not count as this process's
        memory any more. To use the leaves is to read them again."""
        for values, _ in self._mapped.values():
            _advise(*_pages(values), _MADV_DONTNEED)


def _map(plan: LeafPlan) -> tuple[np.ndarray, Array]:
    """A file's array, and the leaf that lies in it."""
    source: Any = plan.sources[0]
    values = np.asarray(source.file.open(source.span))
    _advise(*_pages(values), _MADV_HUGEPAGE)
    parts = [jax.device_put(values[i], device) for device, i in _places(plan).items()]
    return values, jax.make_array_from_single_device_arrays(plan.shape, plan.sharding, parts)


def _have_in_memory(path: Path, values: np.ndarray, address: int, n_bytes: int) -> None:
    """Have some pages of a file's array read, and found by this process."""
    failed = _advise(address, n_bytes, _MADV_POPULATE_READ)
    if failed == errno.EINVAL:  # not known here
        first = max(0, address - values.ctypes.data)
        np.bitwise_or.reduce(values.reshape(-1).view(np.uint8)[first:][:n_bytes:PAGE])
    elif failed:
        raise OSError(failed, os.strerror(failed), str(path))


def _pages(values: np.ndarray) -> tuple[int, int]:
    """Where the pages that hold an array begin, and its bytes from there."""
    before = values.ctypes.data % PAGE
    return values.ctypes.data - before, before + values.nbytes


def _stretches(values: np.ndarray) -> list[tuple[int, int]]:
    """The same, of pieces that follow each other."""
    start, n_bytes = _pages(values)
    return [(start + i, min(_AT_ONCE, n_bytes - i)) for i in range(0, n_bytes, _AT_ONCE)]


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
