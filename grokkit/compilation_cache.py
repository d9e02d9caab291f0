"""Compiled programs kept on disk, so that a model that ran once starts sooner the next time."""

import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import jax

SWITCH = "GROKKIT_COMPILATION_CACHE"
_OFF = {"0", "off", "false", "no"}
_ON = {"", "1", "on", "true", "yes"}
_JAX_MIN_COMPILE_SECONDS = 1.0  # JAX's default
_MAX_BYTES = 1 << 30


def enable() -> Path | None:
    """Let JAX keep compiled programs in the user's cache folder. `grokkit.load` calls this.

    The folder is `$XDG_CACHE_HOME/grokkit`, or `~/.cache/grokkit`. The environment variable
    `GROKKIT_COMPILATION_CACHE` names another one, or switches the cache off with `0` or `off`.
    Programs are found again by their code, their layout over the devices and JAX's version; each
    kind of CPU has its own folder, since programs use all the instructions it has.

    **Returns:** the folder; `None` if the cache is off, JAX was given a folder of its own
    (`JAX_COMPILATION_CACHE_DIR`), several processes run together, or the folder cannot be written.
    """
    if jax.process_count() > 1 or _setting("jax_compilation_cache_dir") not in (None, str(_ours())):
        return None
    found = folder()
    if found is None:
        return None
    jax.config.update("jax_compilation_cache_dir", str(found))
    if _setting("jax_persistent_cache_min_compile_time_secs") == _JAX_MIN_COMPILE_SECONDS:
        # Even the smallest programs load faster than they compile.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return found


def folder() -> Path | None:
    """The folder for what is compiled for this kind of CPU, made if it is not there; `None` if the
    cache is off or the folder cannot be written."""
    found = _ours()
    if found is None:
        return None
    try:
        # Whoever can write there can run code as this user.
        found.mkdir(mode=0o700, parents=True, exist_ok=True)
        _tidy(found)
    except OSError:
        return None
    return found if os.access(found, os.W_OK) else None


def is_on() -> bool:
    """Whether the next process finds what this one compiles, in whatever folder."""
    return bool(_setting("jax_enable_compilation_cache") and _setting("jax_compilation_cache_dir"))


def _setting(name: str) -> Any:
    """One of JAX's settings, from a call, the environment or its default."""
    return getattr(jax.config, name)


def _ours() -> Path | None:
    """The folder for this kind of CPU; `None` if the cache is off."""
    named = os.environ.get(SWITCH, "")
    if named.lower() in _OFF:
        return None
    try:
        if named.lower() not in _ON:
            root = Path(named).expanduser().absolute()
        else:
            # The specification of these folders says to ignore a relative path.
            base = Path(os.environ.get("XDG_CACHE_HOME", ""))
            root = (base if base.is_absolute() else Path.home() / ".cache") / "grokkit"
    except RuntimeError:  # no home
        return None
    return root / f"xla-{_cpu()}"


def _cpu() -> str:
    """A short name for this CPU's set of instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        known = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        known = platform.processor()
    return hashlib.sha256(f"{platform.machine()} {known}".encode()).hexdigest()[:8]


def _tidy(folder: Path) -> None:
    """Remove the oldest programs beyond the limit, and files that an interruption left empty."""
    total = 0
    kept = [*folder.glob("*-cache"), *folder.glob("kernels-*.o")]
    files = [(path.stat(), path) for path in kept]
    for stat, path in sorted(files, key=lambda item: -item[0].st_mtime):
        total += stat.st_size
        if total > _MAX_BYTES or stat.st_size == 0:
            path.unlink(missing_ok=True)
