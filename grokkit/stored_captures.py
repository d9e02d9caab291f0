"""Captures on disk: a directory of safetensors files, one a layer, that is read as it is looked at.

```
captures.json          what was captured of which prompts, and every file's size; written first
prompts.safetensors    the token ids, and how many of each row are real
before.safetensors     sites before the layers
layer-00.safetensors   each as `ActivationCache.save` writes it, with this layer alone
...
after.safetensors      sites after the layers
complete               written last
stream-05.safetensors  while it is incomplete: the residual stream that enters the next layer
.lock                  while it is written to: held by the process that does
```

Only files that hold something are there. Each is written under a temporary name first.
"""

import contextlib
import errno
import json
import math
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int

from grokkit.activation_cache import Activation, ActivationCache, Layers
from grokkit.checkpoint.manifest import read_json, write_json
from grokkit.checkpoint.safetensors_file import DATA_TYPES, encode_header
from grokkit.errors import CaptureError, CheckpointError
from grokkit.file_lock import locked
from grokkit.runtime.files import TEMPORARY, replacing

MANIFEST = "captures.json"
COMPLETE = "complete"
LOCK = ".lock"
PROMPTS = "prompts.safetensors"
BEFORE, AFTER = "before.safetensors", "after.safetensors"

_FORMAT, _VERSION = "grokkit captures", 1
_SPARE = 1 << 20  # bytes for the small files

Arrays = dict[str, tuple[np.dtype, tuple[int, ...]]]
"""Dtype and shape of each array of a file, by its name."""


class StoredCaptures(ActivationCache):
    """Activations in a directory, read from there as they are asked for; see `open_captures`.

    It is indexed as any `ActivationCache`. `cache["pattern"]` reads all layers, `cache["pattern", 3]`
    is layer 3's file mapped into memory, of which only what is touched is read, and `cache.slice`
    reads what it keeps.
    """

    directory: Path
    tokens: Int[np.ndarray, "batch position"]
    """Token ids of the prompts."""
    lengths: Int[np.ndarray, " batch"]
    """How many of each row are real."""
    request: dict[str, Any]
    """What was asked for, of which checkpoint, and with what."""

    def __init__(self, directory: Path, entries: dict[str, Activation], manifest: Any) -> None:
        """`open_captures` makes them."""
        super().__init__(entries)
        self.directory = directory
        self.request = manifest["request"]
        prompts = map_arrays(directory / PROMPTS)
        self.tokens, self.lengths = np.array(prompts["tokens"]), np.array(prompts["lengths"])

    def __repr__(self) -> str:
        return f"{self.directory}\n{super().__repr__()}"


