"""The list of a conversion's files, with the size and SHA-256 of each.

It is written when every file is complete: a finished conversion has one.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from grokkit.checkpoint.refusal import refusal
from grokkit.runtime.files import write
from grokkit.runtime.progress import byte_bar

MANIFEST = "manifest.json"
PROGRESS = "conversion.json"
"""What a conversion has completed so far; without a manifest beside it, not all."""
FORMAT = "grokkit"
VERSION = 1

_CHUNK = 1 << 24
_WHY = f"as {MANIFEST} says"
_AGAIN = "convert or download the checkpoint again"


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """What a file must be."""

    size: int
    """Bytes."""
    sha256: str
    """Of its content, in hexadecimal."""


def write_manifest(directory: Path, layout: str, files: dict[str, FileRecord]) -> None:
    """Write the manifest of a directory in one of the layouts, with its files by name."""
    of_files = {name: dataclasses.asdict(files[name]) for name in sorted(files)}
    values = {"format": FORMAT, "version": VERSION, "layout": layout, "files": of_files}
    write_json(directory / MANIFEST, values)


def read_manifest(directory: Path, is_needed: bool = False) -> dict[str, FileRecord]:
    """The records of a directory's files; none if it has no manifest, and none is needed.

    **Raises:** `CheckpointError` for a manifest that is not one of grokkit's.
    """
    path = directory / MANIFEST
    if not path.exists():
        if is_needed:
            raise refusal(
                directory,
                f"a finished conversion: one with a {MANIFEST}",
                f"no {MANIFEST}",
                "convert again, to the same name if it was cut off: it goes on where it stopped",
            )
        return {}
    values = read_json(path)
    if values.get("format") != FORMAT or values.get("version") != VERSION:
        raise refusal(
            path,
            f"a manifest of grokkit's, version {VERSION}",
            f"format {values.get('format')!r:.50}, version {values.get('version')!r:.50}",
            "use the grokkit that wrote it, or move the file away if it is another program's",
        )
    return records(path, values.get("files"))


def records(path: Path, values: Any) -> dict[str, FileRecord]:
    """Files' records as JSON holds them. **Raises:** `CheckpointError` for anything else."""
    found = {}
    for name, note in values.items() if isinstance(values, dict) else [("files", values)]:
        size, digest = (note.get("size"), note.get("sha256")) if isinstance(note, dict) else (0, 0)
        if not (isinstance(size, int) and isinstance(digest, str) and len(digest) == 64):
            raise refusal(path, "a size and a sha256 for each file", f"{note!r:.100}", _AGAIN)
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise refusal(path, "files below its own directory", f"{name!r:.100}", _AGAIN)
        found[name] = FileRecord(size, digest)
    return found


def check_sizes(
    directory: Path,
    sizes: dict[str, int],
    why: str = _WHY,
    remedy: str = _AGAIN,
) -> None:
    """**Raises:** `CheckpointError` for a file that is missing or of another size."""
    for name, expected in sizes.items():
        path = directory / name
        size = path.stat().st_size if path.is_file() else None
        if size != expected:
            found = "none" if size is None else f"{size:,} bytes"
            raise refusal(path, f"a file of {expected:,} bytes, {why}", found, remedy)


def check_finished(directory: Path) -> None:
    """**Raises:** `CheckpointError` for what a conversion that was cut off left."""
    if (directory / PROGRESS).exists() and not (directory / MANIFEST).exists():
        raise refusal(
            directory,
            "a finished conversion",
            f"one that was cut off: {PROGRESS} is there, and no {MANIFEST}",
            "run the same `grokkit convert` again: it goes on where it stopped",
        )


def check_digests(
    directory: Path, files: dict[str, FileRecord], progress: bool = True, what: str = "checking"
) -> None:
    """Read a directory's files, with a progress bar that begins with `what`, and compare digests.

    **Raises:** `CheckpointError` for a file that is missing, of another size, or altered.
    """
    check_sizes(directory, {name: record.size for name, record in files.items()})
    expected = {directory / name: record.sha256 for name, record in files.items()}

    def compare(path: Path, found: str) -> None:
        if found != expected[path]:
            raise refusal(
                path,
                f"the content that was written: sha256 {expected[path][:16]}...",
                f"altered content: sha256 {found[:16]}...",
                _AGAIN,
            )

    read_digests(expected, f"{what} {directory.name}", progress, compare)


def read_digests(
    paths: Collection[Path], what: str, progress: bool, use: Callable[[Path, str], None]
) -> None:
    """Read files one after the other, with a progress bar that begins with `what`, and call `use`
    with each one and its SHA-256."""
    with byte_bar(what, sum(path.stat().st_size for path in paths), progress) as bar:
        for path in paths:
            use(path, sha256(path, bar.update))


def sha256(path: Path, count: Callable[[int], Any] | None = None) -> str:
    """SHA-256 of a file, in hexadecimal; `count` is told the bytes as they are read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            if count is not None:
                count(len(chunk))
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. **Raises:** `CheckpointError` for anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise refusal(path, "a readable JSON file", str(e), _AGAIN) from None
    if not isinstance(values, dict):
        raise refusal(path, "a JSON object", f"a {type(values).__name__}", _AGAIN)
    return values


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file, which is on the disk before it has its name."""
    write(path, json.dumps(values, indent=1) + "\n", durable=True)
