"""Reading the stream before its end: what would the model say if it stopped here?

The logit lens (nostalgebraist, "interpreting GPT: the logit lens", 2020) sends the residual
stream of any depth through the final norm and the unembedding. The tuned lens (Belrose et al.,
arXiv 2303.08112) puts an affine map, fitted for each layer, in front of them.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm.auto import tqdm

from grokkit.errors import GrokkitError, PromptError, SiteError
from grokkit.language_model import LanguageModel, Tokens
from grokkit.layers.ends import Ends
from grokkit.numerics import einsum32
from grokkit.processes import is_first, to_host
from grokkit.runtime import files
from grokkit.taps import SITES, Capture

STREAM = ("embed", "resid_pre", "resid_mid", "resid_post")
"""The residual stream's sites."""
_LOGITS_AT_ONCE = 2**24
"""Entries of the largest array of logits: 64 MiB."""


@dataclasses.dataclass(frozen=True)
class LensReading:
    """What a lens reads at each depth, in the order in which the forward pass reaches them."""

    depths: tuple[tuple[str, int | None], ...]
    """Site and layer at each index of the depth axis."""
    top_tokens: Int[np.ndarray, "depth batch position rank"]
    """The most probable next tokens, best first."""
    top_log_probs: Float[np.ndarray, "depth batch position rank"]
    """Their log-probabilities, in nats."""
    kl: Float[np.ndarray, "depth batch position"]
    """Kullback-Leibler divergence of the model's final distribution from the lens's, in nats."""
    followed_log_probs: Float[np.ndarray, "depth batch position followed"]
    """Log-probabilities of the tokens that were to be followed, in nats."""

    def __repr__(self) -> str:
        mean = self.kl.mean(axis=(1, 2))
        rows = "\n".join(f"  {site if layer is None else f'{site} {layer}':14} {kl:z8.3f}"
                         for (site, layer), kl in zip(self.depths, mean, strict=True))  # fmt: skip
        return f"LensReading, mean divergence from the final distribution in nats\n{rows}"


