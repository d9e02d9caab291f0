"""Having the disk work while processors are busy elsewhere."""

import collections
from collections.abc import Iterable

from grokkit.checkpoint.tensor_file import TensorFile

_AHEAD = 1 << 28  # bytes between what is read and what is called for from the disk

Piece = tuple[TensorFile, int, int]
"""A part of a file: where it begins, and how many bytes it has."""


class Ahead:
    """Calls for pieces of files from the disk, in the order in which they will be read."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self._waiting = collections.deque(pieces)
        self.call_for(_AHEAD)

    def call_for(self, n_bytes: int) -> None:
        """Call for at least so many bytes more."""
        while n_bytes > 0:
            try:  # another thread may have taken the last
                file, offset, size = self._waiting.popleft()
            except IndexError:
                return
            file.call_for(offset, size)
            n_bytes -= size
