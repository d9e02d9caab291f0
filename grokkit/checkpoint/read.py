"""Reading parts of arrays in files into memory, a slab of rows at a time, by a few threads.

The memory is a view in the file's order of axes. Where a matrix is wanted transposed (the official
files hold [k, n], the model [n, k]) it is the transposed view of a row-major array; each slab is
then transposed on its way.
"""

import collections
import contextlib
import dataclasses
import functools
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Shaped, UInt8

from grokkit.checkpoint.int4 import INT4, unpack
from grokkit.checkpoint.refusal import refusal
from grokkit.errors import CheckpointError, GrokkitError

PAGE = 4096
"""Bytes: what is read with O_DIRECT is a multiple of it. No disk's blocks are larger, that we know."""
_BLOCK = 512  # bytes: no disk's blocks are smaller
_SLAB = 1 << 23  # bytes
_THREADS = 4
_CACHE_LINE = 64  # bytes
_SMALL = 1 << 14  # bytes: numpy transposes so few before JAX has begun


@dataclasses.dataclass(frozen=True)
class ArraySpan:
    """Where an array's bytes lie in a file: C order, little-endian, no padding."""

    dtype: np.dtype
    """Of the entries. 4-bit ones are packed in pairs along the last axis: see `int4.pack`."""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return self.bytes_of(math.prod(self.shape))

    def bytes_of(self, entries: int) -> int:
        """Bytes of so many entries that follow each other."""
        return entries // 2 if self.dtype == INT4 else entries * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype.name}[{', '.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class DataFile:
    """A file that holds arrays, as it was when its header was read."""

    path: Path
    size: int
    """Bytes in the whole file."""

    @contextlib.contextmanager
    def reading(self, direct: bool = False) -> "Iterator[Reader]":
        """What reads parts of the file.

        **Arguments:**

        - `direct`: open it with O_DIRECT too, where system and file system have that.

        **Raises:** `CheckpointError` if the file is gone or has changed since its header was read,
        here or from the reader.
        """
        try:
            with (
                open(self.path, "rb", buffering=0) as file,
                _opened_directly(self.path) if direct else contextlib.nullcontext() as descriptor,
            ):
                size = os.fstat(file.fileno()).st_size
                if size != self.size:
                    raise self._changed(f"{size:,} bytes")
                yield Reader(file.fileno(), descriptor, self._changed)
        except OSError as e:
            raise self._changed(str(e)) from e

    def _changed(self, found: str) -> CheckpointError:
        return refusal(
            self.path,
            f"the file of {self.size:,} bytes that was there when the checkpoint was opened",
            found,
            "leave the checkpoint's files alone while it is in use; open it again",
        )


