"""Direct attribution: a logit as the exact sum of what each part of the model wrote for it.

The stream that the final norm reads is the embedding plus what every layer's attention and
experts added. With the scale of each norm held at the value that it took in this pass
(`1 / sqrt(mean square + eps)`), everything from a head's output, or an expert's, to the logits is
linear, and a logit is the sum of one term for the embedding, each head and each (layer, expert).
The same holds for the logits of a router, which reads the stream through a norm of its own.

Elhage et al., "A Mathematical Framework for Transformer Circuits", 2021. Grok-1 norms attention's
and the experts' outputs before it adds them; those norms are frozen too.

A term is what a part writes directly. What it does through later layers is not in it; patching
(`grokkit.analysis.patching`) measures that.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from grokkit.activation_cache import ActivationCache
from grokkit.errors import PromptError, SiteError
from grokkit.language_model import LanguageModel, Tokens
from grokkit.layers.ends import Ends
from grokkit.layers.rms_norm import RMSNorm
from grokkit.numerics import einsum32
from grokkit.processes import to_host
from grokkit.quant import QuantizedArray, dequantize
from grokkit.taps import Capture

_WRITTEN = (
    "embed", "z", "attn_out_pre_norm", "expert_indices", "expert_weights", "expert_outputs",
    "moe_out_pre_norm",
)  # fmt: skip


Ids = int | np.integer | Sequence[int] | np.ndarray | Array


@dataclasses.dataclass(frozen=True)
class Attribution:
    """The terms of some logits, or differences of logits, at some positions."""

    embed: Float[np.ndarray, "batch position target"]
    """The token embedding's term."""
    heads: Float[np.ndarray, "layer batch position head target"]
    """Each head's term."""
    experts: Float[np.ndarray, "layer2 batch position expert target"]
    """Each expert's term; zero where it was not chosen."""
    total: Float[np.ndarray, "batch position target"]
    """What the model itself computed, and the terms sum to."""
    positions: tuple[int, ...]
    """The position at each index of the position axis."""

    def sum(self) -> Float[np.ndarray, "batch position target"]:
        """All terms together; equals `total` up to rounding."""
        return self.embed + self.heads.sum(axis=(0, 3)) + self.experts.sum(axis=(0, 3))

    def terms(self, batch: int = 0, position: int = 0, target: int = 0) -> dict[str, float]:
        """Every term of one logit by name: `embed`, `L2H5` (a head), `L3E1` (an expert).

        **Arguments:** indices into the arrays' axes; `position` is an index of `positions`.
        """
        named = {"embed": float(self.embed[batch, position, target])}
        for kind, values in (("H", self.heads), ("E", self.experts)):
            for layer, row in enumerate(values[:, batch, position, :, target]):
                named |= {f"L{layer}{kind}{i}": float(value) for i, value in enumerate(row)}
        return named

    def top(
        self, n: int = 10, batch: int = 0, position: int = 0, target: int = 0
    ) -> list[tuple[str, float]]:
        """The terms of largest absolute value, as `terms` names them."""
        terms = self.terms(batch, position, target)
        return sorted(terms.items(), key=lambda item: -abs(item[1]))[:n]

    def __repr__(self) -> str:
        largest = ", ".join(f"{name} {value:+.3g}" for name, value in self.top(5))
        return (f"Attribution of {self.total.shape[-1]} target(s) at positions "
                f"{list(self.positions)} of {self.total.shape[0]} prompt(s); the first is "
                f"{self.total[0, 0, 0]:.4g}, most of it {largest}")  # fmt: skip


def logit_attribution(
    lm: LanguageModel,
    tokens: Tokens,
    targets: Ids,
    against: Ids | None = None,
    positions: Sequence[int] | None = (-1,),
) -> Attribution:
    """Split next-token logits into the terms of all parts.

    **Arguments:**

    - `tokens`: as for calling the model.
    - `targets`: token ids whose logits to split; anything that broadcasts to
        [batch, position, target], so one id, or a list of them for every position.
    - `against`: token ids, shaped alike, whose logits are subtracted.
    - `positions`: at which positions, negative ones from the end; `None` for all.

    **Returns:** an `Attribution`. In float32 its terms sum to the logits within 1e-4 of them.

    **Raises:** `PromptError` for ids that do not exist, `SiteError` for such positions.
    """
    _, lengths = lm.prepare(tokens)
    places = _places(lengths, positions)
    shape = (len(lengths), len(places))
    ids = [_targets(lm, t, shape, lm.config.vocab_size, n)
           for t, n in ((targets, "targets"), (against, "against")) if t is not None]  # fmt: skip
    if len(ids) == 2:
        ids[1] = np.broadcast_to(ids[1], np.broadcast_shapes(*(i.shape for i in ids)))
        ids[0] = np.broadcast_to(ids[0], ids[1].shape)
    last = Capture("resid_post", layers=(-1,), positions=places, name="stream")
    cache = _capture(lm, tokens, places, last, Capture("logits", positions=places))
    logits = to_host(cache["logits"])
    picked = [np.take_along_axis(logits, i, axis=-1) for i in ids]
    total = picked[0] if len(ids) == 1 else picked[0] - picked[1]
    stream = to_host(cache["stream"])[0]
    with jax.set_mesh(lm.mesh):
        direction = _logit_direction(
            lm.runnable.ends, stream, tuple(jnp.asarray(i, jnp.int32) for i in ids)
        )
    return _attribute(lm, cache, direction, total, places, lm.config.n_layers, True)


