"""Fetching a checkpoint from the Hugging Face Hub, through `huggingface_hub`."""

import contextlib
import fnmatch
import os
import time
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from grokkit.checkpoint.manifest import FileRecord, read_digests
from grokkit.checkpoint.official import Checkpoint
from grokkit.checkpoint.opening import open_checkpoint
from grokkit.checkpoint.refusal import check_space, refusal
from grokkit.errors import CheckpointError
from grokkit.runtime.files import write
from grokkit.runtime.progress import byte_bar

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

CHECKED = ".cache/grokkit-checked"
"""As old as the last comparison of digests."""
_SPARE = 1 << 24  # bytes for what the library keeps beside the files
_ABANDONED = 60  # seconds without a byte, after which nobody is writing any more
_AGAIN = "run the same command again: files that are complete are not fetched again"


def download(
    target: str | os.PathLike[str],
    repository: str = REPOSITORY,
    revision: str | None = None,
    progress: bool = True,
) -> Checkpoint:
    """Fetch a checkpoint, the official one by default. Needs the extra `hub`.

    When the same call is made again after an interruption, complete files are not fetched again; the
    one that was under way begins anew. Nothing is unpickled or executed.

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
    sweep(target)
    total = sum(record.size for record in files.values())
    present = sum(min(_size(target / name), record.size) for name, record in files.items())
    parent = next(p for p in (target, *target.parents) if p.is_dir())
    check_space(parent, total - present + _SPARE)
    target.mkdir(parents=True, exist_ok=True)
    with byte_bar(f"downloading to {target.name}", total, progress, initial=present) as bar:
        for name, record in files.items():
            try:
                _fetch(hub, repository, commit, target, name, bar)
            except Exception as e:
                raise _cannot_fetch(hub, target / name, record.size, e) from e
    _check(target, files, progress)
    return open_checkpoint(target)


def _hub() -> Any:
    try:
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as e:
        raise CheckpointError(
            "grokkit download needs huggingface_hub: pip install huggingface_hub, or pip install "
            "'grokkit[hub]'"
        ) from e
    return huggingface_hub


def _list(hub: Any, repository: str, revision: str | None) -> tuple[str, dict[str, FileRecord]]:
    """The commit, and the files of a checkpoint in it. Small ones may have no digest."""
    endpoint = hub.constants.ENDPOINT
    try:
        info = hub.HfApi().model_info(repository, revision=revision, files_metadata=True)
    except (hub.errors.RepositoryNotFoundError, hub.errors.RevisionNotFoundError) as e:
        raise refusal(
            repository,
            f"a model repository on {endpoint}",
            f"none ({_first_line(e)})",
            "check its name and the revision; a private one needs `hf auth login`",
        ) from e
    except Exception as e:
        raise _no_network(repository, endpoint, e) from e
    files = {
        file.rfilename: FileRecord(int(file.size or 0), file.lfs.sha256 if file.lfs else "")
        for file in sorted(info.siblings or [], key=lambda file: file.rfilename)
        if any(fnmatch.fnmatch(file.rfilename, pattern) for pattern in PATTERNS)
    }
    if not any(name.startswith("ckpt-0/") or name.endswith(".safetensors") for name in files):
        raise refusal(
            repository,
            "ckpt-0/ or safetensors files",
            f"{len(info.siblings or [])} other files",
            "name a repository that holds a Grok-1",
        )
    return info.sha, files


def _fetch(hub: Any, repository: str, commit: str, target: Path, name: str, bar: Any) -> None:
    """Have the library fetch one file, unless it is there; its bytes move the bar of all on."""

    class Part(tqdm):
        def __init__(self, *_: Any, initial: int = 0, **__: Any) -> None:
            super().__init__(disable=True)
            bar.update(initial)

        def update(self, n: float | None = 1) -> None:
            bar.update(n)

    hub.hf_hub_download(repository, name, revision=commit, local_dir=target, tqdm_class=Part)


def _cannot_fetch(hub: Any, path: Path, size: int, error: Exception) -> CheckpointError:
    of_network = isinstance(error, ConnectionError | TimeoutError)
    if isinstance(error, OSError) and error.errno is not None and not of_network:
        found = error.strerror or str(error)
        return refusal(path, f"room for {size:,} bytes", found, f"make room and {_AGAIN}")
    return _no_network(path.name, hub.constants.ENDPOINT, error)


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


def _size(path: Path) -> int:
    """Bytes of a file; 0 of one that is not there."""
    return path.stat().st_size if path.is_file() else 0


def sweep(target: Path) -> None:
    """Remove what killed downloads left in a directory: no later one goes on with it
    (github.com/huggingface/huggingface_hub/issues/4196)."""
    for path in (target / ".cache" / "huggingface").rglob("*.incomplete"):
        with contextlib.suppress(OSError):  # another process may have finished it
            if time.time() - path.stat().st_mtime > _ABANDONED:
                path.unlink()


def _check(target: Path, files: dict[str, FileRecord], progress: bool) -> None:
    """Compare digests with the Hub's, of all files that came since that was done."""
    done = target / CHECKED
    since = done.stat().st_mtime_ns if done.is_file() else 0
    expected = {
        target / name: record.sha256
        for name, record in files.items()
        if record.sha256 and (target / name).stat().st_mtime_ns > since
    }

    def compare(path: Path, digest: str) -> None:
        if digest != expected[path]:
            path.unlink()
            raise refusal(
                path,
                f"sha256 {expected[path]}",
                f"sha256 {digest}; the file was removed",
                "run the same command again: it fetches this file anew",
            )

    read_digests(expected, f"checking {target.name}", progress, compare)
    done.parent.mkdir(exist_ok=True)
    write(done, "")
