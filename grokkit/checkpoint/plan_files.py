"""Which files a conversion writes, piece by piece, before any of them is there."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from grokkit.checkpoint.dialect import FORMAT, Storage, metadata, stored_arrays
from grokkit.checkpoint.matrices import Chunks, Conversion, stored_as
from grokkit.checkpoint.names import TensorKey
from grokkit.checkpoint.official import FOLDER, Checkpoint, Entry
from grokkit.checkpoint.pickle_objects import BFLOAT16, FLOAT32, INT8
from grokkit.checkpoint.refusal import refusal
from grokkit.checkpoint.safetensors_file import encode_header
from grokkit.checkpoint.tensor_file import INT4, ArraySpan
from grokkit.checkpoint.tensor_writer import layout
from grokkit.errors import ConfigError

SHARD_BYTES = 5_000_000_000
"""Most bytes of a safetensors file: a layer of Grok-1 takes 4.9 GB."""

_EXPERTS = ("blocks.moe.gate", "blocks.moe.value", "blocks.moe.out")
_MATRICES = {"bfloat16": Storage(BFLOAT16), "float32": Storage(FLOAT32)}


@dataclasses.dataclass(frozen=True)
class Piece:
    """An array in a file that is to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Chunks]
    """Reads, and computes, the bytes anew each time."""

    @property
    def nbytes(self) -> int:
        """Of the array."""
        return ArraySpan(self.dtype, self.shape, 0).nbytes


@dataclasses.dataclass(frozen=True)
class PlannedFile:
    """A file that is to be written."""

    name: str
    """Relative to the checkpoint's directory."""
    pieces: tuple[bytes | Piece, ...]

    @property
    def size(self) -> int:
        """Bytes it will have."""
        return sum(p.nbytes if isinstance(p, Piece) else len(p) for p in self.pieces)

    def content(self) -> Iterator[tuple[str, memoryview]]:
        """Its bytes in order, in parts, each with the name of its array."""
        for piece in self.pieces:
            if isinstance(piece, bytes):
                yield "the header", memoryview(piece)
            else:
                for chunk in piece.chunks():
                    flat: Any = np.ascontiguousarray(chunk).reshape(-1)
                    yield piece.name, flat.view(np.uint8).data


def choose_storages(
    checkpoint: Checkpoint, to: str, dtype: str | None, experts: str | None, group_size: int
) -> dict[str, Storage]:
    """How each parameter is to be stored, by its place in the model; arguments as of `convert`.

    **Raises:** `CheckpointError` or `ConfigError` for what the layout cannot hold.
    """
    found = {}
    for entry in checkpoint:
        key, now = entry.key, stored_as(entry)
        if key.path in found:
            continue
        if key.scales_shape is None:
            found[key.path] = Storage(FLOAT32) if to == "official" else now
        elif experts == "int4" and key.path in _EXPERTS:
            found[key.path] = _int4(key, group_size)
        elif dtype == "int8" or (to == "official" and dtype is None and now.groups is not None):
            found[key.path] = Storage(INT8, key.scales_shape[-2])
        else:
            found[key.path] = now if dtype is None else _MATRICES[dtype]
        _check(checkpoint, key, now, found[key.path], to)
    return found


def _int4(key: TensorKey, group_size: int) -> Storage:
    k = key.shape[-2]
    if group_size < 2 or group_size % 2 or k % group_size:
        raise ConfigError(
            f"group size: expected an even number that divides the {k} rows of {key.path}, found "
            f"{group_size}"
        )
    return Storage(INT4, k // group_size)


def _check(checkpoint: Checkpoint, key: TensorKey, now: Storage, new: Storage, to: str) -> None:
    if to == "official" and key.scales_shape is not None and new.groups is None:
        raise refusal(
            checkpoint.directory,
            "8-bit matrices, which are all that the official layout holds",
            f"{key.path} in {new}",
            "add --dtype int8 to round them to 8 bits, or convert to safetensors",
        )
    if now.dtype == INT4 and new.dtype == INT8:
        raise refusal(
            checkpoint.directory,
            "more than 4 bits to make 8 of",
            f"{key.path} in {now}",
            "convert the checkpoint that it was made from",
        )


def plan_files(
    checkpoint: Checkpoint, to: str, storages: dict[str, Storage], shard_bytes: int = SHARD_BYTES
) -> list[PlannedFile]:
    """The tensor files of a checkpoint in another layout; arguments as of `convert`, and how each
    parameter is to be stored."""
    if to == "official":
        return [_official(entry, storages[entry.key.path]) for entry in checkpoint]
    shards: list[list[Piece]] = []
    room = -1
    # In the order of use: a pass through the model reads the files from the first to the last.
    for _, entries in itertools.groupby(sorted(checkpoint, key=_place), _place):
        layer = [_pieces(entry, storages[entry.key.path]) for entry in entries]
        whole = [piece for pieces in layer for piece in pieces]
        # A layer that fits in one file is not spread over two.
        for pieces in [whole] if _nbytes(whole) <= shard_bytes else layer:
            if _nbytes(pieces) > room or not shards:
                shards.append([])
                room = shard_bytes
            shards[-1] += pieces
            room -= _nbytes(pieces)
    notes = metadata(checkpoint.config, storages)
    return [
        _shard(f"model-{i:05d}-of-{len(shards):05d}.safetensors", shard, notes)
        for i, shard in enumerate(shards, start=1)
    ]


def _place(entry: Entry) -> int:
    if entry.key.path == "embedding.weight":
        return -1
    return 1 << 30 if entry.key.layer is None else entry.key.layer


def _nbytes(pieces: list[Piece]) -> int:
    return sum(piece.nbytes for piece in pieces)


def _official(entry: Entry, storage: Storage) -> PlannedFile:
    key, conversion = entry.key, Conversion(entry, storage, k_last=False)
    arrays = [Piece(key.name, key.dtype, key.shape, conversion.weight_chunks)]
    scales = None
    if key.scales_shape is not None:
        scales = (key.scales_shape, BFLOAT16)
        arrays.append(Piece(key.name, BFLOAT16, key.scales_shape, conversion.scales_chunks))
    pieces = layout((key.shape, key.dtype), scales)
    rest = iter(arrays)
    return PlannedFile(
        f"{FOLDER}/{key.file_name}",
        tuple(piece if isinstance(piece, bytes) else next(rest) for piece in pieces),
    )


def _pieces(entry: Entry, storage: Storage) -> list[Piece]:
    """A parameter's arrays in a safetensors file."""
    conversion = Conversion(entry, storage, k_last=storage.groups is not None)
    stored = stored_arrays(entry.key, storage)
    chunks = [conversion.scales_chunks, conversion.weight_chunks][-len(stored) :]
    return [Piece(n, *a, of_it) for (n, a), of_it in zip(stored.items(), chunks, strict=True)]


def _shard(name: str, pieces: list[Piece], notes: dict[str, str]) -> PlannedFile:
    # Larger entries first, so that each array begins at a multiple of its entries' size.
    pieces = sorted(pieces, key=lambda piece: -piece.dtype.itemsize)
    header = encode_header({piece.name: (piece.dtype, piece.shape) for piece in pieces}, notes)
    return PlannedFile(name, (header, *pieces))


def index_of(files: list[PlannedFile]) -> dict:
    """What stands in the index beside the shards: which file holds which array."""
    pieces = [(p, f.name) for f in files for p in f.pieces if isinstance(p, Piece)]
    return {
        "metadata": {"total_size": sum(p.nbytes for p, _ in pieces), "format": FORMAT},
        "weight_map": {p.name: name for p, name in sorted(pieces, key=lambda x: x[0].name)},
    }
