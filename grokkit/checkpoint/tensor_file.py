"""Where a checkpoint's arrays are, and their bytes as memory maps; one official tensor file."""

import contextlib
import dataclasses
import errno
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from grokkit.checkpoint.lazy import Stack, Unpacked
from grokkit.checkpoint.pages import PAGE
from grokkit.checkpoint.pickle_objects import ArrayNote, QuantizedNote
from grokkit.checkpoint.pickle_walk import walk
from grokkit.checkpoint.refusal import DOWNLOAD_AGAIN, DOWNLOAD_COMMAND, Refused, reading, refusal
from grokkit.errors import CheckpointError

INT4 = np.dtype(ml_dtypes.int4)

_BLOCK = 512  # bytes: no disk's blocks are smaller
_BUFFER = 1024  # bytes read at a time: a header has about 150, the rest is skipped


@dataclasses.dataclass(frozen=True)
class ArraySpan:
    """Where an array's bytes lie in a file: C order, little-endian, no padding."""

    dtype: np.dtype
    """Of the entries. 4-bit ones are packed in pairs along the last axis: see `lazy.pack`."""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        entries = math.prod(self.shape)
        return entries // 2 if self.dtype == INT4 else entries * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype.name}[{', '.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """One tensor in a file, known from the header alone."""

    path: Path
    size: int
    """Bytes in the whole file, which may hold other tensors too."""
    weight: ArraySpan
    """The array itself, or the integers of a quantised weight."""
    scales: ArraySpan | None = None
    """The scales of a quantised weight: [..., group, N]; `None` for a plain array."""
    k_last: bool = False
    """Whether a matrix lies as [..., N, K], with the contracting axis last."""

    @property
    def spans(self) -> tuple[ArraySpan, ...]:
        """The tensor's arrays: one, or weight and scales."""
        return (self.weight,) if self.scales is None else (self.weight, self.scales)

    @property
    def files(self) -> dict[Path, int]:
        """Each file that holds a part of the tensor, with its size in bytes."""
        return {self.path: self.size}

    def __str__(self) -> str:
        return " * ".join(map(str, self.spans))

    def open(self, span: ArraySpan) -> np.ndarray | Unpacked:
        """One of `spans` as a read-only memory map; pages are read when they are touched.

        4-bit integers are unpacked where they are sliced.

        **Raises:** `CheckpointError` if the file is gone or has changed since its header was read.
        """
        packed = span.dtype == INT4
        shape = (*span.shape[:-1], span.shape[-1] // 2) if packed else span.shape
        dtype = np.dtype(np.uint8) if packed else span.dtype
        found = self._map(dtype, span.offset, shape)
        return Unpacked(found) if packed else found

    def mapped(self) -> np.ndarray:
        """The whole file as a read-only memory map of bytes.

        **Raises:** as `open`.
        """
        return np.asarray(self._map(np.dtype(np.uint8), 0, (self.size,)))

    def _map(self, dtype: np.dtype, offset: int, shape: tuple[int, ...]) -> np.memmap:
        self.check()
        try:
            return np.memmap(self.path, dtype, "r", offset, shape)
        except (OSError, ValueError) as e:
            raise self._changed(str(e)) from e

    def check(self) -> None:
        """See that the file is there and as long as it was.

        **Raises:** `CheckpointError` if it is not.
        """
        try:
            size = os.stat(self.path).st_size
        except OSError as e:
            raise self._changed(str(e)) from e
        if size != self.size:
            raise self._changed(f"{size:,} bytes")

    @contextlib.contextmanager
    def reading(self) -> Iterator[Callable[[Sequence[memoryview], int, int], None]]:
        """A function that fills buffers, so many bytes in all, from a place in the file.

        **Raises:** as `open`, here or from the function.
        """
        try:
            with open(self.path, "rb", buffering=0) as file:
                descriptor = file.fileno()
                size = os.fstat(descriptor).st_size
                if size != self.size:
                    raise self._changed(f"{size:,} bytes")

                def read(buffers: Sequence[memoryview], n_bytes: int, offset: int) -> None:
                    if not _fill(descriptor, buffers, n_bytes, offset):
                        raise self._changed("one that ended early")

                yield read
        except OSError as e:
            raise self._changed(str(e)) from e

    @contextlib.contextmanager
    def reading_past_cache(self) -> "Iterator[DirectReader]":
        """What reads parts of the file and leaves the system's page cache alone, where it can be:
        that spares the processor a copy.

        **Raises:** as `open`, here or from the reader.
        """
        with self.reading() as read_copy, _opened_directly(self.path) as descriptor:
            yield DirectReader(read_copy, descriptor)

    def _changed(self, found: str) -> CheckpointError:
        return refusal(
            self.path,
            f"the file of {self.size:,} bytes that was there when the checkpoint was opened",
            found,
            "leave the checkpoint's files alone while it is in use; open it again",
        )


@dataclasses.dataclass(frozen=True)
class DirectReader:
    """Reads parts of one file, without the page cache where that can be."""

    copy: Callable[[Sequence[memoryview], int, int], None]
    """Reads by way of the page cache."""
    descriptor: int | None
    """The file as it is read without; `None` where it cannot be."""

    def read(self, memory: memoryview, n_bytes: int, offset: int) -> memoryview:
        """Read so many bytes from a place in the file into some of `memory`, and return that part.

        The memory begins at a multiple of `PAGE` bytes, and has room for two more.
        """
        before = offset % PAGE
        found = memory[before : before + n_bytes]
        if self.descriptor is None or not _fill_directly(
            self.descriptor, memory, before + n_bytes, offset - before
        ):
            self.copy([found], n_bytes, offset)
        return found

    def read_into(self, memory: memoryview, offset: int) -> bool:
        """Read as many bytes as there is memory straight to where they are wanted; whether that
        could be done. Memory and file must lie alike in the disk's blocks, of which only whole ones
        can be read."""
        address = np.frombuffer(memory, np.uint8).ctypes.data
        is_whole = not any(n % _BLOCK for n in (address, offset, len(memory)))
        return (
            is_whole
            and self.descriptor is not None
            and _fill_directly(self.descriptor, memory, len(memory), offset)
        )


def _fill(descriptor: int, buffers: Sequence[memoryview], n_bytes: int, offset: int) -> bool:
    """Read into all the buffers; whether the file was long enough."""
    got = os.preadv(descriptor, buffers, offset)
    while got < n_bytes:  # a system may give less than it is asked for
        if not got:
            return False
        n_bytes, offset = n_bytes - got, offset + got
        buffers = _after(buffers, got)
        got = os.preadv(descriptor, buffers, offset)
    return True


@contextlib.contextmanager
def _opened_directly(path: Path) -> Iterator[int | None]:
    """A descriptor for reading past the page cache; none where system or file system have none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except (OSError, AttributeError):
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _fill_directly(descriptor: int, memory: memoryview, n_bytes: int, offset: int) -> bool:
    """Read at least so many bytes, whole pages where there is memory; whether that could be done."""
    got, whole = 0, min(n_bytes + -n_bytes % PAGE, len(memory))
    while got < n_bytes:
        try:
            more = os.preadv(descriptor, [memory[got:whole]], offset + got)
        except OSError as e:
            if e.errno == errno.EINVAL:  # a disk with larger blocks
                return False
            raise
        if more < min(n_bytes - got, PAGE):  # the file's end
            return False
        got += more - more % PAGE if got + more < n_bytes else more
    return True


def _after(buffers: Sequence[memoryview], n_bytes: int) -> Sequence[memoryview]:
    """What is left of the buffers behind their first bytes."""
    for i, buffer in enumerate(buffers):
        if n_bytes < len(buffer):
            return [buffer[n_bytes:], *buffers[i + 1 :]]
        n_bytes -= len(buffer)
    return []


@dataclasses.dataclass(frozen=True)
class StackedTensors:
    """One tensor that is stored in parts: a matrix for each expert, say. See `TensorFile`."""

    parts: tuple[TensorFile, ...]

    scales = None

    @property
    def path(self) -> Path:
        """The file of the first part."""
        return self.parts[0].path

    @property
    def size(self) -> int:
        """Bytes in the file of the first part."""
        return self.parts[0].size

    @property
    def files(self) -> dict[Path, int]:
        """Each file that holds a part, with its size in bytes."""
        return {part.path: part.size for part in self.parts}

    @property
    def weight(self) -> ArraySpan:
        """The whole array. Its offset is that of the first part."""
        first = self.parts[0].weight
        return dataclasses.replace(first, shape=(len(self.parts), *first.shape))

    @property
    def spans(self) -> tuple[ArraySpan, ...]:
        """The tensor's one array."""
        return (self.weight,)

    @property
    def k_last(self) -> bool:
        """Whether each part lies as [N, K]."""
        return self.parts[0].k_last

    def __str__(self) -> str:
        return str(self.weight)

    def open(self, span: ArraySpan) -> Stack:
        """The whole array, as something to slice; the parts' files are mapped into memory."""
        assert span.shape == self.weight.shape
        return Stack([part.open(part.weight) for part in self.parts])


def read_tensor(path: str | os.PathLike[str]) -> TensorFile:
    """Describe an official tensor file without reading its payload.

    Nothing in the file is unpickled: see `grokkit.checkpoint.pickle_walk`.

    **Arguments:**

    - `path`: a `tensorNNNNN_000` file.

    **Returns:** the arrays' dtypes, shapes and places in the file.

    **Raises:** `CheckpointError` if the file is missing, or is not exactly one official tensor.
    """
    path = Path(path)
    with reading(path) as status, open(path, "rb", buffering=_BUFFER) as file:
        _refuse_stand_in(file.read(64), status.st_size)
        file.seek(0)
        note = walk(file, status.st_size)
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
