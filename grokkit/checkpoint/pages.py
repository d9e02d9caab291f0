"""What the system does with the pages of files: how it is asked for them.

Linux's numbers; other systems know none of this, and are left to themselves.
"""

import contextlib
import ctypes
import errno
import functools
import mmap
import os
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


def stretches(start: int, n_bytes: int) -> list[tuple[int, int]]:
    """A place and a size, in pieces that follow each other."""
    return [(start + i, min(AT_ONCE, n_bytes - i)) for i in range(0, n_bytes, AT_ONCE)]


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
    system is told and goes on by itself. What the cache holds is left alone.
    """
    if not hasattr(os, "posix_fadvise"):  # as on macOS
        return
    # Whoever reads the file will say what is wrong with it.
    with contextlib.suppress(OSError), open(path, "rb", buffering=0) as file:
        descriptor, end = file.fileno(), min(offset + n_bytes, os.fstat(file.fileno()).st_size)
        missing = [
            start
            for start in range(offset, end, _CALLED_FOR)
            if not is_in_page_cache(descriptor, start)
        ]
        if missing and end - missing[0] >= LARGE and are_large(path):
            with _mapped(descriptor, missing[0], end) as stretch:
                ask_for_large(*stretch)
                have_in_memory(*stretch)
            return
        for start in missing:
            size = min(_CALLED_FOR, end - start)
            os.posix_fadvise(descriptor, start, size, os.POSIX_FADV_WILLNEED)


def is_in_page_cache(descriptor: int, offset: int) -> bool:
    """Whether a place in a file is, where a system says so: a tenth of what calling for it costs."""
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except (OSError, AttributeError):
        return False


@contextlib.contextmanager
def _mapped(descriptor: int, offset: int, end: int) -> Iterator[tuple[int, int]]:
    """A part of a file, and what is before it of its first large page: an address and bytes."""
    start = offset - offset % LARGE
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
