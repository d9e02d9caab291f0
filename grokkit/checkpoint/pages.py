"""What the system does with the pages of files: how it is asked for them.

Linux's numbers; other systems know none of this, and are left to themselves.
"""

import contextlib
import ctypes
import errno
import functools
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

PAGE = mmap.PAGESIZE
"""Bytes that are read at once past the page cache: no disk's blocks are larger, that we know of."""
LARGE = 1 << 21
"""Bytes of a large page, on most processors."""
AT_ONCE = 1 << 26
"""Bytes that a thread waits for."""
_CALLED_FOR = 1 << 20  # bytes at once: Linux takes no notice of what is beyond some 1.3 MB
_MADV_DONTNEED, _MADV_HUGEPAGE, _MADV_POPULATE_READ = 4, 14, 22


def of_array(values: np.ndarray) -> tuple[int, int]:
    """Where the pages that hold an array begin, and its bytes from there."""
    before = values.ctypes.data % PAGE
    return values.ctypes.data - before, before + values.nbytes


def ask_for_large(address: int, n_bytes: int) -> None:
    """Have a mapped file read in pages of 2 MB from now on, where its file system has them."""
    _advise(address, n_bytes, _MADV_HUGEPAGE)


def have_in_memory(address: int, n_bytes: int) -> bool:
    """Have some pages of a mapped file read, and found by this process; whether the system can.

    **Raises:** `OSError` if the file cannot be read.
    """
    failed = _advise(address, n_bytes, _MADV_POPULATE_READ)
    if failed and failed != errno.EINVAL:  # which says that it is not known here
        raise OSError(failed, os.strerror(failed))
    return not failed


def let_go(address: int, n_bytes: int) -> None:
    """Take some pages of a mapped file out of this process; they come back when they are read."""
    _advise(address, n_bytes, _MADV_DONTNEED)


def forget(path: Path, offset: int, n_bytes: int) -> None:
    """Have the system take a part of a file out of the page cache, but for its first and last page,
    unless somebody uses it."""
    if not hasattr(os, "posix_fadvise"):
        return
    with contextlib.suppress(OSError), open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), offset, n_bytes, os.POSIX_FADV_DONTNEED)


_are_large: dict[int, bool] = {}  # by file system


def are_large(path: Path) -> bool:
    """Whether the system can keep files in pages of 2 MB where this one is.

    That is tried once for each file system, on the first file of 4 MB that is asked about; of which
    so much is read. Nobody else must be reading there.
    """
    with contextlib.suppress(OSError), open(path, "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        if status.st_dev not in _are_large and status.st_size >= 2 * LARGE:
            forget(path, 0, 2 * LARGE)  # which may be there in small ones
            with _mapped(file.fileno(), 0, 2 * LARGE) as stretch:
                ask_for_large(*stretch)
                _are_large[status.st_dev] = have_in_memory(*stretch) and _is_large(stretch[0])
        return _are_large.get(status.st_dev, False)
    return False


def _is_large(address: int) -> bool:
    """Whether the mapped file at an address, which is in memory, lies there in pages of 2 MB."""
    with contextlib.suppress(OSError), open("/proc/self/smaps", encoding="ascii") as file:
        is_here = False
        for line in file:
            name, *rest = line.split()
            if not name.endswith(":"):
                first, last = (int(number, 16) for number in name.split("-"))
                is_here = first <= address < last
            elif is_here and name == "FilePmdMapped:":
                return int(rest[0]) > 0
    return False


def call_for(path: Path, offset: int, n_bytes: int) -> None:
    """Have the system read a part of a file into the page cache, where it can.

    In pages of 2 MB that is waited for, and takes next to no time of a processor. Elsewhere the
    system is told and goes on by itself. What the cache holds is left alone, where it says so.
    """
    if not hasattr(os, "posix_fadvise"):  # as on macOS
        return
    # Whoever reads the file will say what is wrong with it.
    with contextlib.suppress(OSError), open(path, "rb", buffering=0) as file:
        descriptor, end = file.fileno(), min(offset + n_bytes, os.fstat(file.fileno()).st_size)
        if offset >= end:
            return
        first = offset - offset % LARGE
        with _mapped(descriptor, first, end) as (address, _):
            absent = missing(path, address + offset - first, end - offset, _CALLED_FOR)
            start = offset + absent[0] if absent else end
            if end - start >= LARGE and are_large(path):
                start -= start % LARGE
                stretch = address + start - first, end - start
                ask_for_large(*stretch)
                have_in_memory(*stretch)
                return
        for start in (offset + i for i in absent):
            size = min(_CALLED_FOR, end - start)
            os.posix_fadvise(descriptor, start, size, os.POSIX_FADV_WILLNEED)


def missing(path: Path, address: int, n_bytes: int, step: int) -> list[int]:
    """Which places of a mapped file the page cache does not hold.

    Linux is asked, which also says so of a file that this process may write. To try and read
    without waiting would call for the page, and for a small one.

    **Arguments:**

    - `path`: the file.
    - `address`, `n_bytes`: where it is mapped, from the first place on.
    - `step`: bytes from one place to the next.

    **Returns:** as bytes from the first. Where the system does not say, all.
    """
    places = range(0, n_bytes, step)
    if sys.platform != "linux" or not os.access(path, os.W_OK):
        return list(places)
    found = ctypes.c_ubyte()

    def is_there(place: int) -> bool:
        page = address + place - (address + place) % PAGE
        return not _mincore()(page, 1, ctypes.byref(found)) and bool(found.value & 1)

    return [place for place in places if not is_there(place)]


@contextlib.contextmanager
def _mapped(descriptor: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """A part of a file, from the beginning of a large page: an address and bytes."""
    with mmap.mmap(descriptor, end - start, access=mmap.ACCESS_READ, offset=start) as memory:
        values = np.frombuffer(memory, np.uint8)
        yield values.ctypes.data, end - start
        del values  # or the map could not be closed


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


@functools.cache
def _mincore() -> Any:
    found = ctypes.CDLL(None, use_errno=True).mincore
    found.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p
    return found
