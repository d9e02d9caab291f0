"""Files that are there whole or not at all."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

TEMPORARY = ".*.tmp"
"""Matches the names that files have while they are written: what an interruption may leave."""


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], durable: bool = False) -> Iterator[Path]:
    """Write a file under a temporary name beside it, and rename it once it is complete.

    The temporary file is new and its name random, so that no other file is touched. If the block
    raises, it is removed and what was at `path` stays as it was.

    **Arguments:**

    - `path`: the file to write or replace.
    - `durable`: have its bytes on the disk before it is renamed, so that a power failure leaves the
        old file or the new one.

    **Returns:** a context manager; its value is the path to write to, an empty file.

    **Raises:** `OSError` as writing does.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield temporary
        if durable:
            sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write(path: str | os.PathLike[str], content: str | bytes, durable: bool = False) -> None:
    """Write a whole file, a text as UTF-8; see `replacing`."""
    data = content.encode() if isinstance(content, str) else content
    with replacing(path, durable) as temporary:
        temporary.write_bytes(data)


def sync(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
