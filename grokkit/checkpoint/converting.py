"""Conversion of a checkpoint from one layout to another.

Files are written into `TARGET.partial`, each under a temporary name first, and noted down with
their digests as they are complete. The directory gets its name when all of them are, so that a
conversion that was killed leaves nothing that loads; the same command then goes on after the last
complete file.
"""

import dataclasses
import errno
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm.auto import tqdm

from grokkit.checkpoint.dialect import INDEX
from grokkit.checkpoint.manifest import (
    MANIFEST,
    PROGRESS,
    FileRecord,
    check_digests,
    check_sizes,
    read_json,
    read_manifest,
    records,
    sha256,
    write_json,
    write_manifest,
)
from grokkit.checkpoint.official import CONFIG_FILE, TOKENIZER_FILE, Checkpoint
from grokkit.checkpoint.opening import open_checkpoint
from grokkit.checkpoint.plan_files import (
    SHARD_BYTES,
    Piece,
    PlannedFile,
    choose_storages,
    index_of,
    plan_files,
)
from grokkit.checkpoint.refusal import check_target, refusal
from grokkit.checkpoint.tensor_writer import atomic_file
from grokkit.errors import CheckpointError, ConfigError

LAYOUTS = ("official", "safetensors")
DTYPES = ("int8", "bfloat16", "float32")

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_SPARE = 1 << 20  # bytes for the small files


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: str | None = None,
    dtype: str | None = None,
    experts: str | None = None,
    group_size: int = 32,
    shard_bytes: int = SHARD_BYTES,
    verify: bool = False,
    progress: bool = True,
) -> Checkpoint:
    """Write a checkpoint in another layout or precision.

    A few dozen megabytes of it are in memory at a time. If the conversion is cut off, nothing that
    loads is left, and the same call goes on where it stopped.

    **Arguments:**

    - `source`: a checkpoint in any layout that `grokkit.load` takes.
    - `target`: the directory to write; must not exist yet, or be empty. With `verify` it may be
        the finished conversion, which is then only compared.
    - `to`: `"official"`, the layout of the original release, or `"safetensors"`, grokkit's own; by
        default safetensors, and official of 8-bit safetensors of grokkit's own.
    - `dtype`: what matrices become: `"bfloat16"` or `"float32"` of 8-bit ones, whose scales are
        multiplied in, or `"int8"` of floats; by default they stay as they are. Embedding, norms and
        routers always do.
    - `experts`: `"int4"` rounds the experts' matrices to 4 bits.
    - `group_size`: rows of a matrix that share a scale in each column, in 4 bits.
    - `shard_bytes`: most bytes of a safetensors file; a parameter is never divided.
    - `verify`: read everything again at the end and compare every tensor.
    - `progress`: show progress bars, in bytes.

    **Returns:** the new checkpoint, opened.

    **Raises:** `CheckpointError` or `ConfigError`: for a bad source, a target that is taken, or an
    impossible request, or too little free space, before anything is written; if the disk gets
    full; or if the verification finds a difference.
    """
    checkpoint = open_checkpoint(source)
    to = _layout(checkpoint, to, dtype, experts)
    _check_choices(dtype, experts, to)
    storages = choose_storages(checkpoint, to, dtype, experts, group_size)
    files = plan_files(checkpoint, to, storages, shard_bytes)
    target = Path(target).expanduser().absolute()
    if verify and target.is_dir() and any(target.iterdir()):
        check_digests(target, _finished(target), progress)
        _verify(target, files, progress)
        return open_checkpoint(target)
    check_target(
        target,
        "choose another name, or remove what is there; with --verify, a finished conversion is "
        "compared with its source",
    )
    work = _Work(target, checkpoint, to, {p: str(s) for p, s in storages.items()}, shard_bytes)
    work.resume(files, progress)
    work.write(files, progress)
    # Of a complete one nothing says any more what it was made of.
    if verify or work.was_complete:
        _verify(work.folder, files, progress)
    work.finish(files)
    return open_checkpoint(target)


def _layout(checkpoint: Checkpoint, to: str | None, dtype: str | None, experts: str | None) -> str:
    if to is None:
        back = checkpoint.layout == "safetensors" and dtype in (None, "int8") and experts is None
        return "official" if back else "safetensors"
    if to not in LAYOUTS:
        raise ConfigError(f"to: expected one of {', '.join(LAYOUTS)}, found {to!r}")
    return to


