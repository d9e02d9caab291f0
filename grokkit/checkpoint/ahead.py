"""Having the disk work while processors are busy elsewhere."""

import collections
import contextlib
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from grokkit.checkpoint import pages

_AHEAD = 1 << 28  # bytes between what is read and what is called for from the disk

Piece = tuple[Path, int, int]
"""A part of a file: where it begins, and how many bytes it has."""


class Ahead:
    """Calls for pieces of files from the disk, in the order in which they will be read."""

    def __init__(self, pieces: Iterable[Piece], thread: ThreadPoolExecutor) -> None:
        self._waiting = collections.deque(pieces)
        self._thread = thread
        self._wanted = 0
        self._one_at_a_time = threading.Lock()
        self.call_for(_AHEAD)

    def call_for(self, n_bytes: int) -> None:
        """Call for so many bytes more."""
        with self._one_at_a_time:
            self._wanted += n_bytes
            while self._wanted > 0 and self._waiting:
                piece = self._waiting.popleft()
                self._wanted -= piece[2]
                self._thread.submit(pages.call_for, *piece)


@contextlib.contextmanager
def calling_ahead(pieces: Iterable[Piece]) -> Iterator[Ahead]:
    """`Ahead`, with a thread that waits for the disk. What it was told, it finishes by itself,
    unless there was an error."""
    joined = list(_joined(pieces))
    if joined:  # this is to be found out before anybody reads
        pages.are_large(max(joined, key=lambda piece: piece[2])[0])
    thread = ThreadPoolExecutor(1, "calling-ahead")
    try:
        yield Ahead(joined, thread)
    except BaseException:
        thread.shutdown(wait=False, cancel_futures=True)
        raise
    thread.shutdown(wait=False)


def _joined(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The same, with those that follow each other in a file as one, up to some size."""
    present: Piece | None = None
    for path, offset, size in pieces:
        if present:
            before, start, length = present
            if before == path and start + length == offset and length < pages.AT_ONCE:
                present = path, start, length + size
                continue
            yield present
        present = path, offset, size
    if present:
        yield present