def router_attribution(
    lm: LanguageModel,
    tokens: Tokens,
    layer: int,
    experts: Ids | None = None,
    against: Ids | None = None,
    positions: Sequence[int] | None = (-1,),
) -> Attribution:
    """Split a router's logits, or the margin of its choice, into the terms of the parts before.

    **Arguments:**

    - `layer`: whose router. Heads up to this layer and experts before it have terms.
    - `experts`, `against`: as `targets` and `against` of `logit_attribution`, but experts. By
        default the margin: the least of the chosen experts' logits minus the largest of the others',
        so that a positive term spoke for the choice that was made.
    - `tokens`, `positions`: as for `logit_attribution`.

    **Returns:** an `Attribution`, with `layer + 1` layers of heads and `layer` of experts.

    **Raises:** `SiteError` for a layer or position that does not exist, `PromptError` for experts.
    """
    n_layers, n_experts = lm.config.n_layers, lm.config.n_experts
    if not -n_layers <= layer < n_layers:
        raise SiteError(f"there is no layer {layer}; there are {n_layers}, 0 to {n_layers - 1}")
    if experts is None and (against is not None or lm.config.n_experts_per_token == n_experts):
        raise PromptError("experts: name them; there is no margin to split by default")
    layer = layer % n_layers
    _, lengths = lm.prepare(tokens)
    places = _places(lengths, positions)
    cache = _capture(
        lm, tokens, places,
        Capture("resid_mid", layers=(layer,), positions=places, name="stream"),
        Capture("router_logits", layers=(layer,), positions=places),
    )  # fmt: skip
    logits = to_host(cache["router_logits"])[0]
    k = lm.config.n_experts_per_token
    ranked = np.argsort(-logits, axis=-1, kind="stable")
    first = ranked[..., k - 1 : k]
    second: Any = ranked[..., k : k + 1]
    if experts is not None:
        first = _targets(lm, experts, logits.shape[:2], n_experts, "experts")
        second = None
        if against is not None:
            second = _targets(lm, against, logits.shape[:2], n_experts, "against")
    sign = np.eye(n_experts, dtype=np.float32)[first]
    if second is not None:
        sign = sign - np.eye(n_experts, dtype=np.float32)[second]
    total = np.einsum("bpte,bpe->bpt", sign, logits)
    stream = to_host(cache["stream"])[0]
    with jax.set_mesh(lm.mesh):
        of_router = lm.runnable.part(layer, lambda b: (b.moe.router, b.moe_norm))
        direction = _router_direction(of_router, jnp.asarray(stream), jnp.asarray(sign))
    return _attribute(lm, cache, direction, total, places, layer + 1, False)


def _places(lengths: np.ndarray, positions: Sequence[int] | None) -> tuple[int, ...]:
    """Positions counted from 0, checked."""
    n = int(max(lengths))
    if positions is None:
        return tuple(range(n))
    if len(positions) == 0:
        raise SiteError("positions: expected at least one, found none")
    for i in positions:
        if not -n <= i < n:
            raise SiteError(f"positions: there is no position {i}; there are {n}, 0 to {n - 1}")
        if i < 0 and len(set(lengths.tolist())) > 1:
            raise SiteError(f"positions: {i} counts from the end, and the prompts have different "
                            f"lengths, {lengths.tolist()}; count from 0, or attribute prompts of "
                            f"one length at a time")  # fmt: skip
    return tuple(int(i) % n for i in positions)


def _targets(
    lm: LanguageModel, targets: Ids, shape: tuple[int, ...], size: int, what: str
) -> Int[np.ndarray, "batch position target"]:
    ids = np.atleast_1d(np.asarray(targets))
    if ids.size == 0 or ids.dtype.kind not in "iu":
        raise PromptError(f"{what}: expected integers, found {targets!r}")
    if ids.min() < 0 or ids.max() >= size:
        raise PromptError(f"{what}: ids go from 0 to {size - 1}, found {ids.min()} to {ids.max()}")
    try:
        return np.broadcast_to(ids, (*shape, ids.shape[-1]))
    except ValueError as e:
        raise PromptError(
            f"{what}: shape {ids.shape} does not broadcast to [batch, position, target] = "
            f"{(*shape, 'any')}"
        ) from e