def _check_choices(dtype: str | None, experts: str | None, to: str) -> None:
    if dtype not in (None, *DTYPES):
        raise ConfigError(f"dtype: expected one of {', '.join(DTYPES)}, found {dtype!r}")
    if experts not in (None, "int4"):
        raise ConfigError(f"experts: expected int4, found {experts!r}")
    if experts and to == "official":
        raise ConfigError(
            "experts: the official layout has no 4-bit matrices; convert to safetensors"
        )


def _finished(target: Path) -> dict[str, FileRecord]:
    found = read_manifest(target)
    if not found:
        raise refusal(
            target, "a finished conversion to verify", f"a directory without {MANIFEST}",
            "choose another name, or remove what is there",
        )  # fmt: skip
    return found


@dataclasses.dataclass
class _Work:
    """A conversion under way."""

    target: Path
    checkpoint: Checkpoint
    to: str
    storages: dict[str, str]
    shard_bytes: int
    done: dict[str, FileRecord] = dataclasses.field(default_factory=dict)
    was_complete: bool = False
    """Whether an earlier attempt had come to its end but for the directory's name."""

    @property
    def folder(self) -> Path:
        """Where files are until all are complete."""
        return self.target.with_name(f"{self.target.name}.partial")

    def request(self) -> dict[str, Any]:
        """What must be the same for a conversion to go on where another stopped."""
        sources = {
            str(path.relative_to(self.checkpoint.directory)): [n, os.stat(path).st_mtime_ns]
            for path, n in sorted(self.checkpoint.files.items())
        }
        return {
            "source": str(self.checkpoint.directory),
            "files of the source": sources,
            "to": self.to,
            "storage": self.storages,
            "shard_bytes": self.shard_bytes,
        }

    def resume(self, files: list[PlannedFile], progress: bool) -> None:
        """Take over the files that an earlier attempt completed.

        **Raises:** `CheckpointError` if what is there is not the beginning of this conversion.
        """
        path = self.folder / PROGRESS
        for unfinished in self.folder.rglob(".*.tmp"):
            unfinished.unlink()
        if not path.is_file():
            if (self.folder / MANIFEST).is_file():  # cut off when its name alone was missing
                self.done, self.was_complete = read_manifest(self.folder) or {}, True
                if not {file.name for file in files} <= set(self.done):
                    raise refusal(
                        self.folder, "the beginning of the same conversion, to go on with",
                        "all of another", "remove it to start anew, or choose another name",
                    )  # fmt: skip
                check_digests(self.folder, self.done, progress, what="checking what is there of")
                return
            if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
                raise refusal(
                    self.folder, "nothing, or a conversion that was cut off", "something else",
                    "remove it, or choose another name",
                )  # fmt: skip
            return
        values = read_json(path)
        different = [k for k, v in self.request().items() if values.get("request", {}).get(k) != v]
        if different:
            raise refusal(
                self.folder,
                "the beginning of the same conversion, to go on with",
                f"one with another {', another '.join(different)}",
                "remove it to start anew, or repeat the command that began it",
            )
        self.done = records(path, values.get("files"))
        check_digests(self.folder, self.done, progress, what="checking what is there of")

    def write(self, files: list[PlannedFile], progress: bool) -> None:
        """Write the files that are not there yet."""
        left = [file for file in files if file.name not in self.done]
        size = sum(file.size for file in left)
        self._check_space(size)
        self._begin()
        with tqdm(
            total=sum(file.size for file in files),
            initial=sum(file.size for file in files) - size,
            unit="B",
            unit_scale=True,
            desc=f"writing {self.target.name}",
            disable=not progress,
        ) as bar:
            for file in left:
                try:
                    self.done[file.name] = write_file(self.folder / file.name, file, bar)
                    self._note()
                except OSError as e:
                    raise self._cannot_write(file, files, e) from e

    def _begin(self) -> None:
        try:
            self.folder.mkdir(exist_ok=True)
            self._note()
        except OSError as e:
            raise refusal(
                self.folder, "a directory that can be written", e.strerror or str(e),
                "choose another place, or see to its permissions",
            ) from e  # fmt: skip

    def _check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.target.parent).free
        if free < needed + _SPARE:
            raise refusal(
                self.target.parent,
                f"{needed + _SPARE:,} bytes free",
                f"{free:,}",
                f"free {needed + _SPARE - free:,} bytes, or choose another disk",
            )

    def _cannot_write(
        self, file: PlannedFile, files: list[PlannedFile], error: OSError
    ) -> CheckpointError:
        total = sum(f.size for f in files)
        complete = sum(record.size for record in self.done.values())
        again = (
            "run the same command again: it goes on after the last complete file; or remove "
            f"{self.folder.name}"
        )
        if error.errno in _NO_ROOM:
            return refusal(
                self.folder,
                f"room for {total:,} bytes",
                f"a full disk, with {complete:,} of them in complete files",
                f"make room for the other {total - complete:,} and {again}",
            )
        return refusal(
            self.folder / file.name,
            f"to write a file of {file.size:,} bytes",
            error.strerror or str(error),
            f"see that the disk can be written and holds files of this size; then {again}",
        )

    def _note(self) -> None:
        files = {name: dataclasses.asdict(record) for name, record in self.done.items()}
        write_json(self.folder / PROGRESS, {"request": self.request(), "files": files})

    def finish(self, files: list[PlannedFile]) -> None:
        """Write what is beside the tensors, the manifest last, and give the directory its name."""
        small = []
        if self.to == "official":
            self.checkpoint.config.to_json(self.folder / CONFIG_FILE)
            small.append(CONFIG_FILE)
        else:
            write_json(self.folder / INDEX, index_of(files))
            small.append(INDEX)
        tokenizer = self.checkpoint.tokenizer_file
        if tokenizer is not None:
            shutil.copyfile(tokenizer, self.folder / TOKENIZER_FILE)
            small.append(TOKENIZER_FILE)
        for name in small:
            path = self.folder / name
            self.done[name] = FileRecord(path.stat().st_size, sha256(path))
        names = {file.name for file in files} | set(small)
        found = {name: self.done[name] for name in names}
        check_sizes(self.folder, found)
        write_manifest(self.folder, self.to, found)
        (self.folder / PROGRESS).unlink()
        os.replace(self.folder, self.target)


