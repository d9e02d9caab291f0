"""One form for every complaint about a checkpoint."""

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from grokkit.errors import CheckpointError

DOWNLOAD_AGAIN = (
    "download the file again from the official source; do not open it with pickle to look inside"
)
DOWNLOAD_COMMAND = '`hf download xai-org/grok-1 --include "ckpt-0/*" --local-dir checkpoints`'

LFS_POINTER = "a git-LFS pointer: the repository was cloned without its large files"


class Refused(Exception):
    """Why bytes are not an official tensor, before it is known which file they came from."""

    def __init__(self, expected: str, found: str, remedy: str = DOWNLOAD_AGAIN):
        super().__init__(expected, found, remedy)
        self.expected = expected
        self.found = found
        self.remedy = remedy


def refusal(
    where: str | os.PathLike[str], expected: str, found: str, remedy: str
) -> CheckpointError:
    """The error that names the file, what was expected, what was found and what to do."""
    return CheckpointError(
        f"{os.fspath(where)}\n  expected: {expected}\n  found: {found}\n  what to do: {remedy}"
    )


@contextlib.contextmanager
def reading(path: Path, remedy: str = DOWNLOAD_AGAIN) -> Iterator[os.stat_result]:
    """Give a regular file's status; what is then refused or cannot be read names the file."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            # Opening a pipe would wait forever.
            raise Refused("a file", "a directory, pipe or device", remedy)
        yield status
    except Refused as e:
        raise refusal(path, e.expected, e.found, e.remedy) from None
    except OSError as e:
        raise refusal(
            path, "a readable file", e.strerror or str(e), "check the path and its permissions"
        ) from None


def check_target(
    target: Path, remedy: str = "choose another name, or remove what is there"
) -> None:
    """**Raises:** `CheckpointError` unless a checkpoint can be written to a new or empty `target`."""
    if not target.parent.is_dir():
        raise refusal(target.parent, "a directory to write into", "none", "create it first")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise refusal(
            target,
            "a new or empty directory",
            f"{len(list(target.iterdir()))} entries in it" if target.is_dir() else "a file",
            remedy,
        )


def check_space(directory: Path, n_bytes: int) -> None:
    """**Raises:** `CheckpointError` if the disk of `directory` has less space than that."""
    free = shutil.disk_usage(directory).free
    if free < n_bytes:
        raise refusal(
            directory,
            f"{n_bytes:,} bytes free",
            f"{free:,}",
            f"free {n_bytes - free:,} bytes, or choose another disk",
        )