class Store:
    """A directory of captures that is being filled, or was."""

    def __init__(
        self, directory: Path, request: dict[str, Any], files: Mapping[str, Arrays], notes: Any
    ) -> None:
        """Nothing is read or written yet.

        **Arguments:**

        - `directory`: where.
        - `request`: what must be the same for a sweep to go on where another stopped: texts, numbers
            and lists of them.
        - `files`: the arrays of each file.
        - `notes`: site, axes and layers of each capture, as `ActivationCache.save` notes them.
        """
        self.directory = directory
        self.request = request
        self.files = dict(files)
        self.notes = notes

    def header(self, name: str) -> bytes:
        """What stands before the arrays' bytes in a file."""
        notes = {}
        for key in self.files[name]:
            note = dict(self.notes[key])
            if note["layers"] is not None:
                note["layers"] = [layer_of(name)]
            notes[key] = note
        return encode_header(self.files[name], {"grokkit": json.dumps(notes)})

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return len(self.header(name)) + sum(nbytes(*a) for a in self.files[name].values())

    @property
    def is_complete(self) -> bool:
        """Whether every file is there."""
        return (self.directory / COMPLETE).exists()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Make the directory, and keep others from writing into it meanwhile.

        **Raises:** `CaptureError` if one does, or if there can be no such directory.
        """
        folder = self.directory
        if not folder.parent.is_dir():
            raise refused(folder.parent, "a directory to write into", "none", "create it first")
        if folder.exists() and not folder.is_dir():
            raise refused(folder, "a new or empty directory", "a file", "choose another name")
        folder.mkdir(exist_ok=True)

        def busy(holder: str) -> CaptureError:
            return refused(
                folder, "a directory that nothing else writes into", f"{holder} writing captures",
                "wait until that has ended, or choose another directory",
            )  # fmt: skip

        with locked(folder / LOCK, busy):
            yield

    def begin(self, tokens: np.ndarray, lengths: np.ndarray) -> tuple[int, list[str]]:
        """Begin to fill the directory, or go on with what is in it.

        **Returns:** the layer to begin at, and the files that are complete.

        **Raises:** `CaptureError` if what is there was not begun by the same request.
        """
        folder = self.directory
        for unfinished in folder.glob(TEMPORARY):
            unfinished.unlink()
        if (folder / MANIFEST).exists():
            self.check_request()
            return self._next_layer(), [name for name in self.files if self._is_there(name)]
        others = [path.name for path in folder.iterdir() if path.name not in (PROMPTS, LOCK)]
        if others:
            raise refused(
                folder, "a new or empty directory, or captures that were cut off",
                f"{len(others)} other entries, {min(others)!r} among them",
                "choose another name, or remove what is there",
            )  # fmt: skip
        ids = {"tokens": np.ascontiguousarray(tokens), "lengths": np.ascontiguousarray(lengths)}
        header = encode_header({k: (a.dtype, a.shape) for k, a in ids.items()}, {})
        write_file(folder / PROMPTS, [header, *(a.tobytes() for a in ids.values())])
        write_json(folder / MANIFEST, {
            "format": _FORMAT, "version": _VERSION, "request": self.request,
            "captures": self.notes, "files": {name: self.size(name) for name in self.files},
        })  # fmt: skip
        return 0, []

    def check_request(self) -> None:
        """**Raises:** `CaptureError` if the directory holds the captures of another request."""
        there = read_captures_json(self.directory)["request"]
        names = [n for n in {**there, **self.request} if there.get(n) != self.request.get(n)]
        if names:

            def listed(values: dict[str, Any]) -> str:
                return "; ".join(f"{n}: {_short(values.get(n))}" for n in names)

            raise refused(
                self.directory, f"the same request, to go on with it: {listed(self.request)}",
                f"captures of another: {listed(there)}",
                "choose another directory, or remove this one to start anew",
            )  # fmt: skip

    def _next_layer(self) -> int:
        if self.is_complete:
            return 0
        first = max((layer_of(path.name) for path in self.directory.glob("stream-*")), default=0)
        for name in self.files:
            is_due = name == BEFORE if layer_of(name) < 0 else layer_of(name) < first
            if first and name != AFTER and is_due and not self._is_there(name):
                raise refused(
                    self.directory / name, f"a file of {self.size(name):,} bytes, complete before "
                    f"the sweep came to layer {first}", "none, or one of another size",
                    f"remove {self.directory} to start anew",
                )  # fmt: skip
        return first

    def _is_there(self, name: str) -> bool:
        path = self.directory / name
        return path.is_file() and path.stat().st_size == self.size(name)

    def check_space(self, stream: int) -> None:
        """**Raises:** `CaptureError` if the disk has too little room; `stream`: the stream's bytes."""
        missing = sum(self.size(name) for name in self.files if not self._is_there(name))
        needed = missing + 2 * stream + _SPARE  # a new stream is written before the old one goes
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise refused(
                self.directory, f"{needed:,} bytes free", f"{free:,}",
                f"free {needed - free:,} bytes, choose another disk, or capture less",
            )  # fmt: skip

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator["CaptureFile"]:
        """A file of captures to fill; it gets its name when it is complete."""
        with (
            self._room(),
            replacing(self.directory / name, durable=True) as temporary,
            open(temporary, "wb") as file,
        ):
            yield CaptureFile(file, self.header(name), self.files[name])

    @contextlib.contextmanager
    def _room(self) -> Iterator[None]:
        """Say what to do about a full disk."""
        try:
            yield
        except OSError as e:
            if e.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            total = sum(map(self.size, self.files))
            done = sum(self.size(name) for name in self.files if self._is_there(name))
            raise refused(
                self.directory, f"room for {total:,} bytes", f"a full disk after {done:,}",
                "free the rest and make the same call again: it goes on at the layer where it "
                "stopped",
            ) from e  # fmt: skip

    def keep_stream(self, layer: int, stream: np.ndarray) -> None:
        """Note that everything before `layer` is written, and what enters it."""
        header = encode_header({"stream": (stream.dtype, stream.shape)}, {})
        with self._room():
            write_file(self._stream_file(layer), [header, _bytes(stream)])
        self._remove_streams(layer)

    def stream(self, layer: int) -> np.ndarray:
        """What enters `layer`, as it was kept."""
        return np.array(map_arrays(self._stream_file(layer))["stream"])

    def _stream_file(self, layer: int) -> Path:
        return self.directory / f"stream-{layer:02}.safetensors"

    def _remove_streams(self, but: int = -1) -> None:
        for path in self.directory.glob("stream-*"):
            if layer_of(path.name) != but:
                path.unlink()

    def finish(self) -> None:
        """Mark the directory as complete."""
        write_file(self.directory / COMPLETE, [])
        self._remove_streams()