class TunedLens(eqx.Module):
    """An affine translator for each layer: the stream x becomes x + x @ weight + bias."""

    weight: Float[Array, "layer d_model d_model2"]
    bias: Float[Array, "layer d_model"]
    site: str = eqx.field(static=True)
    """The stream's site that it reads."""

    @staticmethod
    def identity(n_layers: int, d_model: int, site: str = "resid_post") -> "TunedLens":
        """The lens that changes nothing: the logit lens."""
        return TunedLens(
            jnp.zeros((n_layers, d_model, d_model)), jnp.zeros((n_layers, d_model)), site
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file."""
        arrays = {"weight": np.asarray(self.weight), "bias": np.asarray(self.bias)}
        with files.replacing(path) as temporary:
            save_file(arrays, temporary, metadata={"tuned_lens": json.dumps({"site": self.site})})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TunedLens":
        """Read what `save` wrote. **Raises:** `GrokkitError` for any other file."""
        try:
            with safe_open(path, framework="numpy") as file:
                site = json.loads((file.metadata() or {})["tuned_lens"])["site"]
                weight, bias = file.get_tensor("weight"), file.get_tensor("bias")
            n, d = bias.shape
            if site not in STREAM or weight.shape != (n, d, d):
                raise ValueError(f"site {site!r}, weight {weight.shape}, bias {bias.shape}")
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as e:
            raise GrokkitError(
                f"{path}: expected a safetensors file that TunedLens.save wrote, found something "
                f"else ({type(e).__name__}: {e})"
            ) from e
        return cls(jnp.asarray(weight, jnp.float32), jnp.asarray(bias, jnp.float32), site)


def logit_lens(
    lm: LanguageModel,
    tokens: Tokens,
    sites: Sequence[str] | None = None,
    top: int = 5,
    tuned: TunedLens | None = None,
    follow: Int[np.ndarray, "batch position followed"] | None = None,
) -> LensReading:
    """Read the stream at every depth, for every token.

    Logits are made for a few positions at a time and never kept.

    **Arguments:**

    - `tokens`: as for calling the model. What is read beyond a shorter text's end means nothing.
    - `sites`: which of the stream's sites, all of `STREAM` by default.
    - `top`: how many tokens to keep for each depth and position.
    - `tuned`: read through this lens, at its site, instead of the plain logit lens.
    - `follow`: tokens, as many at each position, whose log-probabilities are kept too, wherever
        they rank: what comes next in truth, say.

    **Returns:** a `LensReading`.

    **Raises:** `SiteError` for a site that is not the stream's or a lens of other sizes,
    `PromptError` for tokens to follow that do not exist or fit the text.
    """
    if sites is None:
        sites = STREAM if tuned is None else (tuned.site,)
    _check_sites(sites)
    if not 1 <= top <= lm.config.vocab_size:
        raise SiteError(f"top: expected 1 to {lm.config.vocab_size} tokens, found {top}")
    if tuned is not None:
        _check_lens(lm, tuned, sites)
    ids, _ = lm.prepare(tokens)
    follow = np.zeros((*ids.shape, 0), np.int32) if follow is None else np.asarray(follow)
    _check_followed(lm, follow, ids.shape)
    _, cache = lm.run_with_cache(tokens, [*sites, Capture("final_norm")])
    depths = _depths(sites, lm.config.n_layers)
    parts = [cache[site] if layer is None else cache[site, layer] for site, layer in depths]
    stream, final = np.stack(to_host(parts)), to_host(cache["final_norm"])
    maps = None if tuned is None else (tuned.weight, tuned.bias)
    n = stream.shape[2]
    step = max(1, min(n, _LOGITS_AT_ONCE // (stream.shape[1] * lm.config.vocab_size)))
    found = []
    for start in range(0, n, step):
        # The last piece overlaps the one before, to keep one shape.
        at = slice(min(start, n - step), min(start, n - step) + step)
        states, last, shared, ids = _place(
            lm, (stream[:, :, at], final[:, at], maps, follow[:, at])
        )
        with jax.set_mesh(lm.mesh):
            piece = _read(lm.runnable.ends, states, last, shared, ids, top)
        fresh = slice(start - at.start, None)
        found.append([p[:, :, fresh] for p in to_host(piece)])
    kl, log_probs, best, followed = (np.concatenate(p, axis=2) for p in zip(*found, strict=True))
    return LensReading(depths, best, log_probs, kl, followed)


def fit_tuned_lens(
    lm: LanguageModel,
    tokens: Int[np.ndarray, "sequence position"],
    site: str = "resid_post",
    steps: int = 200,
    batch: int = 8,
    learning_rate: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
) -> tuple[TunedLens, Float[np.ndarray, "step layer"]]:
    """Fit the translators to the model's own final distributions.

    Minimises the divergence that `LensReading.kl` states, with Adam and a rate that falls
    linearly to zero, from the identity. Each layer's translator is fitted on its own.

    **Arguments:**

    - `tokens`: text as token ids, sequences of one length, at least `batch`.
    - `site`: where in each layer to read: `resid_pre`, `resid_mid` or `resid_post`.
    - `steps`, `batch`: of how many sequences each, drawn without replacement.
    - `learning_rate`: at the start.
    - `seed`: of the order of the sequences.
    - `progress`: show a progress bar.

    **Returns:** the lens, and each step's mean divergence before its update, in nats.

    **Raises:** `GrokkitError` if optax is not installed, `PromptError` or `SiteError` for bad
    arguments.
    """
    try:
        import optax
    except ImportError as e:
        raise GrokkitError(
            "fitting a tuned lens needs optax; install it with `pip install 'grokkit[recipe]'`"
        ) from e
    _check_sites([site])
    if not SITES[site].in_layer:
        raise SiteError(f"site: expected one of each layer, found {site!r}")
    if tokens.ndim != 2 or len(tokens) < batch or batch < 1 or steps < 1:
        raise PromptError(f"expected at least 1 step and token ids [sequence, position] of at "
                          f"least one batch of {batch}, found {steps} steps and an array of "
                          f"shape {tokens.shape}")  # fmt: skip
    lens = _place(lm, TunedLens.identity(lm.config.n_layers, lm.config.d_model, site))
    optimizer = optax.adam(optax.linear_schedule(learning_rate, 0.0, steps))
    state = _place(lm, optimizer.init(lens))

    @eqx.filter_jit
    def update(ends: Ends, lens: TunedLens, state: Any, stream: Array, final: Array) -> Any:
        losses, gradients = _losses(ends, lens, stream, final)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes floats and integers
            updates, state = optimizer.update(gradients, state, lens)  # pyright: ignore[reportArgumentType]
        return optax.apply_updates(lens, updates), state, losses  # pyright: ignore[reportArgumentType]

    rng, order, history = np.random.default_rng(seed), np.empty(0, int), []
    for _ in tqdm(range(steps), desc="tuned lens", disable=not (progress and is_first())):
        if len(order) < batch:
            order = rng.permutation(len(tokens))
        rows, order = tokens[order[:batch]], order[batch:]
        _, cache = lm.run_with_cache(rows, [site, "final_norm"])
        stream, final = (to_host(cache[name]) for name in (site, "final_norm"))
        stream, final = _place(lm, (stream, final))
        with jax.set_mesh(lm.mesh):
            lens, state, losses = update(lm.runnable.ends, lens, state, stream, final)
        history.append(to_host(losses))
    weight, bias = (jnp.asarray(to_host(a)) for a in (lens.weight, lens.bias))
    return TunedLens(weight, bias, site), np.stack(history)


def _check_sites(sites: Sequence[str]) -> None:
    for site in sites:
        if site not in STREAM:
            raise SiteError(f"a lens reads the residual stream: expected {', '.join(STREAM)}, "
                            f"found {site!r}")  # fmt: skip
    if not sites or len(set(sites)) < len(sites):
        raise SiteError(f"sites: expected at least one, each once, found {list(sites)}")


def _check_lens(lm: LanguageModel, tuned: TunedLens, sites: Sequence[str]) -> None:
    expected = (lm.config.n_layers, lm.config.d_model)
    if tuned.bias.shape != expected or tuple(sites) != (tuned.site,):
        raise SiteError(
            f"tuned: the lens is of {tuned.site!r} for {tuned.bias.shape[0]} layers of width "
            f"{tuned.bias.shape[1]}; the model has {expected[0]} of {expected[1]}, and sites is "
            f"{list(sites)}"
        )


def _check_followed(lm: LanguageModel, follow: np.ndarray, shape: tuple[int, ...]) -> None:
    if follow.shape[:-1] != shape or follow.dtype.kind not in "iu":
        raise PromptError(f"follow: expected token ids [batch, position, followed] for a text of "
                          f"{shape[0]} x {shape[1]} tokens, found an array of shape {follow.shape} "
                          f"and dtype {follow.dtype}")  # fmt: skip
    if follow.size and not 0 <= follow.min() <= follow.max() < lm.config.vocab_size:
        raise PromptError(f"follow: token ids go from 0 to {lm.config.vocab_size - 1}, found "
                          f"{follow.min()} to {follow.max()}")  # fmt: skip


def _depths(sites: Sequence[str], n_layers: int) -> tuple[tuple[str, int | None], ...]:
    outside = [(site, None) for site in sites if not SITES[site].in_layer]
    inside = [site for site in STREAM if site in sites and SITES[site].in_layer]
    return (*outside, *((site, layer) for layer in range(n_layers) for site in inside))


def _place(lm: LanguageModel, tree: Any) -> Any:
    return jax.device_put(tree, NamedSharding(lm.mesh, P()))


def _log_probs(ends: Ends, x: Array, normalise: bool = True) -> Float[Array, "batch n vocab"]:
    """The model's distribution for the stream `x`, laid out by rows."""
    x = jax.reshard(x, P("data", None, None))
    x = ends.final_norm(x) if normalise else x
    logits = ends.embedding.unembed(x, ends.dtype) * ends.config.output_multiplier
    return jax.nn.log_softmax(jax.reshard(logits, P("data", None, None)), axis=-1)


def _divergence(final: Array, other: Array) -> Float[Array, "batch n"]:
    return jnp.sum(jnp.exp(final) * (final - other), axis=-1)


def _translate(x: Array, weight: Array, bias: Array) -> Array:
    return x + einsum32("bnd,de->bne", x, weight, jnp.float32) + bias


@eqx.filter_jit
def _read(
    ends: Ends,
    stream: Array,
    final: Array,
    maps: tuple[Array, Array] | None,
    follow: Array,
    top: int,
) -> tuple[Array, Array, Array, Array]:
    """Divergence, log-probabilities and ids of the top tokens, and log-probabilities of those
    followed, one depth after the other."""
    target = _log_probs(ends, final, normalise=False)
    rows = jax.reshard(follow, P("data", None, None))

    def one(xs):
        x = xs[0] if maps is None else _translate(*xs)
        found = _log_probs(ends, x)
        values, ids = jax.lax.top_k(found, top)
        followed = jnp.take_along_axis(found, rows, axis=-1)
        return _divergence(target, found), values, ids, followed

    return jax.lax.map(one, (stream,) if maps is None else (stream, *maps))


def _losses(ends: Ends, lens: TunedLens, stream: Array, final: Array) -> tuple[Array, TunedLens]:
    """Each layer's loss, and the gradients; one layer after the other, to hold few logits."""
    target = _log_probs(ends, final, normalise=False)

    def loss(maps: tuple[Array, Array], x: Array) -> Array:
        return jnp.mean(_divergence(target, _log_probs(ends, _translate(x, *maps))))

    def one(xs):
        weight, bias, x = xs
        return jax.value_and_grad(loss)((weight, bias), x)

    losses, (weight, bias) = jax.lax.map(one, (lens.weight, lens.bias, stream))
    return losses, TunedLens(weight, bias, lens.site)
