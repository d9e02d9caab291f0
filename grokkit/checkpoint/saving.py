"""Writes a model's parameters as an official checkpoint directory."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from grokkit.checkpoint.matrices import contiguous
from grokkit.checkpoint.names import TensorKey, tensor_keys
from grokkit.checkpoint.official import CONFIG_FILE, FOLDER, TOKENIZER_FILE
from grokkit.checkpoint.pickle_objects import BFLOAT16
from grokkit.checkpoint.refusal import check_target, refusal
from grokkit.checkpoint.tensor_writer import write_tensor
from grokkit.config import GrokConfig
from grokkit.quant import QuantizedArray
from grokkit.runtime.progress import byte_bar


def save_params(
    params: PyTree,
    config: GrokConfig,
    directory: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> None:
    """Write `ckpt-0/`, `config.json` and optionally `tokenizer.model` in the official layout.

    The directory appears when it is complete; an error or Ctrl-C leaves nothing behind. One
    tensor at a time is held on the host.

    **Arguments:**

    - `params`: a `grokkit.model.Grok`, or anything with the same attributes, whose arrays are
        jax or numpy arrays and whose matrices are quantised (`grokkit.quant.quantize`).
    - `config`: the model's sizes.
    - `directory`: where to write; must not exist yet, or be empty.
    - `tokenizer`: a SentencePiece file to copy.
    - `progress`: show a progress bar, in bytes.

    **Raises:** `CheckpointError`, before anything is written, if the directory is not empty or an
    array is missing, not quantised, or of another shape or dtype than `config` says.
    """
    target = Path(directory).absolute()
    check_target(target)
    if tokenizer is not None and not Path(tokenizer).is_file():
        raise refusal(tokenizer, "a SentencePiece file", "no such file", "check the path")
    keys = tensor_keys(config)
    for key in keys:
        _check_leaf(key, _leaf(params, key), config)
    with (
        _whole_directory(target) as folder,
        byte_bar(f"saving {target.name}", sum(key.nbytes for key in keys), progress) as bar,
    ):
        config.to_json(folder / CONFIG_FILE)
        if tokenizer is not None:
            shutil.copyfile(tokenizer, folder / TOKENIZER_FILE)
        (folder / FOLDER).mkdir()
        for key in keys:
            leaf = _leaf(params, key)
            arrays = [_on_host(array, key.layer) for array in _arrays(leaf)]
            if isinstance(leaf, QuantizedArray):
                # Held [n, k], written [k, n].
                arrays[0] = contiguous(np.swapaxes(arrays[0], -1, -2))
            write_tensor(folder / FOLDER / key.file_name, *arrays)
            bar.update(key.nbytes)


def _leaf(params: PyTree, key: TensorKey) -> Any:
    leaf = params
    for name in key.path.split("."):
        if not hasattr(leaf, name):
            raise refusal(
                key.path,
                f"a parameter here, for {key.name}",
                f"{type(leaf).__name__} without attribute {name!r}",
                "pass a grokkit.model.Grok, or a tree with the same attributes",
            )
        leaf = getattr(leaf, name)
    return leaf


def _arrays(leaf: Any) -> tuple[Any, ...]:
    return (leaf.weight, leaf.scales) if isinstance(leaf, QuantizedArray) else (leaf,)


def _check_leaf(key: TensorKey, leaf: Any, config: GrokConfig) -> None:
    lead = () if key.layer is None else (config.n_layers,)
    expected = [(key.shape, key.dtype)]
    if key.scales_shape is not None:
        if not isinstance(leaf, QuantizedArray):
            raise refusal(
                key.path,
                "a QuantizedArray: the official layout holds this matrix in 8 bits",
                type(leaf).__name__,
                f"quantise with grokkit.quant.quantize(w, groups={key.scales_shape[-2]})",
            )
        *experts, k, n = key.shape
        expected = [((*experts, n, k), key.dtype), (key.scales_shape, BFLOAT16)]
    elif isinstance(leaf, QuantizedArray):
        raise refusal(key.path, f"a plain {key}", "a QuantizedArray", "dequantise it first")
    for array, (shape, dtype) in zip(_arrays(leaf), expected, strict=True):
        found_shape, found_dtype = getattr(array, "shape", None), getattr(array, "dtype", None)
        if found_shape != (*lead, *shape) or found_dtype != dtype:
            raise refusal(
                key.path,
                f"{dtype.name} of shape {(*lead, *shape)}",
                f"{found_dtype} of shape {found_shape}",
                "pass the configuration that the parameters were made with",
            )
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            raise refusal(
                key.path,
                "an array on this process's devices",
                "one that lies on several processes",
                "gather it with jax.experimental.multihost_utils.process_allgather",
            )


def _on_host(array: Any, layer: int | None) -> np.ndarray:
    if isinstance(array, np.ndarray):
        return array if layer is None else array[layer]
    # Shard by shard: indexing the whole would compile a program for every layout.
    out = np.empty(array.shape if layer is None else array.shape[1:], array.dtype)
    for shard in array.addressable_shards:
        if shard.replica_id != 0:
            continue
        # On a CPU the host's view of a shard is free; elsewhere it would copy every layer.
        data = np.asarray(shard.data) if shard.device.platform == "cpu" else shard.data
        if layer is None:
            out[shard.index] = data
            continue
        rows = range(array.shape[0])[shard.index[0]]
        if layer in rows:
            out[shard.index[1:]] = data[layer - rows.start]
    return out


@contextlib.contextmanager
def _whole_directory(target: Path) -> Iterator[Path]:
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir()
        yield temporary
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