def _capture(
    lm: LanguageModel, tokens: Tokens, places: tuple[int, ...], *more: Capture
) -> ActivationCache:
    captures = [Capture(name, positions=places) for name in _WRITTEN]
    return lm.run_with_cache(tokens, [*captures, *more])[1]


def _frozen(norm: RMSNorm, x: Array) -> Float[Array, "*rows d_model"]:
    """What the norm multiplied each component of `x` by."""
    x = x.astype(jnp.float32)
    return norm.scale * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + norm.eps)


@eqx.filter_jit
def _logit_direction(
    ends: Ends, stream: Array, ids: tuple[Array, ...]
) -> Float[Array, "batch position target d_model"]:
    """The vector whose product with the stream is the logit (or the difference)."""
    rows = []
    for i in ids:
        flat = jax.reshard(jnp.asarray(i).reshape(i.shape[0], -1), P("data", None))
        row = jax.reshard(ends.embedding.embed(flat), P())
        rows.append(row.reshape(*i.shape, row.shape[-1]))
    row = rows[0] if len(rows) == 1 else rows[0] - rows[1]
    frozen = _frozen(ends.final_norm, jnp.asarray(stream))
    return row * frozen[:, :, None] * ends.config.output_multiplier


@eqx.filter_jit
def _router_direction(
    of_router: tuple[Array, RMSNorm], stream: Array, sign: Array
) -> Float[Array, "batch position target d_model"]:
    router, norm = jax.reshard(of_router, P())
    row = einsum32("bpte,de->bptd", jnp.asarray(sign), router, jnp.float32)
    return row * _frozen(norm, jnp.asarray(stream))[:, :, None]


@jax.jit
def _of_embed(
    direction: Float[Array, "batch position target d_model"],
    embed: Float[Array, "batch position d_model"],
) -> Float[Array, "batch position target"]:
    return einsum32("bpd,bptd->bpt", embed, direction, jnp.float32)


@functools.partial(jax.jit, static_argnames=("n_heads",))
def _of_layer(
    weights: tuple[QuantizedArray | Array, RMSNorm, RMSNorm],
    n_heads: int,
    direction: Float[Array, "batch position target d_model"],
    a: dict[str, Array],
) -> tuple[Array, Array]:
    """Terms of a layer's heads [batch, position, target, head], and of the chosen experts
    [batch, position, choice, target]; `a`: what the layer wrote."""
    out, attn_norm, moe_norm = jax.tree.map(lambda w: jax.reshard(w, P()), weights)
    matrix = dequantize(out) if isinstance(out, QuantizedArray) else out
    before = direction * _frozen(attn_norm, a["attn_out_pre_norm"])[:, :, None]
    into = einsum32("bptd,hd->bpth", before, matrix, jnp.float32)
    into = into.reshape(*into.shape[:3], n_heads, -1)
    heads = jnp.sum(into * a["z"][:, :, None], axis=-1)
    before = direction * _frozen(moe_norm, a["moe_out_pre_norm"])[:, :, None]
    shares = a["expert_outputs"] * a["expert_weights"][..., None]
    return heads, einsum32("bpcd,bptd->bpct", shares, before, jnp.float32)


def _attribute(
    lm: LanguageModel,
    cache: ActivationCache,
    direction: Array,
    total: np.ndarray,
    places: tuple[int, ...],
    n_layers: int,
    last_experts: bool,
) -> Attribution:
    """Put the terms together; `last_experts`: whether the last layer's experts have any."""
    whole = NamedSharding(lm.mesh, P())
    used = {n: to_host(cache[n]) for n in _WRITTEN if n != "expert_indices"}
    with jax.set_mesh(lm.mesh):
        embed = to_host(_of_embed(direction, jax.device_put(used.pop("embed"), whole)))
        terms = []
        for layer in range(n_layers):
            weights = lm.runnable.part(
                layer, lambda b: (b.attention.out, b.attn_out_norm, b.moe_out_norm)
            )
            written = {name: value[layer] for name, value in used.items()}
            written = jax.device_put(written, whole)
            terms.append(_of_layer(weights, lm.config.n_heads, direction, written))
    heads, chosen = (np.stack(to_host(of)) for of in zip(*terms, strict=True))
    n_experts = n_layers if last_experts else n_layers - 1
    chosen, indices = chosen[:n_experts], to_host(cache["expert_indices"])[:n_experts]
    is_expert = indices[..., None] == np.arange(lm.config.n_experts)
    experts = np.einsum("lbpce,lbpct->lbpet", is_expert.astype(np.float32), chosen)
    return Attribution(embed, np.moveaxis(heads, 3, 4), experts, total, places)
