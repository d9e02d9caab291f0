"""Which tensor each file of an official checkpoint holds: the only place that knows.

The files are numbered by the parameters' names in **lexicographic** order, so the layers come as
0, 1, 10, 11, ..., 19, 2, 20, ... Converters that took them in numeric order produced models that
write fluent nonsense.
"""

import dataclasses

import numpy as np

from grokkit.checkpoint.pickle_objects import BFLOAT16, FLOAT32, INT8
from grokkit.checkpoint.tensor_writer import encoded_size
from grokkit.config import GrokConfig
from grokkit.errors import ConfigError

# Module and parameter of the original -> the place in the model's pytree.
_OUTSIDE = {
    ("language_model/in_out_embed", "embeddings"): "embedding.weight",
    ("language_model/rms_norm", "scale"): "final_norm.scale",
}
_IN_LAYER = {
    ("moe/linear", "w"): "blocks.moe.gate",
    ("moe/linear_v", "w"): "blocks.moe.value",
    ("moe/linear_1", "w"): "blocks.moe.out",
    ("multi_head_attention/query", "w"): "blocks.attention.query",
    ("multi_head_attention/key", "w"): "blocks.attention.key",
    ("multi_head_attention/value", "w"): "blocks.attention.value",
    ("multi_head_attention/linear", "w"): "blocks.attention.out",
    ("rms_norm", "scale"): "blocks.attn_norm.scale",
    ("rms_norm_1", "scale"): "blocks.attn_out_norm.scale",
    ("rms_norm_2", "scale"): "blocks.moe_norm.scale",
    ("rms_norm_3", "scale"): "blocks.moe_out_norm.scale",
    ("router", "w"): "blocks.moe.router",
}

FILES_PER_LAYER = len(_IN_LAYER)
FILES_OUTSIDE = len(_OUTSIDE)
_MOST_FILES = 100_000


@dataclasses.dataclass(frozen=True)
class TensorKey:
    """One tensor of a checkpoint: what it is called, what it must be, and where it goes."""

    index: int
    """Number of its file."""
    name: str
    """The original's parameter name."""
    path: str
    """Place in the model's pytree, as attributes: `"blocks.attention.query"`."""
    layer: int | None
    """Index on the leaf's leading layer axis; `None` for a leaf without one."""
    shape: tuple[int, ...]
    """Shape of one layer's tensor."""
    dtype: np.dtype
    """float32, or int8 for a quantised matrix."""
    scales_shape: tuple[int, ...] | None
    """Shape of a quantised matrix's bfloat16 scales."""

    @property
    def file_name(self) -> str:
        """Name of its file in `ckpt-0/`."""
        return f"tensor{self.index:05d}_000"

    @property
    def nbytes(self) -> int:
        """Bytes of its file."""
        return encoded_size(self.shape, self.dtype, self.scales_shape)

    def __str__(self) -> str:
        text = _describe(self.dtype, self.shape)
        if self.scales_shape is not None:
            text += f" * {_describe(BFLOAT16, self.scales_shape)}"
        return text


def tensor_keys(config: GrokConfig) -> tuple[TensorKey, ...]:
    """Every tensor of a checkpoint, in the order of the files.

    **Raises:** `ConfigError` for sizes that the official layout cannot hold.
    """
    if n_files(config) > _MOST_FILES:
        raise ConfigError(
            f"n_layers: file names have 5 digits, enough for "
            f"{(_MOST_FILES - FILES_OUTSIDE) // FILES_PER_LAYER} layers; found {config.n_layers}"
        )
    places: dict[tuple[str, str], tuple[str, int | None]] = {
        key: (path, None) for key, path in _OUTSIDE.items()
    }
    for layer in range(config.n_layers):
        for (module, parameter), path in _IN_LAYER.items():
            places[f"transformer/decoder_layer_{layer}/{module}", parameter] = (path, layer)
    shapes = _shapes(config)
    keys = []
    for index, (module, parameter) in enumerate(sorted(places)):
        path, layer = places[module, parameter]
        shape, groups = shapes[path]
        scales_shape = None if groups is None else (*shape[:-2], groups, shape[-1])
        dtype = FLOAT32 if groups is None else INT8
        name = f"{module}/{parameter}"
        keys.append(TensorKey(index, name, path, layer, shape, dtype, scales_shape))
    return tuple(keys)


def n_files(config: GrokConfig) -> int:
    """Number of files of a checkpoint: 770 for Grok-1."""
    return FILES_OUTSIDE + FILES_PER_LAYER * config.n_layers


def _shapes(config: GrokConfig) -> dict[str, tuple[tuple[int, ...], int | None]]:
    """Shape of each leaf, layer axis left out, and its scale groups if it is quantised."""
    d, experts, d_ff = config.d_model, config.n_experts, config.d_ff
    heads, kv_heads = config.n_heads * config.d_head, config.n_kv_heads * config.d_head
    shapes: dict[str, tuple[tuple[int, ...], int | None]] = {
        "embedding.weight": ((config.vocab_size, d), None),
        "final_norm.scale": ((d,), None),
        "blocks.moe.router": ((d, experts), None),
        "blocks.moe.gate": ((experts, d, d_ff), 1),
        "blocks.moe.value": ((experts, d, d_ff), 1),
        "blocks.moe.out": ((experts, d_ff, d), config.out_groups),
        "blocks.attention.query": ((d, heads), 1),
        "blocks.attention.key": ((d, kv_heads), 1),
        "blocks.attention.value": ((d, kv_heads), 1),
        "blocks.attention.out": ((heads, d), config.out_groups),
    }
    for norm in ("attn_norm", "attn_out_norm", "moe_norm", "moe_out_norm"):
        shapes[f"blocks.{norm}.scale"] = ((d,), None)
    for path, (shape, groups) in shapes.items():
        if groups is not None and shape[-2] % groups:
            raise ConfigError(
                f"{path}: the official layout has {groups} scale groups along this matrix's "
                f"contracting axis, which must divide it; found {shape[-2]} entries"
            )
    return shapes


def _describe(dtype: np.dtype, shape: tuple[int, ...]) -> str:
    return f"{dtype.name}[{', '.join(map(str, shape))}]"
