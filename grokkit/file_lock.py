"""One writer at a time: a lock that ends with the process that holds it, however that ends."""

import contextlib
import errno
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_CANNOT_CREATE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}
"""Where nothing can be written, what was to be written says so better."""


@contextlib.contextmanager
def locked(path: Path, busy: Callable[[str], Exception]) -> Iterator[None]:
    """Hold a lock file, which is removed at the end.

    The file itself says nothing: the system drops the lock when its holder ends, so that one left
    behind by a killed process is in nobody's way. Where the file system has no locks there is none.

    **Arguments:**

    - `path`: the lock file.
    - `busy`: makes the exception to raise if another holds it, from who that is.
    """
    descriptor = _acquire(path, busy)
    try:
        yield
    finally:
        if descriptor is not None:
            path.unlink(missing_ok=True)  # while it is held: whoever waits for it takes a new one
            os.close(descriptor)


def _acquire(path: Path, busy: Callable[[str], Exception]) -> int | None:
    if fcntl is None:
        return None
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as e:
            if e.errno in _CANNOT_CREATE:
                return None
            raise
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, descriptor):
                _sign(descriptor)
                return descriptor
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace")
            os.close(descriptor)
            raise busy(holder or "another process") from None
        except OSError:
            path.unlink(missing_ok=True)
            os.close(descriptor)
            return None
        os.close(descriptor)  # its last holder removed it meanwhile


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    """Say who holds it, for the other's message."""
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
