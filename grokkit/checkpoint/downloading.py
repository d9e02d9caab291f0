"""Fetching a checkpoint from the Hugging Face Hub, through `huggingface_hub`."""

import contextlib
import dataclasses
import fnmatch
import importlib
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from grokkit.checkpoint.manifest import read_json, sha256, write_json
from grokkit.checkpoint.official import Checkpoint
from grokkit.checkpoint.opening import open_checkpoint
from grokkit.checkpoint.refusal import refusal
from grokkit.errors import CheckpointError

REPOSITORY = "xai-org/grok-1"
PATTERNS = (
    "ckpt-0/*",
    "tokenizer.model",
    "config.json",
    "manifest.json",
    "*.safetensors",
    "*.safetensors.index.json",
)
"""Which of a repository's files make up a checkpoint."""

CHECKED = ".cache/grokkit-checked.json"
_SPARE = 1 << 24  # bytes for what the downloader keeps beside the files
_POLL = 0.5  # seconds between two looks at how much is there
_ORPHAN = re.compile(r".*\.[0-9a-f]{8}\.incomplete")
"""What releases 1.31 and later of the library call a file under way. No later process goes on with
it (github.com/huggingface/huggingface_hub/issues/4196), and one that is killed leaves it behind."""
_ABANDONED = 60  # seconds without a byte, after which nobody is writing any more
_AGAIN = "run the same command again: files that are complete are not fetched again"


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """One file of a repository."""

    name: str
    size: int
    sha256: str | None
    """`None` for small files that the Hub keeps without one."""


def download(
    target: str | os.PathLike[str],
    repository: str = REPOSITORY,
    revision: str | None = None,
    progress: bool = True,
) -> Checkpoint:
    """Fetch a checkpoint, the official one by default. Needs the extra `hub`.

    When the same call is made again after an interruption, complete files are not fetched again; the
    one that was under way begins anew, unless the library can go on with it. Nothing is unpickled or
    executed.

    **Arguments:**

    - `target`: the directory to fill: `ckpt-0/` comes below it.
    - `repository`: on the Hub, with the official layout, grokkit's own, or a port's. The environment
        variable `HF_ENDPOINT` names another server.
    - `revision`: a branch, tag or commit; by default the main branch. All files come from the
        commit that it names at the start.
    - `progress`: show a progress bar, in bytes.

    **Returns:** the checkpoint, opened: every header was checked, and every digest compared.

    **Raises:** `CheckpointError` without network or `huggingface_hub`, for a repository that is not
    there or holds no checkpoint, for too little free space, before anything is fetched; and for a
    file whose digest is wrong.
    """
    hub = _hub()
    target = Path(target).expanduser().absolute()
    if target.exists() and not target.is_dir():
        raise refusal(target, "a directory to fill", "a file", "choose another name")
    commit, files = _list(hub, repository, revision)
    parent = next(p for p in (target, *target.parents) if p.is_dir())
    missing = sum(max(f.size - _there(target, f), 0) for f in files)
    free = shutil.disk_usage(parent).free
    if free < missing + _SPARE:
        raise refusal(
            target, f"{missing + _SPARE:,} bytes free", f"{free:,}",
            f"free {missing + _SPARE - free:,} bytes, or choose another disk",
        )  # fmt: skip
    target.mkdir(parents=True, exist_ok=True)
    with _watching(hub, target, files, progress, ignored=sweep(target)):
        for file in files:
            _fetch(hub, repository, commit, target, file)
    _check(target, files, progress)
    return open_checkpoint(target)


def _hub() -> Any:
    try:
        for part in ("constants", "errors", "utils"):
            importlib.import_module(f"huggingface_hub.{part}")
        return importlib.import_module("huggingface_hub")
    except ImportError as e:
        raise CheckpointError(
            "grokkit download needs huggingface_hub: pip install 'grokkit[hub]'"
        ) from e


def _list(hub: Any, repository: str, revision: str | None) -> tuple[str, list[RemoteFile]]:
    """The commit, and the files of a checkpoint in it."""
    endpoint = hub.constants.ENDPOINT
    try:
        info = hub.HfApi().model_info(repository, revision=revision, files_metadata=True)
    except (hub.errors.RepositoryNotFoundError, hub.errors.RevisionNotFoundError) as e:
        raise refusal(
            repository, f"a model repository on {endpoint}", f"none ({_first_line(e)})",
            "check its name and the revision; a private one needs `hf auth login`",
        ) from e  # fmt: skip
    except Exception as e:
        raise _no_network(repository, endpoint, e) from e
    files = []
    for file in info.siblings or []:
        if any(fnmatch.fnmatch(file.rfilename, pattern) for pattern in PATTERNS):
            digest = None if file.lfs is None else file.lfs.sha256
            files.append(RemoteFile(file.rfilename, int(file.size or 0), digest))
    if not any(f.name.startswith("ckpt-0/") or f.name.endswith(".safetensors") for f in files):
        raise refusal(
            repository, "ckpt-0/ or safetensors files", f"{len(info.siblings or [])} other files",
            "name a repository that holds a Grok-1",
        )  # fmt: skip
    return info.sha, sorted(files, key=lambda f: f.name)


