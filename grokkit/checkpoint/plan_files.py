"""Which files a conversion writes, piece by piece, before any of them is there."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from grokkit.checkpoint.dialect import (
    FORMAT,
    Storage,
    metadata,
    stored_arrays,
)
from grokkit.checkpoint.matrices import Chunks, Conversion, stored_as
from grokkit.checkpoint.names import TensorKey
from grokkit.checkpoint.official import FOLDER, Checkpoint
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
    """The bytes of one array in a file that is to be written."""

    name: str
    nbytes: int
    chunks: Callable[[], Chunks]
    """Reads, and computes, the bytes anew each time."""


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
    """How each parameter is to be stored, by its place in the model.

    **Arguments:**

    - `checkpoint`: that is converted.
    - `to`, `dtype`, `experts`, `group_size`: as for `grokkit.convert`.

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
    """The tensor files of a checkpoint in another layout.

    **Arguments:**

    - `checkpoint`: that is converted.
    - `to`: `"official"` or `"safetensors"`.
    - `storages`: how each parameter is to be stored.
    - `shard_bytes`: most bytes of a safetensors file; one parameter is never divided.
    """
    if to == "official":
        return [_official(Conversion(e, storages[e.key.path], k_last=False)) for e in checkpoint]
    chosen = [(entry, storages[entry.key.path]) for entry in checkpoint]
    conversions = [Conversion(e, s, k_last=s.groups is not None) for e, s in chosen]
    # In the order of use: a pass through the model reads the files from the first to the last.
    conversions.sort(key=lambda c: (_place(c), c.entry.key.index))
    shards: list[list[Conversion]] = []
    room = -1
    for _, found in itertools.groupby(conversions, _place):
        layer = list(found)
        # A layer that fits in one file is not spread over two.
        for part in [layer] if _nbytes(layer) <= shard_bytes else [[c] for c in layer]:
            if _nbytes(part) > room or not shards:
                shards.append([])
                room = shard_bytes
            shards[-1] += part
            room -= _nbytes(part)
    notes = metadata(checkpoint.config, storages)
    return [
        _shard(f"model-{i:05d}-of-{len(shards):05d}.safetensors", shard, notes)
        for i, shard in enumerate(shards, start=1)
    ]


def _place(conversion: Conversion) -> int:
    key = conversion.entry.key
    if key.path == "embedding.weight":
        return -1
    return 1 << 30 if key.layer is None else key.layer


def _nbytes(conversions: list[Conversion]) -> int:
    arrays = [a for c in conversions for a in stored_arrays(c.entry.key, c.storage).values()]
    return sum(ArraySpan(dtype, shape, 0).nbytes for dtype, shape in arrays)


def _official(conversion: Conversion) -> PlannedFile:
    key = conversion.entry.key
    scales = None if key.scales_shape is None else (key.scales_shape, BFLOAT16)
    arrays = iter([conversion.weight_chunks, conversion.scales_chunks])
    pieces = tuple(
        piece if isinstance(piece, bytes) else Piece(key.name, piece.nbytes, next(arrays))
        for piece in layout((key.shape, key.dtype), scales)
    )
    return PlannedFile(f"{FOLDER}/{key.file_name}", pieces)


def _shard(name: str, conversions: list[Conversion], notes: dict[str, str]) -> PlannedFile:
    arrays: list[tuple[str, np.dtype, tuple[int, ...], Callable[[], Chunks]]] = []
    for c in conversions:
        stored = stored_arrays(c.entry.key, c.storage)
        chunks = [c.scales_chunks, c.weight_chunks] if len(stored) == 2 else [c.weight_chunks]
        arrays += [(n, *a, of_it) for (n, a), of_it in zip(stored.items(), chunks, strict=True)]
    # Larger entries first, so that each array begins at a multiple of its entries' size.
    arrays.sort(key=lambda a: -a[1].itemsize)
    header = encode_header({a[0]: (a[1], a[2]) for a in arrays}, notes)
    pieces = [Piece(a[0], ArraySpan(a[1], a[2], 0).nbytes, a[3]) for a in arrays]
    return PlannedFile(name, (header, *pieces))


def index_of(files: list[PlannedFile]) -> dict:
    """What stands in the index beside the shards: which file holds which array."""
    pieces = [(p, f.name) for f in files for p in f.pieces if isinstance(p, Piece)]
    return {
        "metadata": {"total_size": sum(p.nbytes for p, _ in pieces), "format": FORMAT},
        "weight_map": {p.name: name for p, name in sorted(pieces, key=lambda x: x[0].name)},
    }
