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

from grokkit.checkpoint.dialect import INDEX
from grokkit.checkpoint.manifest import (
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
    PlannedFile,
    choose_storages,
    index_of,
    plan_files,
)
from grokkit.checkpoint.refusal import check_space, check_target, refusal
from grokkit.errors import ConfigError
from grokkit.runtime.files import TEMPORARY, replacing
from grokkit.runtime.progress import byte_bar

LAYOUTS = ("official", "safetensors")
DTYPES = ("int8", "bfloat16", "float32")

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
    if to is None:
        is_8_bit = dtype in (None, "int8") and experts is None
        to = "official" if checkpoint.layout == "safetensors" and is_8_bit else "safetensors"
    _check_choices(to, dtype, experts)
    storages = choose_storages(checkpoint, to, dtype, experts, group_size)
    files = plan_files(checkpoint, to, storages, shard_bytes)
    target = Path(target).expanduser().absolute()
    if verify and target.is_dir() and any(target.iterdir()):
        check_digests(target, read_manifest(target, is_needed=True), progress)
        _verify(target, files, progress)
        return open_checkpoint(target)
    check_target(
        target,
        "choose another name, or remove what is there; with --verify, a finished conversion is "
        "compared with its source",
    )
    sources = {
        str(path.relative_to(checkpoint.directory)): [n, path.stat().st_mtime_ns]
        for path, n in sorted(checkpoint.files.items())
    }
    request = {
        "source": str(checkpoint.directory),
        "files of the source": sources,
        "to": to,
        "storage": {path: str(storage) for path, storage in storages.items()},
        "shard_bytes": shard_bytes,
    }
    work = _Work(target, request, files)
    work.resume(progress)
    work.write(progress)
    if verify:
        _verify(work.folder, files, progress)
    work.finish(checkpoint, to)
    return open_checkpoint(target)


def _check_choices(to: str, dtype: str | None, experts: str | None) -> None:
    for name, value, known in [
        ("to", to, LAYOUTS),
        ("dtype", dtype, (None, *DTYPES)),
        ("experts", experts, (None, "int4")),
    ]:
        if value not in known:
            choices = ", ".join(filter(None, known))
            raise ConfigError(f"{name}: expected one of {choices}, found {value!r}")
    if experts and to == "official":
        raise ConfigError(
            "experts: the official layout has no 4-bit matrices; convert to safetensors"
        )


@dataclasses.dataclass
class _Work:
    """A conversion under way."""

    target: Path
    request: dict[str, Any]
    """What must be the same for a conversion to go on where another stopped."""
    files: list[PlannedFile]
    done: dict[str, FileRecord] = dataclasses.field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where files are until all are complete."""
        return self.target.with_name(f"{self.target.name}.partial")

    def resume(self, progress: bool) -> None:
        """Take over the files that an earlier attempt completed.

        **Raises:** `CheckpointError` if what is there is not the beginning of this conversion.
        """
        path = self.folder / PROGRESS
        for unfinished in self.folder.rglob(TEMPORARY):
            unfinished.unlink()
        if not path.is_file():
            if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
                raise refusal(
                    self.folder,
                    "nothing, or a conversion that was cut off",
                    "something else",
                    "remove it, or choose another name",
                )
            return
        values = read_json(path)
        before = values.get("request")
        before = before if isinstance(before, dict) else {}
        different = [name for name, value in self.request.items() if before.get(name) != value]
        if different:
            raise refusal(
                self.folder,
                "the beginning of the same conversion, to go on with",
                f"one with another {', another '.join(different)}",
                "remove it to start anew, or repeat the command that began it",
            )
        self.done = records(path, values.get("files"))
        check_digests(self.folder, self.done, progress, what="checking what is there of")

    def write(self, progress: bool) -> None:
        """Write the files that are not there yet."""
        total = sum(file.size for file in self.files)
        left = [file for file in self.files if file.name not in self.done]
        needed = sum(file.size for file in left)
        check_space(self.target.parent, needed + _SPARE)
        path = self.folder
        try:
            self.folder.mkdir(exist_ok=True)
            self._note()
            with byte_bar(f"writing {self.target.name}", total, progress, total - needed) as bar:
                for file in left:
                    path = self.folder / file.name
                    self.done[file.name] = write_file(path, file, bar)
                    self._note()
        except OSError as e:
            complete = sum(record.size for record in self.done.values())
            expected, found = "a place that can be written to", e.strerror or str(e)
            remedy = "see that it can be, and holds files of this size"
            if e.errno in (errno.ENOSPC, errno.EDQUOT):
                path, expected = self.folder, f"room for {total:,} bytes"
                found = f"a full disk, with {complete:,} of them in complete files"
                remedy = f"make room for the other {total - complete:,}"
            again = "run the same command again: it goes on after the last complete file"
            raise refusal(
                path, expected, found, f"{remedy} and {again}; or remove {self.folder.name}"
            ) from e

    def _note(self) -> None:
        files = {name: dataclasses.asdict(record) for name, record in self.done.items()}
        write_json(self.folder / PROGRESS, {"request": self.request, "files": files})

    def finish(self, checkpoint: Checkpoint, to: str) -> None:
        """Write what is beside the tensors, the manifest last, and give the directory its name."""
        small = [CONFIG_FILE if to == "official" else INDEX]
        if to == "official":
            checkpoint.config.to_json(self.folder / CONFIG_FILE)
        else:
            write_json(self.folder / INDEX, index_of(self.files))
        if checkpoint.tokenizer_file is not None:
            shutil.copyfile(checkpoint.tokenizer_file, self.folder / TOKENIZER_FILE)
            small.append(TOKENIZER_FILE)
        found = {file.name: self.done[file.name] for file in self.files}
        for name in small:
            path = self.folder / name
            found[name] = FileRecord(path.stat().st_size, sha256(path))
        write_manifest(self.folder, to, found)
        os.replace(self.folder, self.target)
        (self.target / PROGRESS).unlink()


def write_file(path: Path, file: PlannedFile, bar: Any) -> FileRecord:
    """Write one file, to a temporary name first; `bar` is told the bytes as they are written."""
    path.parent.mkdir(exist_ok=True)
    digest = hashlib.sha256()
    with replacing(path, durable=True) as temporary:
        with open(temporary, "wb") as out:
            for _, data in file.content():
                digest.update(data)
                write_chunk(out, data)
                bar.update(len(data))
        size = temporary.stat().st_size
        assert size == file.size, f"{file.name}: {size} bytes of {file.size}"
    return FileRecord(size, digest.hexdigest())


def write_chunk(out: BinaryIO, data: memoryview) -> None:
    """Write some bytes of a file."""
    out.write(data)


def _verify(folder: Path, files: list[PlannedFile], progress: bool) -> None:
    """Compare every tensor in the files with what the source says it must be."""
    name = folder.name.removesuffix(".partial")
    check_sizes(
        folder,
        {file.name: file.size for file in files},
        "as this conversion writes it",
        "verify with the options that the conversion was made with, or convert again",
    )
    with byte_bar(f"verifying {name}", sum(file.size for file in files), progress) as bar:
        for file in files:
            path = folder / file.name
            with open(path, "rb") as found:
                for array, data in file.content():
                    if found.read(len(data)) != data:
                        raise refusal(
                            path,
                            f"{array} as in the source",
                            "other values",
                            "convert again; if this happens twice, suspect the disk or the memory",
                        )
                    bar.update(len(data))
