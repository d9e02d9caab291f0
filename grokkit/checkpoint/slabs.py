"""Reading parts of arrays in files into memory, a slab of rows at a time.

Several threads take one slab after another, of one array after another, read it and put it in its
place; where memory is touched for the first time, that alone takes as long as the rest. A matrix
may be turned round on the way (the file holds [k, n], the model [n, k]), while its slab is in the
processor's cache.
"""

import collections
import contextlib
import dataclasses
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import jax
import numpy as np

from grokkit import cpu
from grokkit.checkpoint.ahead import Ahead, Piece, calling_ahead
from grokkit.checkpoint.pages import PAGE
from grokkit.checkpoint.tensor_file import ArraySpan, DirectReader, TensorFile

_SLAB = 1 << 22  # bytes
MOST_THREADS = 4
_TURNED_ROWS = 64  # rows turned round at once


@dataclasses.dataclass(frozen=True)
class Place:
    """A part of a file's array, and the memory that it goes to."""

    index: tuple[slice, ...]
    """Which part, in the file's order of axes."""
    memory: np.ndarray
    """Filled with it; of the part's shape, with the last two axes exchanged if it is turned."""
    device: Any
    """The CPU device that turns it round."""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Parts of one array of a file."""

    file: TensorFile
    span: ArraySpan
    turned: bool
    """Exchange the last two axes."""
    places: Sequence[Place]
    """What to read. Rows that no place asks for are not read; of wide rows no columns are read
    outside the places'."""


def fill(
    arrays: Sequence[Wanted],
    report: Callable[[int], object] = lambda n_bytes: None,
    then: Sequence[Wanted] = (),
    past_cache: bool = False,
    pool: ThreadPoolExecutor | None = None,
) -> None:
    """Read every place's part of some arrays.

    Beyond the places' memory each of at most four threads uses a slab, of 4 MB or a row. The disk
    is told 270 MB ahead what will be read, so that it works while processors are busy elsewhere.
    Where the page cache is passed, that is done by threads that wait for it: more than processors.

    **Arguments:**

    - `arrays`: what to read.
    - `report`: told how many of an array's bytes are done with, by one thread at a time.
    - `then`: what will be read next, in another call; the disk is told of its beginning.
    - `past_cache`: leave the system's page cache alone, where whole rows are read: it would not
        keep what is read, and copying out of it takes the processors' time.
    - `pool`: threads to do it, from `new_pool`; they keep their slabs' memory from call to call.

    **Raises:** `CheckpointError` if a file is gone or has changed since its header was read.
    """
    readings = _readings(arrays)
    waiting = collections.deque(item for reading in readings for item in reading.items())
    is_called_for = not past_cache and len(waiting) > 1
    pieces = (
        piece
        for reading in ([*readings, *_readings(then)] if is_called_for else [])
        for piece in reading.pieces()
    )
    n_threads = min(len(waiting), MOST_THREADS if past_cache else min(cpu.cores(), MOST_THREADS))
    one_at_a_time = threading.Lock()
    largest = max((reading.buffer_bytes for reading in readings), default=0)

    def work(memory: np.ndarray, ahead: Ahead) -> None:
        present: _Reading | None = None
        buffers = dict[Any, _Buffer]()
        with contextlib.ExitStack() as opened:
            while item := _next(waiting.popleft):
                reading, slab, n_bytes = item
                if reading is not present:
                    opened.close()
                    present, file = reading, reading.wanted.file
                    if directly := past_cache and reading.layout.is_whole:
                        direct = opened.enter_context(file.reading_past_cache())
                    else:
                        read = opened.enter_context(file.reading())
                        buffer = reading.buffer(memory, buffers)
                if directly:
                    reading.take_past_cache(direct, _bytes(memory), slab)
                else:
                    ahead.call_for(slab.n * reading.layout.stride)
                    reading.take(read, buffer, slab)
                with one_at_a_time:
                    report(n_bytes)

    with contextlib.ExitStack() as opened:
        ahead = opened.enter_context(calling_ahead(pieces))
        if n_threads <= 1:  # a thread would take longer to start than a small array to read
            return work(_new_memory(largest), ahead)
        its_pool = pool or opened.enter_context(new_pool())
        threads = [
            its_pool.submit(lambda: work(_kept_memory(largest), ahead)) for _ in range(n_threads)
        ]
        try:
            wait(threads, return_when=FIRST_EXCEPTION)
        finally:
            waiting.clear()  # after an error, or Ctrl-C, the others soon end
            wait(threads)
        for thread in threads:
            thread.result()


