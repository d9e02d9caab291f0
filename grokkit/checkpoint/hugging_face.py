"""Grok-1 as ports to Hugging Face transformers store it: safetensors with a matrix for each expert.

The names are those of hpcai-tech/grok-1 and keyfan/grok-1-hf, which inference engines read too:
`model.layers.3.moe_block.experts.5.linear_v.weight` and so on. torch holds matrices as [out, in].
The experts' `linear` goes through the GELU, `linear_v` multiplies it, `linear_1` leads back.
"""

import dataclasses
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from grokkit.checkpoint.manifest import read_json
from grokkit.checkpoint.names import TensorKey, tensor_keys
from grokkit.checkpoint.official import Checkpoint, Entry
from grokkit.checkpoint.refusal import refusal
from grokkit.checkpoint.safetensors_file import SafetensorsFile
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
_CHUNK = 1 << 22  # entries compared at a time


def is_hugging_face(names: Iterable[str]) -> bool:
    """Whether arrays of these names are a port's, or some of them."""
    return any(".moe_block." in name or name == _NAMES["embedding.weight"] for name in names)


def open_hugging_face(
    directory: Path, files: list[SafetensorsFile], config: GrokConfig | None = None
) -> Checkpoint:
    """Open a port's checkpoint. No weight is read but the unembedding, if there is one.

    **Arguments:**

    - `directory`: that holds the files.
    - `files`: its safetensors files.
    - `config`: the model's sizes; by default those of `config.json`.

    **Raises:** `CheckpointError` if an array is missing, extra or of another shape than the sizes
    demand, or if the unembedding is not the embedding: Grok-1's are one; `ConfigError` for a
    `config.json` that does not describe a Grok-1.
    """
    _check_index(directory, files)
    config = read_config(directory / CONFIG_FILE) if config is None else config
    where: dict[str, TensorFile] = {}
    for file in files:
        for name, span in file.spans.items():
            if name in where:
                raise refusal(file.path, f"{name} once", f"it in {where[name].path.name} too",
                              "remove the files of another download")  # fmt: skip
            where[name] = TensorFile(file.path, file.size, span, k_last=len(span.shape) == 2)
    entries = tuple(Entry(key, _tensor(key, where, directory)) for key in tensor_keys(config))
    head = where.pop(_HEAD, None)
    rest = [name for name in where if not _IGNORED.fullmatch(name)]
    if rest:
        raise refusal(
            directory,
            f"the arrays of a Grok-1 of {config.n_layers} layers",
            f"{', '.join(sorted(rest)[:3])} besides",
            f"check that {CONFIG_FILE} describes this checkpoint",
        )
    if head is not None:
        _check_tied(head, next(e for e in entries if e.key.path == "embedding.weight"))
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


def _tensor(
    key: TensorKey, where: dict[str, TensorFile], directory: Path
) -> TensorFile | StackedTensors:
    """Take a parameter's arrays out of `where`, checked."""
    pattern = _NAMES[key.path]
    if "{expert}" not in pattern:
        shape = key.shape[::-1] if key.path not in ("embedding.weight",) else key.shape
        found = _take(pattern.format(layer=key.layer), shape, where, directory)
        k_last = len(shape) == 2 and key.path != "embedding.weight"
        return dataclasses.replace(found, k_last=k_last)
    n_experts, k, n = key.shape
    names = [pattern.format(layer=key.layer, expert=e) for e in range(n_experts)]
    parts = tuple(_take(name, (n, k), where, directory) for name in names)
    for name, part in zip(names, parts, strict=True):
        if part.weight.dtype != parts[0].weight.dtype:
            raise refusal(
                part.path, f"{name} in {parts[0].weight.dtype.name}, as {names[0]}",
                part.weight.dtype.name, "convert all of them to one dtype",
            )  # fmt: skip
    return StackedTensors.of(parts)


def _take(
    name: str, shape: tuple[int, ...], where: dict[str, TensorFile], directory: Path
) -> TensorFile:
    file = where.pop(name, None)
    if file is None:
        raise refusal(
            directory, f"an array {name}", "none of this name",
            f"check that all files are there, and that {CONFIG_FILE} describes this checkpoint",
        )  # fmt: skip
    if file.weight.shape != shape or file.weight.dtype.kind not in "fV":
        raise refusal(
            file.path, f"{name}: floats of shape {shape}", str(file.weight),
            f"check that {CONFIG_FILE} describes this checkpoint",
        )  # fmt: skip
    return file


def _check_tied(head: TensorFile, embedding: Entry) -> None:
    file = embedding.file
    span = file.weight
    same = (head.weight.shape, head.weight.dtype) == (span.shape, span.dtype)
    if same:
        # As bits: what is not a number equals itself here.
        bits = np.dtype(f"u{span.dtype.itemsize}")
        flat = (math.prod(span.shape),)
        a, b = (
            f.open(ArraySpan(bits, flat, f.weight.offset)) for f in (head, file)
        )  # fmt: skip
        same = all(
            np.array_equal(a[i : i + _CHUNK], b[i : i + _CHUNK]) for i in range(0, flat[0], _CHUNK)
        )
    if not same:
        raise refusal(
            head.path,
            f"{_HEAD} equal to {_NAMES['embedding.weight']}: Grok-1's unembedding is its embedding",
            f"another matrix, {head.weight}",
            "this is not a Grok-1; if it was trained further, its two matrices were untied",
        )
