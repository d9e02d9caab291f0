"""From a checkpoint to a model ready to use: `load`, and the mesh it takes by default."""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from grokkit import compilation_cache
from grokkit.checkpoint import (
    Checkpoint,
    check_content,
    fingerprint,
    load_params,
    open_checkpoint,
    stored_specs,
)
from grokkit.checkpoint.manifest import read_manifest, sha256
from grokkit.config import GrokConfig
from grokkit.errors import CheckpointError, ConfigError
from grokkit.language_model import LanguageModel
from grokkit.model import check_mesh, param_specs
from grokkit.processes import agree, is_first, spans_processes
from grokkit.sharding import make_mesh
from grokkit.streamed_model import StreamedGrok
from grokkit.tokenizer import Tokenizer
from grokkit.zoo import shipped


def default_mesh(config: GrokConfig, specs: Any = None) -> Mesh:
    """All devices on the model axis, or as many of them as divide the model's shapes.

    **Arguments:**

    - `config`: the model's sizes.
    - `specs`: the parameters' declarations, if they are not those of `param_specs`.

    **Raises:** `ConfigError` if there are several processes and they cannot all take part.
    """
    of_process: dict[int, list[Any]] = {}
    for device in jax.devices():
        of_process.setdefault(device.process_index, []).append(device)
    for n in range(min(map(len, of_process.values())), 0, -1):
        # As many of each process: one without a device would have nothing to do.
        devices = [d for i in sorted(of_process) for d in of_process[i][:n]]
        mesh = make_mesh(1, len(devices), devices)
        try:
            check_mesh(config, mesh, specs)
        except ConfigError:
            continue
        return mesh
    raise ConfigError(
        f"{len(of_process)} processes cannot share this model evenly: its {config.n_kv_heads} "
        f"key/value heads and its other sizes must divide over them; start another number"
    )


def default_dtype(platform: str) -> str:
    """What matrix products round to, unless `load` is told: float32 on a CPU, bfloat16 elsewhere."""
    return "float32" if platform == "cpu" else "bfloat16"


def load(
    source: str | os.PathLike[str] = "nano",
    mesh: Mesh | None = None,
    dtype: Any = None,
    progress: bool = True,
    check: bool = False,
    stream: bool = False,
) -> LanguageModel:
    """Load a model from a checkpoint.

    **Arguments:**

    - `source`: a directory that holds `ckpt-0/`, and optionally `config.json` and
        `tokenizer.model`, or the safetensors files of `grokkit convert` or of a Hugging Face port;
        or the name of a shipped model, `"nano"`. A directory called `nano` is loaded as
        `"./nano"`.
    - `mesh`: over which devices; by default all on the model axis, as many as divide the model's
        shapes.
    - `dtype`: what matrix products round to, `"float32"` or `"bfloat16"`; by default float32 on
        a CPU and bfloat16 elsewhere.
    - `progress`: show a progress bar, in bytes.
    - `check`: read all float values first and refuse NaN or infinite ones; of a conversion, all
        files, and refuse altered ones. Each of several processes does so with the files that it
        sees, and all their bytes are compared.
    - `stream`: leave the layers on disk. Each pass reads them one after the other, the next while
        one is used, and holds two at most; all else, results included, is as with the model in
        memory. For one that does not fit: a pass takes at least as long as reading the files.

    **Returns:** a `LanguageModel`.

    **Raises:** `CheckpointError`, `ConfigError` or `TokenizerError` before anything is allocated; in
    several processes `ProcessError`, if another one fails or has another checkpoint.
    """
    together = jax.process_count() > 1 if mesh is None else spans_processes(mesh)
    checkpoint, mesh, dtype, tokenizer = agree(
        lambda: _prepare(source, mesh, dtype, check, progress and is_first(), together), together
    )
    config = checkpoint.config
    compilation_cache.enable()
    specs = stored_specs(checkpoint, param_specs(config, dtype))
    progress = progress and is_first()
    if stream:
        model = StreamedGrok(checkpoint, specs, mesh, progress)
    else:
        model = load_params(checkpoint, specs, mesh, progress=progress)
    lm = LanguageModel(model, mesh, tokenizer, str(source))
    lm.checkpoint = checkpoint
    return lm


def _prepare(
    source: str | os.PathLike[str],
    mesh: Mesh | None,
    dtype: Any,
    check: bool,
    progress: bool,
    together: bool,
) -> tuple[tuple[Checkpoint, Mesh, str, Tokenizer | None], dict[str, str]]:
    """What `load` checks, and what must be the same in all processes."""
    directory = shipped(source) if isinstance(source, str) else None
    checkpoint = open_checkpoint(Path(source) if directory is None else directory)
    config = checkpoint.config
    specs = stored_specs(checkpoint, param_specs(config))
    mesh = default_mesh(config, specs) if mesh is None else mesh
    check_mesh(config, mesh, specs)
    dtype = default_dtype(mesh.devices.flat[0].platform) if dtype is None else dtype
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        raise CheckpointError(f"dtype must be float32 or bfloat16, found {dtype!r}")
    file = checkpoint.tokenizer_file
    tokenizer = None if file is None else Tokenizer.from_file(file, config.vocab_size)
    if check:
        check_content(checkpoint, progress)
    facts = {}
    if together:
        # A conversion's digests of all files are in its fingerprint, and have just been checked.
        whole = check and not read_manifest(checkpoint.directory)
        facts = load_facts(checkpoint, mesh, dtype, file, whole, progress)
    return (checkpoint, mesh, dtype, tokenizer), facts


def load_facts(
    checkpoint: Checkpoint,
    mesh: Mesh,
    dtype: Any,
    tokenizer: Path | None,
    whole: bool = False,
    progress: bool = False,
) -> dict[str, str]:
    """What must be the same in all processes that share a model, for `processes.agree`.

    **Arguments:**

    - `checkpoint`, `mesh`, `dtype`: what is loaded, where to and as what.
    - `tokenizer`: its file, if there is one.
    - `whole`, `progress`: whether to compare all of the checkpoint's files, as for `fingerprint`.
    """
    import grokkit  # its version is made after this module

    return {
        "versions": f"grokkit {grokkit.__version__}, jax {jax.__version__}",
        "configuration": repr(checkpoint.config),
        "checkpoint": f"one with the digest {fingerprint(checkpoint, whole, progress)[:16]}",
        "tokenizer": "none"
        if tokenizer is None
        else f"one with the digest {sha256(tokenizer)[:16]}",
        "mesh": " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items()),
        "dtype": jnp.dtype(dtype).name,
    }
