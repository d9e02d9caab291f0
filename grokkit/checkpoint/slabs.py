"""Reading parts of an array in a file into memory, a slab of rows at a time.

Several threads take one slab after another, read it and put it in its place; where memory is
touched for the first time, that alone takes as long as the rest. A matrix may be turned round on
the way (the file holds [k, n], the model [n, k]), while its slab is in the processor's cache. Rows
of such a slab lie an odd distance apart, since at a power of two they would all fall on the same
few lines of the cache.
"""

import collections
import dataclasses
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import jax
import numpy as np

from grokkit import cpu
from grokkit.checkpoint.tensor_file import ArraySpan, TensorFile

_SLAB = 1 << 23  # bytes
MOST_THREADS = 4
_TURNED_ROWS = 256  # rows turned round at once
_APART = 64  # bytes between rows of a slab to be turned round
_VECTORS = 512  # buffers for one read; systems allow 1024


@dataclasses.dataclass(frozen=True)
class Place:
    """A part of a file's array, and the memory that it goes to."""

    index: tuple[slice, ...]
    """Which part, in the file's order of axes."""
    memory: np.ndarray
    """Filled with it; of the part's shape, with the last two axes exchanged if it is turned."""
    device: Any
    """The CPU device that turns it round."""


def fill(file: TensorFile, span: ArraySpan, turned: bool, places: Sequence[Place]) -> None:
    """Read every place's part of an array.

    Beyond the places' memory each of at most four threads uses a slab, of 8 MB or a row.

    **Arguments:**

    - `file`, `span`: which array of which file.
    - `turned`: exchange the last two axes.
    - `places`: what to read. Rows that no place asks for are not read; of wide rows no columns
        are read outside the places'.

    **Raises:** `CheckpointError` if the file is gone or has changed since its header was read.
    """
    parts = [_part(span, place, turned) for place in places]
    if not parts:
        return
    columns = slice(min(p.columns.start for p in parts), max(p.columns.stop for p in parts))
    slabs = _slabs(span, parts, turned)
    layout = _Layout.of(span, columns, turned)
    waiting = collections.deque(slabs)
    n_threads = min(len(slabs), cpu.cores(), MOST_THREADS)

    def work(read: Any) -> None:
        buffer = layout.buffer(max(slab.n for slab in slabs))
        while slab := _next(waiting):
            rows = layout.read(read, buffer, slab)
            _put(rows, parts, slab, columns.start, turned)

    with file.reading() as read, ThreadPoolExecutor(n_threads, "reading") as pool:
        threads = [pool.submit(work, read) for _ in range(n_threads)]
        try:
            wait(threads, return_when=FIRST_EXCEPTION)
        finally:
            waiting.clear()  # after an error, or Ctrl-C, the others soon end
        for thread in threads:
            thread.result()


@dataclasses.dataclass(frozen=True)
class _Part:
    """A place with the array seen as [lead, row, column]."""

    lead: range
    rows: slice
    columns: slice
    memory: np.ndarray
    device: Any


def _part(span: ArraySpan, place: Place, turned: bool) -> _Part:
    shape: tuple[int, ...] = (1, 1, *span.shape)[-max(3, len(span.shape)) :]
    index = (*(slice(None),) * (len(shape) - len(place.index)), *place.index)
    ranges = [range(*s.indices(n)) for s, n in zip(index, shape, strict=True)]
    *lead, rows, columns = ranges
    first = lead[0]
    for size, r in zip(shape[1:-2], lead[1:], strict=True):
        # Only the first axis may be cut: the others run on in one range.
        assert len(r) == size
        first = range(first.start * size, first.stop * size)
    last = (len(columns), len(rows)) if turned else (len(rows), len(columns))
    memory = place.memory.reshape(len(first), *last)
    return _Part(
        first, slice(rows.start, rows.stop), slice(columns.start, columns.stop), memory,
        place.device,
    )  # fmt: skip


class _Slab(NamedTuple):
    """Consecutive rows of one matrix."""

    lead: int
    """Which matrix."""
    rows: slice
    """The rows of the part that wants it."""
    start: int
    n: int


def _slabs(span: ArraySpan, parts: Sequence[_Part], turned: bool) -> list[_Slab]:
    """Every row that some part needs, once."""
    most = max(1, _SLAB // ((1, *span.shape)[-1] * span.dtype.itemsize))
    if turned:
        most = min(most, _TURNED_ROWS)
    wanted = sorted({(lead, p.rows.start, p.rows.stop) for p in parts for lead in p.lead})
    return [
        _Slab(lead, slice(first, stop), start, min(most, stop - start))
        for lead, first, stop in wanted
        for start in range(first, stop, most)
    ]


def _next(waiting: collections.deque[_Slab]) -> _Slab | None:
    try:
        return waiting.popleft()
    except IndexError:
        return None


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How rows of an array lie in the file, and some of their columns in memory; in bytes."""

    span: ArraySpan
    n_rows: int
    """Rows of each matrix."""
    stride: int
    """From row to row in the file."""
    skipped: int
    """Of a row before the columns."""
    width: int
    """Of a row's columns."""
    pitch: int
    """From row to row in memory."""

    @staticmethod
    def of(span: ArraySpan, columns: slice, turned: bool) -> "_Layout":
        size = span.dtype.itemsize
        width = (columns.stop - columns.start) * size
        n_rows, n_columns = (1, 1, *span.shape)[-2:]
        return _Layout(
            span, n_rows, n_columns * size, columns.start * size, width,
            width + (_APART if turned else 0),
        )  # fmt: skip

    def buffer(self, n: int) -> np.ndarray:
        """Memory for `n` rows."""
        return np.empty((n, self.pitch), np.uint8)

    def read(self, read: Any, buffer: np.ndarray, slab: _Slab) -> np.ndarray:
        """The columns of a slab's rows, as an array [row, column] in `buffer`."""
        rows = buffer[: slab.n]
        row = slab.lead * self.n_rows + slab.start
        start = self.span.offset + row * self.stride + self.skipped
        if self.pitch == self.stride:
            read([rows.reshape(-1)], start)
        elif self.width == self.stride:
            for i in range(0, slab.n, _VECTORS):
                read([r[: self.width] for r in rows[i : i + _VECTORS]], start + i * self.stride)
        else:
            for i in range(slab.n):
                read([rows[i, : self.width]], start + i * self.stride)
        return rows[:, : self.width].view(self.span.dtype)


def _put(
    rows: np.ndarray, parts: Sequence[_Part], slab: _Slab, first_column: int, turned: bool
) -> None:
    """Copy a slab's rows to the parts that hold them."""
    for part in parts:
        if slab.rows != part.rows or slab.lead not in part.lead:
            continue
        to = part.memory[slab.lead - part.lead.start]
        first = slab.start - part.rows.start
        at = slice(first, first + slab.n)
        columns = slice(part.columns.start - first_column, part.columns.stop - first_column)
        if not turned:
            to[at] = rows[:, columns]
        elif rows.itemsize == 1 and cpu.is_there():
            cpu.turn(rows[:, columns], to[:, at])
        else:  # ten times as fast as numpy
            turned_rows = jax.device_put(rows[:, columns].T, part.device, may_alias=False)
            to[:, at] = np.asarray(turned_rows)
