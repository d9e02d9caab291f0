"""Grok-1 as ports to Hugging Face transformers store it: safetensors with a matrix for each expert.

The names are those of hpcai-tech/grok-1 and keyfan/grok-1-hf, which inference engines read too:
`model.layers.3.moe_block.experts.5.linear_v.weight` and so on. torch holds matrices as [out, in].
The experts' `linear` goes through the GELU, `linear_v` multiplies it, `linear_1` leads back.
"""

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from grokkit.checkpoint.dialect import FLOATS
from grokkit.checkpoint.manifest import read_json
from grokkit.checkpoint.names import TensorKey, tensor_keys
from grokkit.checkpoint.official import Checkpoint, Entry
from grokkit.checkpoint.refusal import refusal
from grokkit.checkpoint.safetensors_file import Arrays, SafetensorsFile
from grokkit.checkpoint.tensor_file import ArraySpan, StackedTensors, TensorFile
from grokkit.config import GrokConfig
from grokkit.errors import ConfigError

CONFIG_FILE = "config.json"
INDEX = "model.safetensors.index.json"

_HEAD = "lm_head.weight"
_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "final_norm.scale": "model.norm.scale",
    "blocks.attention.query": "model.layers.{layer}.attn.q_proj.weight",
    "blocks.attention.key": "model.layers.{layer}.attn.k_proj.weight",
    "blocks.attention.value": "model.layers.{layer}.attn.v_proj.weight",
    "blocks.attention.out": "model.layers.{layer}.attn.o_proj.weight",
    "blocks.attn_norm.scale": "model.layers.{layer}.pre_attn_norm.scale",
    "blocks.attn_out_norm.scale": "model.layers.{layer}.post_attn_norm.scale",
    "blocks.moe_norm.scale": "model.layers.{layer}.pre_moe_norm.scale",
    "blocks.moe_out_norm.scale": "model.layers.{layer}.post_moe_norm.scale",
    "blocks.moe.router": "model.layers.{layer}.moe_block.gate.weight",
    "blocks.moe.gate": "model.layers.{layer}.moe_block.experts.{expert}.linear.weight",
    "blocks.moe.value": "model.layers.{layer}.moe_block.experts.{expert}.linear_v.weight",
    "blocks.moe.out": "model.layers.{layer}.moe_block.experts.{expert}.linear_1.weight",
}
_IGNORED = re.compile(r".*\.rotary_emb\..*")  # tables that some releases of transformers saved

# Our field -> the names that ports give it.
_FIELDS: dict[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size",),
    "d_model": ("hidden_size",),
    "d_ff": ("intermediate_size",),
    "n_layers": ("num_hidden_layers",),
    "n_heads": ("num_attention_heads",),
    "n_kv_heads": ("num_key_value_heads",),
    "n_experts": ("num_experts", "num_local_experts"),
    "n_experts_per_token": ("num_experts_per_tok",),
    "context_length": ("max_position_embeddings",),
    "embedding_multiplier": ("embedding_multiplier_scale",),
    "output_multiplier": ("output_multiplier_scale",),
    "attention_multiplier": ("attn_output_multiplier",),
    "attention_softcap": ("max_attn_value",),
    "rope_base": ("rope_theta",),
    "norm_eps": ("rms_norm_eps",),
    "pad_token": ("pad_token_id",),
    "eos_token": ("eos_token_id",),
}
# Where a port says nothing, its code takes these, which are Grok-1's.
_OPTIONAL = {"attention_softcap", "rope_base", "norm_eps", "pad_token", "eos_token"}
_CHUNK = 1 << 24  # bytes compared at a time


def is_hugging_face(names: Iterable[str]) -> bool:
    """Whether arrays of these names are a port's, or some of them."""
    return any(".moe_block." in name or name == _NAMES["embedding.weight"] for name in names)


