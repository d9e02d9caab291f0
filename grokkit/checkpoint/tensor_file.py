"""One official tensor file: its description, and its payload as a memory map."""

import dataclasses
import math
import os
import stat
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from grokkit.checkpoint.pickle_objects import ArrayNote, QuantizedNote
from grokkit.checkpoint.pickle_walk import walk
from grokkit.checkpoint.refusal import DOWNLOAD_AGAIN, DOWNLOAD_COMMAND, Refused, refusal

_BUFFER = 1024  # bytes read at a time: a header has about 150, the rest is skipped


@dataclasses.dataclass(frozen=True)
class ArraySpan:
    """Where an array's bytes lie in a file: C order, little-endian, no padding."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype.name}[{', '.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """What one tensor file holds, read from its header alone."""

    path: Path
    size: int
    """Bytes in the file."""
    weight: ArraySpan
    """The array itself, or the int8 matrix of a quantised weight."""
    scales: ArraySpan | None = None
    """The scales of a quantised weight: [..., group, N]; `None` for a plain array."""

    @property
    def spans(self) -> tuple[ArraySpan, ...]:
        """The arrays in the file: one, or weight and scales."""
        return (self.weight,) if self.scales is None else (self.weight, self.scales)

    def __str__(self) -> str:
        return " * ".join(map(str, self.spans))

    def open(self, span: ArraySpan) -> Shaped[np.ndarray, "..."]:
        """One of `spans` as a read-only memory map; pages are read when they are touched.

        **Raises:** `CheckpointError` if the file is gone or has changed since its header was read.
        """
        try:
            size = os.stat(self.path).st_size
            if size == self.size:
                return np.memmap(
                    self.path, dtype=span.dtype, mode="r", offset=span.offset, shape=span.shape
                )
            found = f"{size:,} bytes"
        except (OSError, ValueError) as e:
            found = str(e)
        raise refusal(
            self.path,
            f"the file of {self.size:,} bytes that was there when the checkpoint was opened",
            found,
            "leave the checkpoint's files alone while it is in use; open it again",
        )


def read_tensor(path: str | os.PathLike[str]) -> TensorFile:
    """Describe an official tensor file without reading its payload.

    Nothing in the file is unpickled: see `grokkit.checkpoint.pickle_walk`.

    **Arguments:**

    - `path`: a `tensorNNNNN_000` file.

    **Returns:** the arrays' dtypes, shapes and places in the file.

    **Raises:** `CheckpointError` if the file is missing, or is not exactly one official tensor.
    """
    path = Path(path)
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            # Opening a pipe would wait forever.
            raise Refused("a file", "a directory, pipe or device")
        with open(path, "rb", buffering=_BUFFER) as file:
            _refuse_stand_in(file.read(64), status.st_size)
            file.seek(0)
            note = walk(file, status.st_size)
    except Refused as e:
        raise refusal(path, e.expected, e.found, e.remedy) from None
    except OSError as e:
        raise refusal(
            path, "a readable file", e.strerror or str(e), "check the path and its permissions"
        ) from None
    match note:
        case QuantizedNote(weight=ArrayNote() as weight, scales=ArrayNote() as scales):
            return TensorFile(path, status.st_size, _span(weight), _span(scales))
        case ArrayNote():
            return TensorFile(path, status.st_size, _span(note))
    raise AssertionError("walk returns complete notes")


def _span(note: ArrayNote) -> ArraySpan:
    assert note.dtype is not None and note.payload is not None
    return ArraySpan(note.dtype, note.shape, note.payload.offset)


def _refuse_stand_in(start: bytes, size: int) -> None:
    """Recognise what commonly lies in place of a tensor that was not downloaded."""
    expected = "an official tensor (a pickle of protocol 4)"
    if size == 0:
        raise Refused(expected, "an empty file")
    if start.startswith(b"version https://git-lfs"):
        raise Refused(
            expected,
            "a git-LFS pointer: the repository was cloned without its large files",
            f"run `git lfs pull` in the clone, or {DOWNLOAD_COMMAND}",
        )
    if start.lstrip()[:1] in (b"<", b"{"):
        raise Refused(expected, f"text: {start[:40].decode('latin-1')!a}", DOWNLOAD_AGAIN)
    if start.startswith((b"PK\x03\x04", b"\x1f\x8b")):
        raise Refused(expected, "a compressed archive", "unpack it first")
    if not any(start):
        raise Refused(
            expected,
            "zeros: space reserved by an unfinished download",
            "let the download finish, or start it again",
        )
