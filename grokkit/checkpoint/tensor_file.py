"""Where a checkpoint's arrays are, to be read where they are sliced; one official tensor file."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from grokkit.checkpoint.int4 import INT4
from grokkit.checkpoint.pickle_objects import ArrayNote, QuantizedNote
from grokkit.checkpoint.pickle_walk import walk
from grokkit.checkpoint.read import ArraySpan, DataFile, Request, Target, fill
from grokkit.checkpoint.refusal import DOWNLOAD_AGAIN, DOWNLOAD_COMMAND, Refused, reading

_BUFFER = 1024  # bytes read at a time: a header has about 150, the rest is skipped


@dataclasses.dataclass(frozen=True)
class TensorFile(DataFile):
    """One tensor in a file, which may hold others too; known from the header alone."""

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

    def open(self, span: ArraySpan) -> "StoredArray":
        """One of `spans`, to be read where it is sliced."""
        return StoredArray(self, span)


@dataclasses.dataclass(frozen=True)
class StackedTensors(TensorFile):
    """One tensor that is stored in parts: a matrix for each expert, say. Path, size and offset are
    those of the first."""

    parts: tuple[TensorFile, ...] = ()

    @staticmethod
    def of(parts: Sequence[TensorFile]) -> "StackedTensors":
        """Tensors of one shape on a new leading axis."""
        first = parts[0]
        whole = dataclasses.replace(first.weight, shape=(len(parts), *first.weight.shape))
        return StackedTensors(first.path, first.size, whole, None, first.k_last, tuple(parts))

    @property
    def files(self) -> dict[Path, int]:
        """See `TensorFile.files`."""
        return {part.path: part.size for part in self.parts}


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """One array of a tensor. A slice of it (without steps) is read, into memory of its own."""

    file: TensorFile
    span: ArraySpan

    @property
    def dtype(self) -> np.dtype:
        """Of the entries when they have been read: 4-bit ones are unpacked."""
        return np.dtype(np.int8) if self.span.dtype == INT4 else self.span.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return self.span.shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Shaped[np.ndarray, "..."]:
        """**Raises:** `CheckpointError` if a file is gone or has changed since it was opened."""
        index = index if isinstance(index, tuple) else (index,)
        index += (slice(None),) * (len(self.shape) - len(index))
        slices = tuple(i if isinstance(i, slice) else slice(i, i + 1) for i in index)
        found = self.read(slices, self.dtype)
        return found[tuple(slice(None) if isinstance(i, slice) else 0 for i in index)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Shaped[np.ndarray, "..."]:
        return self[()] if dtype is None else self[()].astype(dtype)

    def read(self, slices: tuple[slice, ...], dtype: np.dtype) -> Shaped[np.ndarray, "..."]:
        """A slice along all axes, as another dtype."""
        shape = [len(range(n)[s]) for s, n in zip(slices, self.shape, strict=True)]
        found = np.empty(shape, dtype)
        fill(self.requests([(slices, found)]))
        return found

    def requests(self, targets: Sequence[Target]) -> list[Request]:
        """What to have `grokkit.checkpoint.read.fill` read for some slices, each with its memory."""
        if not isinstance(self.file, StackedTensors):
            return [Request(self.file, self.span, targets)]
        requests = []
        for i, part in enumerate(self.file.parts):
            wanted = []
            for (first, *rest), memory in targets:
                if i in (its := range(*first.indices(len(self)))):
                    wanted.append((tuple(rest), memory[i - its.start]))
            requests.append(Request(part, part.weight, wanted))
        return requests


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
