"""Reading parts of arrays in files into memory, a slab of rows at a time, by a few threads.

Memory is given as a view in the file's order of axes. Where a matrix is wanted transposed (official
files hold [k, n], the model [n, k]) it is the transposed view of a row-major array, and each slab is
transposed on its way.
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
"""Bytes: O_DIRECT reads multiples of it. No disk's blocks are larger, that we know of."""
_BLOCK = 512  # bytes: no disk's blocks are smaller
_SLAB = 1 << 23  # bytes
_THREADS = 4
_READ_AHEAD = 1 << 20  # bytes: Linux takes no notice of more than some 1.3 MB at a time
_ROWS, _COLUMNS = 256, 4096  # of a block that is transposed at once
_SMALL = 1 << 14  # bytes: so few numpy transposes before JAX has begun
_CACHE_LINE = 64  # bytes


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
        """What reads parts of the file; with O_DIRECT if `direct`, where the file system has it.

        **Raises:** `CheckpointError` if the file is gone or has changed since its header was read,
        here or from the reader.
        """
        try:
            with contextlib.ExitStack() as opened:
                descriptor = opened.enter_context(open(self.path, "rb", buffering=0)).fileno()
                size, directly = os.fstat(descriptor).st_size, None
                if size != self.size:
                    raise self._changed(f"{size:,} bytes")
                with contextlib.suppress(OSError, AttributeError):
                    if direct:
                        directly = os.open(self.path, os.O_RDONLY | os.O_DIRECT)
                        opened.callback(os.close, directly)
                yield Reader(descriptor, directly, self._changed)
        except OSError as e:
            raise self._changed(str(e)) from e

    def _changed(self, found: str) -> CheckpointError:
        return refusal(
            self.path,
            f"the file of {self.size:,} bytes that was there when the checkpoint was opened",
            found,
            "leave the checkpoint's files alone while it is in use; open it again",
        )


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads parts of one open file."""

    descriptor: int
    direct: int | None
    """The file opened with O_DIRECT, if it is to be read so."""
    changed: Callable[[str], CheckpointError]

    def read(self, buffer: Any, offset: int) -> None:
        """Fill a buffer of bytes from a place in the file, by way of the page cache."""
        left = memoryview(buffer)
        while left:  # a system may give less than it is asked for
            got = os.preadv(self.descriptor, [left], offset)
            if not got:
                raise self.changed("one that ended early")
            left, offset = left[got:], offset + got

    def call_for(self, offset: int, n_bytes: int) -> None:
        """Have the system read ahead, which it does not do by itself for places far apart."""
        with contextlib.suppress(AttributeError):  # as on macOS
            for at in range(offset, offset + n_bytes, _READ_AHEAD):
                os.posix_fadvise(self.descriptor, at, _READ_AHEAD, os.POSIX_FADV_WILLNEED)

    def fill(self, buffer: UInt8[np.ndarray, " bytes"], offset: int) -> None:
        """The same; with O_DIRECT if file and memory lie alike in the disk's blocks."""
        done = 0
        if not any(n % _BLOCK for n in (buffer.ctypes.data, offset, buffer.nbytes)):
            done = self._read_directly(buffer, offset)
        self.read(buffer[done:], offset + done)

    def read_in(
        self, memory: UInt8[np.ndarray, " room"], n_bytes: int, offset: int
    ) -> UInt8[np.ndarray, " bytes"]:
        """Read so many bytes into some of `memory`, from `pages`, and return that part."""
        before = offset % PAGE
        found, whole = memory[before : before + n_bytes], -(-(before + n_bytes) // PAGE) * PAGE
        done = self._read_directly(memory[:whole], offset - before) - before
        done = min(max(done, 0), n_bytes)
        self.read(found[done:], offset + done)
        return found

    def _read_directly(self, buffer: UInt8[np.ndarray, " bytes"], offset: int) -> int:
        """Read with O_DIRECT, as far as that goes. **Returns:** bytes read."""
        with contextlib.suppress(OSError):  # larger blocks, or what reading again will name
            if self.direct is not None:
                return os.preadv(self.direct, [memoryview(buffer)], offset)  # pyright: ignore[reportArgumentType]
        return 0


def pages(n_bytes: int) -> UInt8[np.ndarray, " room"]:
    """Memory for so many bytes from anywhere in a file, to be read as whole pages."""
    memory = np.empty(n_bytes + 3 * PAGE, np.uint8)
    return memory[-memory.ctypes.data % PAGE :]


Target = tuple[tuple[slice, ...], Shaped[np.ndarray, "..."]]
"""A part of an array, and memory of its shape; the entries become those of the memory's dtype."""


@dataclasses.dataclass(frozen=True)
class Request:
    """Parts of one array of a file. Rows that no target asks for are not read, nor columns beyond
    all of the targets'."""

    file: DataFile
    span: ArraySpan
    targets: Sequence[Target]


def fill(
    requests: Sequence[Request],
    report: Callable[[int], object] = lambda n_bytes: None,
    direct: bool = False,
) -> None:
    """Read some parts of arrays.

    Beyond the targets' memory each of at most four threads uses a slab, of 8 MB or a row, and twice
    a megabyte where it transposes.

    **Arguments:**

    - `requests`: what to read, and where to.
    - `report`: told how many of an array's bytes are done with, by one thread at a time.
    - `direct`: read whole rows with O_DIRECT: the page cache would not keep them, and copying out
        of it takes the processors' time.

    **Raises:** `CheckpointError` if a file is gone or has changed since its header was read;
    `GrokkitError` if a part cuts a pair of 4-bit integers.
    """
    waiting = collections.deque(slab for request in requests for slab in _slabs(request))
    sizes = [slab.rows * slab.width for slab in waiting]
    one_at_a_time = threading.Lock()

    def work() -> None:
        memory, file = pages(max(sizes, default=0)), None
        with contextlib.ExitStack() as opened:
            for slab in _taken(waiting):
                if slab.file is not file:
                    opened.close()
                    file = slab.file
                    reader = opened.enter_context(file.reading(direct))
                _take(reader, slab, memory)
                with one_at_a_time:
                    report(slab.counts)

    n_threads = min(_THREADS, 1 + sum(sizes) // _SLAB)
    if n_threads == 1:  # another would take longer to start than a small array to read
        return work()
    with ThreadPoolExecutor(n_threads, "reading") as pool:
        threads = [pool.submit(work) for _ in range(n_threads)]
        try:
            wait(threads, return_when=FIRST_EXCEPTION)
        finally:
            waiting.clear()  # after an error, or Ctrl-C, the others soon end
    for thread in threads:
        thread.result()


def _taken(waiting: Any) -> "Iterator[_Slab]":
    """What no other thread has taken. (A checker of types would look at a deque's first.)"""
    with contextlib.suppress(IndexError):
        while True:
            yield waiting.popleft()


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
    is_list = len(span.shape) == 1  # taken as a column: that can be cut
    *lead, n_rows, n_columns = (*span.shape, 1) if is_list else span.shape
    wanted = collections.defaultdict[Any, list[tuple[range, np.ndarray]]](list)
    for index, memory in request.targets:
        index, memory = ((*index, slice(None)), memory[:, None]) if is_list else (index, memory)
        axes = zip(index, (*lead, n_rows, n_columns), strict=True)
        *places, rows, columns = (range(n)[s] for s, n in axes)
        if span.dtype == INT4 and (columns.start % 2 or columns.stop % 2):
            raise GrokkitError(
                f"4-bit weights are packed in pairs, and the entries {columns.start} to "
                f"{columns.stop} cut one; use a mesh with fewer 'model' devices"
            )
        for i in np.ndindex(*map(len, places)):
            matrix = [its[j] for its, j in zip(places, i, strict=True)]
            number = int(np.ravel_multi_index(matrix, lead)) if lead else 0
            wanted[number, rows.start, rows.stop].append((columns, memory[i]))
    slabs = []
    for (number, start, stop), targets in sorted(wanted.items(), key=lambda item: item[0]):
        first = min(columns.start for columns, _ in targets)
        last = max(columns.stop for columns, _ in targets)
        width, stride = span.bytes_of(last - first), span.bytes_of(n_columns)
        step = max(1, _SLAB // width)
        if any(_is_transposed(memory) for _, memory in targets):
            step = min(step, _ROWS)
        for row in range(start, stop, step):
            n = min(step, stop - row)
            offset = span.offset + (number * n_rows + row) * stride + span.bytes_of(first)
            parts = [
                (slice(columns.start - first, columns.stop - first), memory[row - start :][:n])
                for columns, memory in targets
            ]
            slabs.append(_Slab(request.file, span.dtype, offset, n, width, stride, parts, 0))
    done = [span.nbytes * i // max(1, len(slabs)) for i in range(len(slabs) + 1)]
    return [slab._replace(counts=done[i + 1] - done[i]) for i, slab in enumerate(slabs)]


def _take(reader: Reader, slab: _Slab, memory: UInt8[np.ndarray, " room"]) -> None:
    """Read a slab and put it in its places."""
    (_, to), *more = slab.targets
    n_bytes, is_whole = slab.rows * slab.width, slab.width == slab.stride or slab.rows == 1
    if is_whole and not more and to.dtype == slab.dtype and to.flags.c_contiguous:
        return reader.fill(to.reshape(-1).view(np.uint8), slab.offset)
    if is_whole:
        raw = reader.read_in(memory, n_bytes, slab.offset).reshape(slab.rows, -1)
    else:
        raw = memory[:n_bytes].reshape(slab.rows, -1)
        reader.call_for(slab.offset, slab.rows * slab.stride)
        for i, row in enumerate(raw):
            reader.read(row, slab.offset + i * slab.stride)
    values = unpack(raw) if slab.dtype == INT4 else raw.view(slab.dtype)
    for columns, to in slab.targets:
        _copy(values[:, columns], to)


def _copy(values: Shaped[np.ndarray, "row column"], to: Shaped[np.ndarray, "row column"]) -> None:
    """Copy a matrix, transposing it if that is how `to` lies in memory."""
    if not _is_transposed(to) or values.nbytes < _SMALL:
        to[...] = values
        return
    # JAX transposes five times as fast as numpy: blocks that fit a cache, and whose rows do not all
    # begin at the same lines of it.
    n = values.shape[1]
    padded = np.empty((len(values), min(n, _COLUMNS) + _CACHE_LINE), values.dtype)
    for start in range(0, n, _COLUMNS):
        stop = min(n, start + _COLUMNS)
        block = padded[:, : stop - start]
        block[...] = values[:, start:stop]
        to.T[start:stop] = np.asarray(jax.device_put(block.T, _cpu(), may_alias=False))


def _is_transposed(memory: np.ndarray) -> bool:
    return memory.strides[-2] < memory.strides[-1]


@functools.cache
def _cpu() -> Any:
    return jax.local_devices(backend="cpu")[0]