def open_hugging_face(
    directory: Path, files: list[SafetensorsFile], config: GrokConfig | None
) -> Checkpoint:
    """Open a port's checkpoint, as `open_checkpoint` does.

    Of the weights only the unembedding is read, if there is one: it must be the embedding again.
    """
    _check_index(directory, files)
    config = read_config(directory / CONFIG_FILE) if config is None else config
    remedy = f"check that all files are there, and that {CONFIG_FILE} describes this checkpoint"
    arrays = Arrays(directory, files, remedy)
    entries = tuple(Entry(key, _tensor(key, arrays)) for key in tensor_keys(config))
    if _HEAD in arrays.left:
        _check_tied(arrays.left.pop(_HEAD), entries[0].file)
    arrays.left = {k: v for k, v in arrays.left.items() if not _IGNORED.fullmatch(k)}
    arrays.check_all_taken(f"the arrays of a Grok-1 of {config.n_layers} layers")
    return Checkpoint(directory, config, entries, "hugging face")


def read_config(path: Path) -> GrokConfig:
    """The sizes and constants in a port's `config.json`.

    **Raises:** `ConfigError` naming what is missing or impossible.
    """
    if not path.is_file():
        raise ConfigError(
            f"{path}: expected the port's configuration, found no such file; download it too"
        )
    values = read_json(path)
    kinds = {field.name: field.type for field in dataclasses.fields(GrokConfig)}
    found: dict[str, Any] = {}
    for ours, theirs in _FIELDS.items():
        value = next((values[name] for name in theirs if values.get(name) is not None), None)
        if value is None:
            if ours in _OPTIONAL:
                continue
            raise ConfigError(f"{path}: {theirs[0]!r} is missing")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{path}: {theirs[0]!r} must be a number, found {value!r:.50}")
        if kinds[ours] is float:
            value = float(value)
        found[ours] = value
    heads = found["n_heads"]
    d_head = values.get("head_dim")
    if d_head is None and isinstance(heads, int) and heads > 0:
        d_head = found["d_model"] // heads
    found["d_head"] = d_head
    try:
        return GrokConfig(**found)
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}") from None


def _check_index(directory: Path, files: list[SafetensorsFile]) -> None:
    """Every file that the index names must be there."""
    path = directory / INDEX
    if not path.is_file():
        return
    weights = read_json(path).get("weight_map")
    if not isinstance(weights, dict) or not all(isinstance(v, str) for v in weights.values()):
        raise refusal(path, "a weight_map", f"{weights!r:.50}", "download the file again")
    missing = sorted(set(weights.values()) - {file.path.name for file in files})
    if missing:
        raise refusal(
            directory,
            f"the files that {INDEX} names",
            f"{', '.join(missing[:3])} missing, {len(missing)} in all",
            "download them too",
        )


def _tensor(key: TensorKey, arrays: Arrays) -> TensorFile | StackedTensors:
    """Take a parameter's arrays, checked."""
    pattern, floats = _NAMES[key.path], FLOATS.values()
    if "{expert}" not in pattern:
        is_matrix = len(key.shape) == 2 and key.path != "embedding.weight"
        shape = key.shape[::-1] if is_matrix else key.shape
        found = arrays.take(pattern.format(layer=key.layer), shape, *floats)
        return dataclasses.replace(found, k_last=is_matrix)
    n_experts, k, n = key.shape
    parts = []
    for expert in range(n_experts):
        # All are of the first one's dtype.
        dtypes = [parts[0].weight.dtype] if parts else floats
        found = arrays.take(pattern.format(layer=key.layer, expert=expert), (n, k), *dtypes)
        parts.append(dataclasses.replace(found, k_last=True))
    return StackedTensors.of(tuple(parts))


def _check_tied(head: TensorFile, embedding: TensorFile | StackedTensors) -> None:
    assert isinstance(embedding, TensorFile)
    # As bytes: what is not a number equals itself here.
    a, b = (
        file.open(ArraySpan(np.dtype(np.uint8), (file.weight.nbytes,), file.weight.offset))
        for file in (head, embedding)
    )
    if str(head) != str(embedding) or not all(
        np.array_equal(a[i : i + _CHUNK], b[i : i + _CHUNK]) for i in range(0, a.shape[0], _CHUNK)
    ):
        raise refusal(
            head.path,
            f"{_HEAD} equal to {_NAMES['embedding.weight']}: Grok-1's unembedding is its embedding",
            f"another matrix, {head.weight}",
            "this is not a Grok-1; if it was trained further, its two matrices were untied",
        )
