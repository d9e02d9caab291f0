"""The numbers that define a Grok-1-shaped model."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

from grokkit.errors import ConfigError
from grokkit.runtime import files


@dataclasses.dataclass(frozen=True)
class GrokConfig:
    """Sizes and constants of one model. Frozen and hashable: compiled functions are keyed on it."""

    vocab_size: int
    """Number of token ids."""
    d_model: int
    """Width of the residual stream."""
    n_layers: int
    """Number of decoder layers."""
    n_heads: int
    """Number of query heads."""
    n_kv_heads: int
    """Number of key/value heads; divides `n_heads`."""
    d_head: int
    """Size of one head; even, because rotary embeddings turn halves against each other."""
    d_ff: int
    """Hidden units of one expert."""
    n_experts: int = 8
    """Experts in each layer."""
    n_experts_per_token: int = 2
    """Experts that each token is sent to."""
    context_length: int = 8192
    """Longest sequence the model was trained for, in tokens."""
    embedding_multiplier: float = 78.38367176906169
    """Factor on the embedding as it enters the residual stream."""
    output_multiplier: float = 0.5773502691896257
    """Factor on the logits."""
    attention_multiplier: float = 0.08838834764831845
    """Factor on query . key, before the soft cap."""
    attention_softcap: float = 30.0
    """Scores s become c * tanh(s / c) with this c."""
    rope_base: float = 10000.0
    """Base of the rotary embedding's wavelengths."""
    norm_eps: float = 1e-5
    """Added to the mean square in every RMSNorm."""
    pad_token: int = 0
    """Token id whose keys no query sees."""
    eos_token: int = 2
    """Token id that ends a text."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (not isinstance(value, int) or isinstance(value, bool)):
                raise ConfigError(f"{field.name} must be an integer, found {value!r}")
            if field.type is float and not math.isfinite(value):
                raise ConfigError(f"{field.name} must be a finite number, found {value!r}")
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_head", "d_ff",
                     "n_experts", "n_experts_per_token", "context_length"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, found {getattr(self, name)}")
        for name in ("attention_softcap", "rope_base"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be above 0, found {getattr(self, name)}")
        if self.norm_eps < 0:
            raise ConfigError(f"norm_eps must not be negative, found {self.norm_eps}")
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"n_kv_heads must divide n_heads, found {self.n_kv_heads} and {self.n_heads}"
            )
        if self.d_head % 2:
            raise ConfigError(f"d_head must be even for rotary embeddings, found {self.d_head}")
        if self.n_experts_per_token > self.n_experts:
            raise ConfigError(
                f"n_experts_per_token must be at most n_experts, found "
                f"{self.n_experts_per_token} of {self.n_experts}"
            )
        for name in ("pad_token", "eos_token"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ConfigError(
                    f"{name} must be a token id below {self.vocab_size}, "
                    f"found {getattr(self, name)}"
                )

    @property
    def out_groups(self) -> int:
        """Scale groups along the contracting axis of the two output projections.

        The official checkpoint splits attention `linear` and moe `linear_1` in 8 along their
        contracting axis, since it was quantised on 8 devices. The other matrices have one group.
        """
        return 8

    @property
    def n_params(self) -> int:
        """Number of parameters, quantisation scales not counted."""
        attention = 2 * self.d_model * self.d_head * (self.n_heads + self.n_kv_heads)
        experts = self.n_experts * 3 * self.d_model * self.d_ff
        router_and_norms = self.d_model * (self.n_experts + 4)
        layer = attention + experts + router_and_norms
        return self.n_layers * layer + self.d_model * (self.vocab_size + 1)

    @classmethod
    def from_dict(cls, values: Any, source: str = "config") -> "GrokConfig":
        """Read the official constructor arguments, as `config.json` holds them.

        **Arguments:**

        - `values`: a dict of the arguments of the original `LanguageModelConfig`, with those of its
            `TransformerConfig` under `"model"`. grokkit's own fields (`attention_softcap`,
            `rope_base`, `norm_eps`) may stand beside the latter.
        - `source`: what to call the configuration in error messages.

        **Raises:** `ConfigError` on a missing, unknown or ill-typed entry.
        """
        if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
            raise ConfigError(f'{source}: expected an object with a "model" object inside')
        outer = {k: v for k, v in values.items() if k != "model"}
        inner = dict(values["model"])
        widening = _take(inner, "widening_factor", float, source)
        kinds = {field.name: field.type for field in dataclasses.fields(cls)}
        fields: dict[str, Any] = {}
        for theirs, ours in _OUTER.items():
            fields[ours] = _take(outer, theirs, kinds[ours], source)
        for theirs, ours in _INNER.items():
            fields[ours] = _take(inner, theirs, kinds[ours], source)
        for name in _OWN:
            if name in inner:
                fields[name] = _take(inner, name, float, source)
        unknown = sorted((set(outer) | set(inner)) - _IGNORED)
        if unknown:
            raise ConfigError(
                f"{source}: unknown entries {', '.join(unknown)}; expected "
                f"{', '.join([*_OUTER, 'model', 'widening_factor', *_INNER, *_OWN])}"
            )
        try:
            return cls(d_ff=ffn_size(fields["d_model"], widening), **fields)
        except ConfigError as e:
            raise ConfigError(f"{source}: {e}") from None

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> "GrokConfig":
        """Read a checkpoint's `config.json`; see `from_dict`."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as e:
            raise ConfigError(f"{path}: not a readable JSON file ({e})") from e
        return cls.from_dict(values, source=str(path))

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `from_dict`."""
        outer = {theirs: getattr(self, ours) for theirs, ours in _OUTER.items()}
        inner = {theirs: getattr(self, ours) for theirs, ours in _INNER.items()}
        # Any widening in this range gives back the same d_ff after the official rounding.
        inner["widening_factor"] = self._widening()
        inner |= {name: getattr(self, name) for name in _OWN}
        return outer | {"embedding_init_scale": 1.0, "model": inner}

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write a `config.json` that `from_json` reads back to an equal configuration."""
        files.write(path, json.dumps(self.to_dict(), indent=1) + "\n")

    def _widening(self) -> float:
        for candidate in (self.d_ff * 3 / (2 * self.d_model), (self.d_ff * 3 // 2) / self.d_model):
            for widening in (float(round(candidate)), candidate, candidate + 0.5 / self.d_model):
                if ffn_size(self.d_model, widening) == self.d_ff:
                    return widening
        raise ConfigError(
            f"d_ff {self.d_ff} is not a size that the official configuration can express: it must "
            f"be a multiple of 8"
        )


_OUTER = {
    "vocab_size": "vocab_size",
    "pad_token": "pad_token",
    "eos_token": "eos_token",
    "sequence_len": "context_length",
    "output_multiplier_scale": "output_multiplier",
    "embedding_multiplier_scale": "embedding_multiplier",
}
_INNER = {
    "emb_size": "d_model",
    "key_size": "d_head",
    "num_q_heads": "n_heads",
    "num_kv_heads": "n_kv_heads",
    "num_layers": "n_layers",
    "attn_output_multiplier": "attention_multiplier",
    "num_experts": "n_experts",
    "num_selected_experts": "n_experts_per_token",
}
_OWN = ("attention_softcap", "rope_base", "norm_eps")
# Arguments of the original that say how to initialise or shard, not what the model is.
_IGNORED = {"embedding_init_scale", "shard_activations", "data_axis", "model_axis", "name"}


def _take(values: dict[str, Any], key: str, kind: Any, source: str) -> Any:
    """Remove an entry and give it as an int or a float."""
    if key not in values:
        raise ConfigError(f"{source}: {key!r} is missing")
    value = values.pop(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{source}: {key!r} must be a number, found {value!r}")
    if kind is int and not isinstance(value, int):
        raise ConfigError(f"{source}: {key!r} must be an integer, found {value!r}")
    # Far above any size, and low enough that a product of two stays finite.
    if not abs(value) < 1e100:
        raise ConfigError(f"{source}: {key!r} must be a finite number, found {value!r}")
    return kind(value)


def ffn_size(emb_size: int, widening_factor: float) -> int:
    """The original's hidden size: two thirds of the widened width, rounded up to 8.

    >>> ffn_size(6144, 8)
    32768
    """
    size = int(widening_factor * emb_size) * 2 // 3
    return size + (8 - size) % 8


GROK_1 = GrokConfig(
    vocab_size=131072,
    d_model=6144,
    n_layers=64,
    n_heads=48,
    n_kv_heads=8,
    d_head=128,
    d_ff=32768,
)
"""The official 314-billion-parameter model."""

NANO = GrokConfig(
    vocab_size=4096,
    d_model=192,
    n_layers=6,
    n_heads=16,
    n_kv_heads=8,
    d_head=24,
    d_ff=256,
    context_length=256,
    embedding_multiplier=192**0.5,
    attention_multiplier=24**-0.5,
)
"""The small trained model that ships with grokkit (`grokkit.load("nano")`)."""
