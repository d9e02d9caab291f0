"""Which tensor each file of an official checkpoint holds: the only place that knows.

The files are numbered by the parameters' names in **lexicographic** order, so the layers come as
0, 1, 10, 11, ..., 19, 2, 20, ... Converters that took them in numeric order produced models that
write fluent nonsense.
"""

import dataclasses

import numpy as np

from grokkit.checkpoint.pickle_objects import BFLOAT16, FLOAT32, INT8
from grokkit.checkpoint.tensor_file import ArraySpan
from grokkit.checkpoint.tensor_writer import encoded_size
from grokkit.config import GrokConfig
from grokkit.errors import ConfigError

# The original's parameter -> its place in the model's pytree, its axes, and its scale groups along
# the contracting axis if it is quantised; what the names mean is in `tensor_keys`.
_OUTSIDE = {
    "language_model/in_out_embed/embeddings": ("embedding.weight", "vocab d_model", None),
    "language_model/rms_norm/scale": ("final_norm.scale", "d_model", None),
}
_IN_LAYER = {
    "moe/linear/w": ("blocks.moe.gate", "experts d_model d_ff", "one"),
    "moe/linear_v/w": ("blocks.moe.value", "experts d_model d_ff", "one"),
    "moe/linear_1/w": ("blocks.moe.out", "experts d_ff d_model", "out_groups"),
    "multi_head_attention/query/w": ("blocks.attention.query", "d_model heads", "one"),
    "multi_head_attention/key/w": ("blocks.attention.key", "d_model kv_heads", "one"),
    "multi_head_attention/value/w": ("blocks.attention.value", "d_model kv_heads", "one"),
    "multi_head_attention/linear/w": ("blocks.attention.out", "heads d_model", "out_groups"),
    "rms_norm/scale": ("blocks.attn_norm.scale", "d_model", None),
    "rms_norm_1/scale": ("blocks.attn_out_norm.scale", "d_model", None),
    "rms_norm_2/scale": ("blocks.moe_norm.scale", "d_model", None),
    "rms_norm_3/scale": ("blocks.moe_out_norm.scale", "d_model", None),
    "router/w": ("blocks.moe.router", "d_model experts", None),
}
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
        weight = ArraySpan(self.dtype, self.shape, 0)
        scales = self.scales_shape and ArraySpan(BFLOAT16, self.scales_shape, 0)
        return f"{weight} * {scales}" if scales else str(weight)


def tensor_keys(config: GrokConfig) -> tuple[TensorKey, ...]:
    """Every tensor of a checkpoint, in the order of the files.

    **Raises:** `ConfigError` for sizes that the official layout cannot hold.
    """
    most_layers = (_MOST_FILES - len(_OUTSIDE)) // len(_IN_LAYER)
    if config.n_layers > most_layers:
        raise ConfigError(
            f"n_layers: file names have 5 digits, enough for {most_layers} layers; found "
            f"{config.n_layers}"
        )
    sizes = {
        "vocab": config.vocab_size,
        "d_model": config.d_model,
        "d_ff": config.d_ff,
        "experts": config.n_experts,
        "heads": config.n_heads * config.d_head,
        "kv_heads": config.n_kv_heads * config.d_head,
        "out_groups": config.out_groups,
        "one": 1,
    }
    rows = [(name, None, *row) for name, row in _OUTSIDE.items()]
    for layer in range(config.n_layers):
        prefix = f"transformer/decoder_layer_{layer}"
        rows += [(f"{prefix}/{name}", layer, *row) for name, row in _IN_LAYER.items()]
    keys = []
    for index, (name, layer, path, axes, grouping) in enumerate(sorted(rows, key=lambda r: r[0])):
        shape = tuple(sizes[axis] for axis in axes.split())
        dtype, scales_shape = FLOAT32, None
        if grouping is not None:
            groups = sizes[grouping]
            if shape[-2] % groups:
                raise ConfigError(
                    f"{path}: the official layout has {groups} scale groups along this matrix's "
                    f"contracting axis, which must divide it; found {shape[-2]} entries"
                )
            dtype, scales_shape = INT8, (*shape[:-2], groups, shape[-1])
        keys.append(TensorKey(index, name, path, layer, shape, dtype, scales_shape))
    return tuple(keys)