class CaptureFile:
    """A safetensors file whose arrays come piece by piece, some rows of the batch at a time."""

    def __init__(self, file: BinaryIO, header: bytes, arrays: Arrays) -> None:
        self._file = file
        self._offsets, at = {}, len(header)
        for name, (dtype, shape) in arrays.items():
            self._offsets[name] = at
            at += nbytes(dtype, shape)
        write(file, header)

    def put(self, name: str, value: np.ndarray, row: int) -> None:
        """Write some rows of an array: `value` [row, ...] begins at row `row` of the batch."""
        each = value.nbytes // len(value) if row else 0
        self._file.seek(self._offsets[name] + row * each)
        write(self._file, _bytes(value))


def open_captures(directory: str | os.PathLike[str]) -> StoredCaptures:
    """Open what `LanguageModel.capture_to` wrote. Nothing is read but the files' headers.

    **Arguments:**

    - `directory`: where it wrote.

    **Returns:** a `StoredCaptures`, indexed as any `ActivationCache`.

    **Raises:** `CaptureError` if it is something else, or incomplete; the message says what is
    missing.
    """
    folder = Path(directory).expanduser()
    manifest = read_captures_json(folder)
    if not (folder / COMPLETE).exists():
        raise _incomplete(folder, manifest)
    found: dict[str, dict[int, np.ndarray]] = {name: {} for name in manifest["captures"]}
    for name, size in manifest["files"].items():
        path = folder / name
        there = path.stat().st_size if path.is_file() else None
        if there != size:
            raise refused(
                path, f"a file of {size:,} bytes, as {MANIFEST} says",
                "none" if there is None else f"{there:,} bytes",
                "copy it again from where it was complete, or capture again",
            )  # fmt: skip
        for key, value in map_arrays(path).items():
            found[key][layer_of(name)] = value
    entries = {}
    for key, note in manifest["captures"].items():
        layers = note["layers"]
        value = found[key][-1] if layers is None else Layers([found[key][i][0] for i in layers])
        axes = None if note["axes"] is None else tuple(note["axes"])
        entries[key] = Activation(
            value, note["site"], axes, None if layers is None else tuple(layers)
        )
    return StoredCaptures(folder, entries, manifest)


def _incomplete(folder: Path, manifest: Any) -> CaptureError:
    missing = [name for name in manifest["files"] if not (folder / name).exists()]
    shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    return refused(
        folder, f"complete captures: {len(manifest['files'])} files and {COMPLETE!r}",
        f"a sweep that was cut off, or is still running: {shown or COMPLETE} "
        f"{'are' if len(missing) > 1 else 'is'} missing",
        "repeat the call that began it, lm.capture_to with the same directory, prompts, captures "
        "and edits: it goes on at the layer where it stopped",
    )  # fmt: skip


def read_captures_json(folder: Path) -> dict[str, Any]:
    """The manifest of a directory of captures. **Raises:** `CaptureError` if it is none."""
    expected = "a directory that lm.capture_to wrote"
    remedy = "give the directory that holds captures.json"
    if not (folder / MANIFEST).is_file():
        there = f"no {MANIFEST} in it" if folder.is_dir() else "no directory"
        raise refused(folder, expected, there, remedy)
    try:
        values = read_json(folder / MANIFEST)
    except CheckpointError as e:
        raise CaptureError(str(e)) from None
    if values.get("format") != _FORMAT or values.get("version") != _VERSION:
        raise refused(
            folder / MANIFEST, f"{_FORMAT}, version {_VERSION}",
            f"format {values.get('format')!r:.50}, version {values.get('version')!r:.50}",
            "use the grokkit that wrote it",
        )  # fmt: skip
    return values


def map_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, mapped into memory."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, note in header.items():
        dtype, shape = DATA_TYPES[note["dtype"]], tuple(note["shape"])
        if 0 in shape:
            found[name] = np.zeros(shape, dtype)
            continue
        at = 8 + length + note["data_offsets"][0]
        found[name] = np.memmap(path, dtype, "r", at, shape)
    return found


def layer_name(layer: int) -> str:
    """The file of a layer."""
    return f"layer-{layer:02}.safetensors"


def layer_of(name: str) -> int:
    """The layer in a file's name; -1 if there is none."""
    _, _, rest = name.partition("-")
    number = rest.split(".")[0]
    return int(number) if number.isdecimal() else -1


def nbytes(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of an array."""
    return math.prod(shape) * dtype.itemsize


def refused(where: Path, expected: str, found: str, remedy: str) -> CaptureError:
    """The error that names the file, what was expected, what was found and what to do."""
    return CaptureError(
        f"{where}\n  expected: {expected}\n  found: {found}\n  what to do: {remedy}"
    )


def write_file(path: Path, pieces: list[Any]) -> None:
    """Write a file, which is on the disk before it has its name."""
    with replacing(path, durable=True) as temporary, open(temporary, "wb") as file:
        for piece in pieces:
            write(file, piece)


def write(file: BinaryIO, data: Any) -> None:
    """Write some bytes of a file."""
    file.write(data)


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