@contextlib.contextmanager
def _opened_directly(path: Path) -> Iterator[int | None]:
    """A descriptor for reading with O_DIRECT; `None` where system or file system have none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except (OSError, AttributeError):
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads parts of one open file."""

    descriptor: int
    direct: int | None
    """The file opened with O_DIRECT, if it is to be read so."""
    changed: Callable[[str], CheckpointError]

    def read(self, buffer: Any, offset: int) -> None:
        """Fill a buffer of bytes from a place in the file, out of the page cache."""
        left = memoryview(buffer)
        while left:  # a system may give less than it is asked for
            got = os.preadv(self.descriptor, [left], offset)
            if not got:
                raise self.changed("one that ended early")
            left, offset = left[got:], offset + got

    def fill(self, buffer: UInt8[np.ndarray, " bytes"], offset: int) -> None:
        """The same; with O_DIRECT if file and memory lie alike in the disk's blocks."""
        done = 0
        if not any(n % _BLOCK for n in (buffer.ctypes.data, offset, buffer.nbytes)):
            done = self._read_directly(buffer, offset)
        self.read(buffer[done:], offset + done)

    def read_in(
        self, memory: UInt8[np.ndarray, " room"], n_bytes: int, offset: int
    ) -> UInt8[np.ndarray, " bytes"]:
        """Read so many bytes into some of `memory`, and return that part.

        The memory begins at a multiple of `PAGE` bytes, and has room for two more.
        """
        before = offset % PAGE
        found = memory[before : before + n_bytes]
        whole = -(-(before + n_bytes) // PAGE) * PAGE
        done = min(max(self._read_directly(memory[:whole], offset - before) - before, 0), n_bytes)
        self.read(found[done:], offset + done)
        return found

    def _read_directly(self, buffer: UInt8[np.ndarray, " bytes"], offset: int) -> int:
        """Read with O_DIRECT, as far as that goes. **Returns:** bytes read."""
        if self.direct is None:
            return 0
        try:
            return os.preadv(self.direct, [memoryview(buffer)], offset)  # pyright: ignore
        except OSError:  # a disk with larger blocks, or an error that reading again will name
            return 0


@dataclasses.dataclass(frozen=True)
class Request:
    """Parts of one array of a file, and the memory that they go to."""

    file: DataFile
    span: ArraySpan
    targets: Sequence[tuple[tuple[slice, ...], Shaped[np.ndarray, "..."]]]
    """Which part, and memory of the part's shape; entries become those of its dtype. Rows that no
    target asks for are not read, nor columns beyond all of the targets'."""


def fill(
    requests: Sequence[Request],
    report: Callable[[int], object] = lambda n_bytes: None,
    direct: bool = False,
) -> None:
    """Read some parts of arrays.

    Beyond the targets' memory each of at most four threads uses that of a slab, of 8 MB or a row,
    twice if it is transposed.

    **Arguments:**

    - `requests`: what to read, and where to.
    - `report`: told how many of an array's bytes are done with, by one thread at a time.
    - `direct`: read whole rows with O_DIRECT: the page cache would not keep them, and copying out
        of it takes the processors' time.

    **Raises:** `CheckpointError` if a file is gone or has changed since its header was read;
    `GrokkitError` if a part cuts a pair of 4-bit integers.
    """
    waiting = collections.deque(slab for request in requests for slab in _slabs(request))
    largest = max((slab.rows * slab.width for slab in waiting), default=0)
    n_bytes = sum(slab.rows * slab.width for slab in waiting)
    one_at_a_time = threading.Lock()

    def next_slab() -> "_Slab | None":
        try:
            return waiting.popleft()
        except IndexError:
            return None

    def work() -> None:
        memory, file = pages(largest), None
        with contextlib.ExitStack() as opened:
            while slab := next_slab():
                if slab.file is not file:
                    opened.close()
                    file = slab.file
                    reader = opened.enter_context(file.reading(direct))
                _take(reader, slab, memory)
                with one_at_a_time:
                    report(slab.counts)

    n_threads = min(_THREADS, len(waiting), 1 + n_bytes // _SLAB)
    if n_threads <= 1:  # a thread would take longer to start than a small array to read
        return work()
    with ThreadPoolExecutor(n_threads, "reading") as pool:
        threads = [pool.submit(work) for _ in range(n_threads)]
        try:
            wait(threads, return_when=FIRST_EXCEPTION)
        finally:
            waiting.clear()  # after an error, or Ctrl-C, the others soon end
    for thread in threads:
        thread.result()


def pages(n_bytes: int) -> UInt8[np.ndarray, " bytes"]:
    """Memory for so many bytes from anywhere in a file, to be read as whole pages."""
    memory = np.empty(n_bytes + 3 * PAGE, np.uint8)
    return memory[-memory.ctypes.data % PAGE :]


class _Slab(NamedTuple):
    """Consecutive rows of one matrix, and of these the columns from the first wanted to the last."""

    file: DataFile
    dtype: np.dtype
    offset: int
    """Bytes before the first of them in the file."""
    rows: int
    width: int
    """Bytes of a row's columns."""
    stride: int
    """Bytes from row to row."""
    targets: list[tuple[slice, np.ndarray]]
    """Which of the columns, and where they go: [row, column]."""
    counts: int
    """Bytes of the array that are done with it."""


def _slabs(request: Request) -> list[_Slab]:
    """Every row that some target needs, once."""
    span = request.span
    *lead, n_rows, n_columns = (*span.shape, 1) if len(span.shape) == 1 else span.shape
    wanted = collections.defaultdict[Any, list[tuple[range, np.ndarray]]](list)
    for index, memory in request.targets:
        if len(span.shape) == 1:  # a list is a column: that can be cut
            index, memory = (*index, slice(None)), memory[:, None]
        ranges = [
            range(*s.indices(n)) for s, n in zip(index, (*lead, n_rows, n_columns), strict=True)
        ]
        *leads, rows, columns = ranges
        if span.dtype == INT4 and (columns.start % 2 or columns.stop % 2):
            raise GrokkitError(
                f"4-bit weights are packed in pairs, and the entries {columns.start} to "
                f"{columns.stop} cut one; use a mesh with fewer 'model' devices"
            )
        for place in np.ndindex(*map(len, leads)):
            matrix = 0
            for r, i, n in zip(leads, place, lead, strict=True):
                matrix = matrix * n + r[i]
            wanted[matrix, rows.start, rows.stop].append((columns, memory[place]))
    slabs = []
    for (matrix, start, stop), targets in sorted(wanted.items(), key=lambda item: item[0]):
        first = min(columns.start for columns, _ in targets)
        last = max(columns.stop for columns, _ in targets)
        width, stride = span.bytes_of(last - first), span.bytes_of(n_columns)
        step = max(1, _SLAB // width)
        step -= step % _CACHE_LINE if step > _CACHE_LINE else 0
        for row in range(start, stop, step):
            n = min(step, stop - row)
            parts = [
                (slice(c.start - first, c.stop - first), memory[row - start :][:n])
                for c, memory in targets
            ]
            offset = span.offset + (matrix * n_rows + row) * stride + span.bytes_of(first)
            slabs.append(_Slab(request.file, span.dtype, offset, n, width, stride, parts, 0))
    done = [span.nbytes * i // max(1, len(slabs)) for i in range(len(slabs) + 1)]
    return [slab._replace(counts=done[i + 1] - done[i]) for i, slab in enumerate(slabs)]


def _take(reader: Reader, slab: _Slab, memory: UInt8[np.ndarray, " bytes"]) -> None:
    """Read a slab and put it in its places."""
    (_, to), *more = slab.targets
    place: np.ndarray | None = None  # where all its bytes go just as they are
    if not more and to.dtype == slab.dtype and to.flags.c_contiguous:
        place = to.reshape(-1).view(np.uint8)
    if slab.width < slab.stride and slab.rows > 1:
        raw = memory[: slab.rows * slab.width] if place is None else place
        for i in range(slab.rows):
            reader.read(raw[i * slab.width :][: slab.width], slab.offset + i * slab.stride)
    elif place is None:
        raw = reader.read_in(memory, slab.rows * slab.width, slab.offset)
    else:
        reader.fill(place, slab.offset)
    if place is None:
        raw = raw.reshape(slab.rows, slab.width)
        values = unpack(raw) if slab.dtype == INT4 else raw.view(slab.dtype)
        for columns, to in slab.targets:
            _copy(values[:, columns], to)


def _copy(values: Shaped[np.ndarray, "row column"], to: Shaped[np.ndarray, "row column"]) -> None:
    """Copy a matrix, transposing it if that is how `to` lies in memory."""
    if to.strides[-1] <= to.strides[0] or values.nbytes < _SMALL:
        to[...] = values
    else:  # five times as fast as numpy, and in another buffer whose rows are copied at once
        to.T[...] = np.asarray(jax.device_put(values.T, _cpu(), may_alias=False))


@functools.cache
def _cpu() -> Any:
    return jax.local_devices(backend="cpu")[0]