def new_pool() -> ThreadPoolExecutor:
    """Threads for `fill`."""
    return ThreadPoolExecutor(MOST_THREADS, "reading")


def _new_memory(n_bytes: int) -> np.ndarray:
    """Memory for so many bytes from anywhere in a file, to be read as whole pages."""
    memory = np.empty(n_bytes + 3 * PAGE, np.uint8)
    return memory[-memory.ctypes.data % PAGE :]


_kept = threading.local()


def _kept_memory(n_bytes: int) -> np.ndarray:
    """The same, of this thread: to touch new memory takes as long as to read it."""
    if getattr(_kept, "n_bytes", -1) < n_bytes:
        _kept.n_bytes, _kept.memory = n_bytes, _new_memory(n_bytes)
    return _kept.memory


def _readings(arrays: "Sequence[Wanted]") -> "list[_Reading]":
    return [_Reading.of(wanted) for wanted in arrays if wanted.places]


@dataclasses.dataclass(frozen=True)
class _Reading:
    """One array, cut into slabs."""

    wanted: Wanted
    parts: "list[_Part]"
    columns: slice
    slabs: "list[_Slab]"
    layout: "_Layout"

    @staticmethod
    def of(wanted: Wanted) -> "_Reading":
        span, turned = wanted.span, wanted.turned
        parts = [_part(span, place, turned) for place in wanted.places]
        columns = slice(min(p.columns.start for p in parts), max(p.columns.stop for p in parts))
        slabs = _slabs(span, parts, turned)
        return _Reading(wanted, parts, columns, slabs, _Layout.of(span, columns))

    @property
    def _most_rows(self) -> int:
        return max(slab.n for slab in self.slabs)

    @property
    def buffer_bytes(self) -> int:
        """What a slab takes."""
        return self._most_rows * self.layout.width

    def buffer(self, memory: np.ndarray, made: "dict[Any, _Buffer]") -> "_Buffer":
        """A buffer for a slab in a thread's memory; arrays of one form share it."""
        key = self._most_rows, self.layout.width, self.layout.is_whole
        if key not in made:
            made[key] = self.layout.buffer(memory[: self.buffer_bytes], self._most_rows)
        return made[key]

    def items(self) -> "list[_Item]":
        """The slabs, each with the bytes of the array that it accounts for."""
        total, n = self.wanted.span.nbytes, len(self.slabs)
        done = [total * i // n for i in range(n + 1)]
        return [(self, slab, done[i + 1] - done[i]) for i, slab in enumerate(self.slabs)]

    def pieces(self) -> "list[Piece]":
        """What will be read of the file. Rows of which only some columns are read lie too far
        apart to be named."""
        if not self.layout.is_whole:
            return []
        path, layout = self.wanted.file.path, self.layout
        return [(path, layout.start(slab), slab.n * layout.stride) for slab in self.slabs]

    def take(self, read: Any, buffer: "_Buffer", slab: "_Slab") -> None:
        """Read a slab and put it in its places."""
        parts = self._parts_of(slab)
        place = self._place_as_it_is(slab, parts)
        if place is not None:
            return self.layout.read_into(read, place, slab)
        rows = self.layout.read(read, buffer, slab)
        _put(rows, parts, slab, self.columns.start, self.wanted.turned)

    def take_past_cache(self, file: DirectReader, memory: memoryview, slab: "_Slab") -> None:
        """The same, of whole rows."""
        layout, parts = self.layout, self._parts_of(slab)
        place = self._place_as_it_is(slab, parts)
        if place is not None and file.read_into(_bytes(place), layout.start(slab)):
            return
        found = file.read(memory, slab.n * layout.width, layout.start(slab))
        rows = np.frombuffer(found, layout.span.dtype).reshape(slab.n, -1)
        _put(rows, parts, slab, self.columns.start, self.wanted.turned)

    def _place_as_it_is(self, slab: "_Slab", parts: "list[_Part]") -> np.ndarray | None:
        """Where a slab belongs, if it lies there just as in the file."""
        if len(parts) > 1 or not self.layout.is_whole or self.wanted.turned:
            return None
        memory = parts[0].rows_of(slab)
        return memory if memory.flags.c_contiguous else None

    def _parts_of(self, slab: "_Slab") -> "list[_Part]":
        return [p for p in self.parts if slab.rows == p.rows and slab.lead in p.lead]


_Item = tuple[_Reading, "_Slab", int]


@dataclasses.dataclass(frozen=True)
class _Part:
    """A place with the array seen as [lead, row, column]."""

    lead: range
    rows: slice
    columns: slice
    memory: np.ndarray
    device: Any

    def rows_of(self, slab: "_Slab") -> np.ndarray:
        """Where a slab's rows go, as they lie in the file."""
        first = slab.start - self.rows.start
        return self.memory[slab.lead - self.lead.start][first : first + slab.n]


def _part(span: ArraySpan, place: Place, turned: bool) -> _Part:
    shape = _matrices(span)
    index = (*place.index, slice(None)) if len(span.shape) == 1 else place.index
    index = (*(slice(None),) * (len(shape) - len(index)), *index)
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


def _matrices(span: ArraySpan) -> tuple[int, ...]:
    """An array's shape, of [lead, row, column] at least. A list is a column: that can be cut."""
    shape = (*span.shape, 1) if len(span.shape) == 1 else span.shape
    return (*(1,) * (3 - len(shape)), *shape)


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
    row_bytes = _matrices(span)[-1] * span.dtype.itemsize
    most = max(1, _SLAB // row_bytes)
    if turned and most > _TURNED_ROWS:
        # Turning is fast where they begin at the lines of the result.
        most -= most % _TURNED_ROWS
    wanted = sorted({(lead, p.rows.start, p.rows.stop) for p in parts for lead in p.lead})
    return [
        _Slab(lead, slice(first, stop), start, min(most, stop - start))
        for lead, first, stop in wanted
        for start in range(first, stop, most)
    ]


def _next(take: Callable[[], Any]) -> Any:
    # Not handed the queue itself: a checker of types would look at what another thread takes.
    try:
        return take()
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

    @staticmethod
    def of(span: ArraySpan, columns: slice) -> "_Layout":
        size = span.dtype.itemsize
        width = (columns.stop - columns.start) * size
        *_, n_rows, n_columns = _matrices(span)
        return _Layout(span, n_rows, n_columns * size, columns.start * size, width)

    def buffer(self, memory: np.ndarray, n: int) -> "_Buffer":
        """Room for `n` rows in some memory."""
        rows = memory.reshape(n, self.width)
        # To make these anew for each slab would take as long as to read it.
        return _Buffer(rows, [] if self.is_whole else [_bytes(row) for row in rows])

    @property
    def is_whole(self) -> bool:
        """Whether the columns are all that there are."""
        return self.width == self.stride

    def read_into(self, read: Any, memory: np.ndarray, slab: _Slab) -> None:
        """A slab's rows, with all their columns, straight to where they belong."""
        read([_bytes(memory)], slab.n * self.width, self.start(slab))

    def read(self, read: Any, buffer: "_Buffer", slab: _Slab) -> np.ndarray:
        """The columns of a slab's rows, as an array [row, column] in `buffer`."""
        rows, start = buffer.rows[: slab.n], self.start(slab)
        if self.is_whole:
            read([_bytes(rows)], rows.nbytes, start)
        else:
            for i, row in enumerate(buffer.views[: slab.n]):
                read([row], self.width, start + i * self.stride)
        return rows.view(self.span.dtype)

    def start(self, slab: _Slab) -> int:
        """Where a slab begins in the file."""
        row = slab.lead * self.n_rows + slab.start
        return self.span.offset + row * self.stride + self.skipped


def _bytes(memory: np.ndarray) -> memoryview:
    return memoryview(memory.reshape(-1).view(np.uint8))  # pyright: ignore[reportArgumentType]


class _Buffer(NamedTuple):
    """Memory for a slab."""

    rows: np.ndarray
    """[row, byte]."""
    views: list[memoryview]
    """Each row's, where rows are read one by one."""


def _put(
    rows: np.ndarray, parts: Sequence[_Part], slab: _Slab, first_column: int, turned: bool
) -> None:
    """Copy a slab's rows to the parts that hold them."""
    places = []
    for part in parts:
        columns = slice(part.columns.start - first_column, part.columns.stop - first_column)
        if not turned:
            part.rows_of(slab)[:] = rows[:, columns]
            continue
        to = part.memory[slab.lead - part.lead.start]
        first = slab.start - part.rows.start
        to = to[:, first : first + slab.n]
        if rows.itemsize == 1 and cpu.is_there():
            places.append((columns.start, to))
        else:  # ten times as fast as numpy
            turned_rows = jax.device_put(rows[:, columns].T, part.device, may_alias=False)
            to[:] = np.asarray(turned_rows)
    if places:
        cpu.turn(rows, places)