def write_file(path: Path, file: PlannedFile, bar: Any) -> FileRecord:
    """Write one file, to a temporary name first.

    **Arguments:**

    - `path`: where.
    - `file`: what.
    - `bar`: is told the bytes as they are written.

    **Returns:** its size and digest.
    """
    path.parent.mkdir(exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with atomic_file(path) as out:
        for piece in file.pieces:
            written = 0
            for chunk in piece.chunks() if isinstance(piece, Piece) else [piece]:
                data = memoryview(chunk) if isinstance(chunk, bytes) else _bytes(chunk)
                digest.update(data)
                write_chunk(out, data)
                bar.update(len(data))
                written += len(data)
            if isinstance(piece, Piece) and written != piece.nbytes:
                raise AssertionError(f"{piece.name}: {written} bytes of {piece.nbytes}")
            size += written
        out.flush()
        os.fsync(out.fileno())
    return FileRecord(size, digest.hexdigest())


def write_chunk(out: BinaryIO, data: memoryview) -> None:
    """Write some bytes of a file."""
    out.write(data)


def _bytes(array: Any) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _verify(folder: Path, files: list[PlannedFile], progress: bool) -> None:
    """Compare every tensor in the files with what the source says it must be."""
    with tqdm(
        total=sum(file.size for file in files),
        unit="B",
        unit_scale=True,
        desc=f"verifying {folder.name.removesuffix('.partial')}",
        disable=not progress,
    ) as bar:
        for file in files:
            path = folder / file.name
            if not path.is_file() or path.stat().st_size != file.size:
                raise refusal(
                    path, f"a file of {file.size:,} bytes, as this conversion writes it",
                    f"{path.stat().st_size:,} bytes" if path.is_file() else "none",
                    "verify with the options that the conversion was made with, or convert again",
                )  # fmt: skip
            _verify_file(path, file, bar)


def _verify_file(path: Path, file: PlannedFile, bar: Any) -> None:
    with open(path, "rb") as found:
        for piece in file.pieces:
            name = piece.name if isinstance(piece, Piece) else "the header"
            for chunk in piece.chunks() if isinstance(piece, Piece) else [piece]:
                data = memoryview(chunk) if isinstance(chunk, bytes) else _bytes(chunk)
                if found.read(len(data)) != data:
                    raise refusal(
                        path,
                        f"{name} as in the source",
                        "other values",
                        "convert again; if this happens twice, suspect the disk or the memory",
                    )
                bar.update(len(data))