def _fetch(hub: Any, repository: str, commit: str, target: Path, file: RemoteFile) -> None:
    try:
        hub.hf_hub_download(repository, file.name, revision=commit, local_dir=target)
    except OSError as e:
        if e.errno is None or isinstance(e, ConnectionError | TimeoutError):
            raise _no_network(file.name, hub.constants.ENDPOINT, e) from e
        raise refusal(
            target / file.name, f"room for {file.size:,} bytes", e.strerror or str(e),
            f"make room and {_AGAIN}",
        ) from e  # fmt: skip
    except Exception as e:
        raise _no_network(file.name, hub.constants.ENDPOINT, e) from e


def _no_network(what: str, endpoint: str, error: Exception) -> CheckpointError:
    return refusal(
        what,
        f"an answer from {endpoint}",
        f"{type(error).__name__}: {_first_line(error)}",
        "check the connection (HF_ENDPOINT names another server, HF_HUB_OFFLINE forbids any) and "
        f"{_AGAIN}",
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0][:300]


def _there(target: Path, file: RemoteFile) -> int:
    """Bytes of a file that are on the disk already; parts of unfinished ones not counted."""
    path = target / file.name
    return path.stat().st_size if path.is_file() else 0


def _unfinished(target: Path) -> set[Path]:
    return set((target / ".cache" / "huggingface").rglob("*.incomplete"))


def sweep(target: Path) -> set[Path]:
    """Remove what killed downloads left in a directory.

    **Returns:** what may be left by one, but was written to just now.
    """
    fresh = set()
    for path in _unfinished(target):
        if not _ORPHAN.fullmatch(path.name):
            continue
        with contextlib.suppress(OSError):  # another process may have finished it
            if time.time() - path.stat().st_mtime > _ABANDONED:
                path.unlink()
            else:
                fresh.add(path)
    return fresh


@contextlib.contextmanager
def _watching(
    hub: Any, target: Path, files: list[RemoteFile], progress: bool, ignored: set[Path]
) -> Iterator[None]:
    """A bar of the bytes on the disk, whichever way the library fetches them."""

    def there() -> int:
        found = sum(_there(target, file) for file in files)
        for part in _unfinished(target) - ignored:
            with contextlib.suppress(OSError):  # it was finished, and renamed, meanwhile
                found += part.stat().st_size
        return found

    done = threading.Event()
    total = sum(file.size for file in files)
    hub.utils.disable_progress_bars()
    with tqdm(
        total=total, unit="B", unit_scale=True, desc=f"downloading to {target.name}",
        initial=min(there(), total), disable=not progress,
    ) as bar:  # fmt: skip

        def watch() -> None:
            while not done.wait(_POLL):
                bar.update(max(min(there(), total) - bar.n, 0))

        watcher = threading.Thread(target=watch, name="download-progress", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()
            bar.update(max(min(there(), total) - bar.n, 0))
            hub.utils.enable_progress_bars()


def _check(target: Path, files: list[RemoteFile], progress: bool) -> None:
    """Compare every file's digest with the Hub's; what was compared before is not read again."""
    notes = target / CHECKED
    known = read_json(notes) if notes.is_file() else {}

    def state(file: RemoteFile) -> list[Any]:
        status = (target / file.name).stat()
        return [status.st_size, status.st_mtime_ns, file.sha256]

    left = [f for f in files if f.sha256 is not None and known.get(f.name) != state(f)]
    with tqdm(
        total=sum(f.size for f in left), unit="B", unit_scale=True,
        desc=f"checking {target.name}", disable=not progress,
    ) as bar:  # fmt: skip
        for file in left:
            found = sha256(target / file.name, bar)
            if found != file.sha256:
                (target / file.name).unlink()
                raise refusal(
                    target / file.name,
                    f"sha256 {file.sha256}",
                    f"sha256 {found}; the file was removed",
                    "run the same command again: it fetches this file anew",
                )
            known[file.name] = state(file)
            notes.parent.mkdir(exist_ok=True)
            write_json(notes, known)
