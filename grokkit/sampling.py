"""Drawing the next token from the logits, each sequence by its own settings.

They apply in this order, which is that of Hugging Face's transformers (`generation/utils.py`,
`_get_logits_processor`):

1. `repetition_penalty`: logits of tokens that the sequence holds are made smaller.
2. `allowed`: all other tokens are ruled out.
3. `temperature`: logits are divided by it; 0 takes the largest, and what follows changes nothing.
4. `top_k`: only the most probable so many remain.
5. `top_p`: of those, only the most probable that together reach this share.
6. `min_p`: of those, only tokens with at least this share of the most probable one's probability.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, UInt32

from grokkit.errors import PromptError

N_ALTERNATIVES = 8
_ROWS = P("data")

Allowed = (
    Sequence[int]
    | Bool[np.ndarray, "*batch vocab"]
    | Bool[Array, "*batch vocab"]
    | Int[np.ndarray, "..."]
    | Int[Array, "..."]
)


class Constraints(NamedTuple):
    """The settings that few sequences use; programs without them are compiled without them."""

    top_k: Int[Array, " batch"]
    min_p: Float[Array, " batch"]
    repetition_penalty: Float[Array, " batch"]
    allowed: Bool[Array, "batch vocab"]


class Rows(NamedTuple):
    """The settings of each sequence of a batch, as arrays."""

    temperature: Float[Array, " batch"]
    top_p: Float[Array, " batch"]
    seed: UInt32[Array, " batch"]
    constraints: Constraints | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Sampling:
    """How the next token is drawn; one value for all sequences, or one for each."""

    temperature: float | int | Sequence[float] = 1.0
    """The logits are divided by it; 0 takes the most probable token."""
    top_p: float | int | Sequence[float] = 1.0
    """Draw from the fewest most probable tokens that together reach this probability (nucleus
    sampling, Holtzman et al., arXiv 1904.09751)."""
    seed: int | Sequence[int] = 0
    """The draws of sequence i of a batch come from `seed + i`, or from its own seed. They depend
    on it and on the token's position only, not on what else is in the batch."""
    top_k: int | Sequence[int] = 0
    """Draw from this many most probable tokens (Fan et al., arXiv 1805.04833); 0 sets no limit."""
    min_p: float | int | Sequence[float] = 0.0
    """Draw only tokens at least this many times as probable as the most probable one (Nguyen et
    al., arXiv 2407.01082)."""
    repetition_penalty: float | int | Sequence[float] = 1.0
    """Positive logits of tokens that prompt or new text hold are divided by it, negative ones
    multiplied (Keskar et al., CTRL, arXiv 1909.05858, in Hugging Face's form: CTRL divides
    negative logits too, which would favour repetition). 1 changes nothing."""
    allowed: Allowed | None = None
    """The tokens that may be drawn: their ids, or a mask [vocab], or one for each sequence
    [batch, vocab]. A mask is of bools, or of 0 and 1 as the original's are. All by default."""

    def rows(self, n: int, vocab_size: int) -> Rows:
        """The settings of each of `n` sequences, on the host.

        **Raises:** `PromptError` for a value out of range, or not one for each sequence.
        """
        temperature = _each("temperature", self.temperature, n, np.float32)
        if not (np.isfinite(temperature).all() and (temperature >= 0).all()):
            raise PromptError(f"temperature must be 0 or more, found {self.temperature}")
        top_p = _each("top_p", self.top_p, n, np.float32)
        if not ((top_p > 0) & (top_p <= 1)).all():
            raise PromptError(f"top_p must be above 0 and at most 1, found {self.top_p}")
        seed = np.asarray(self.seed)
        if seed.dtype.kind not in "iu" or (seed < 0).any() or (seed >= 2**32).any():
            raise PromptError(f"seed must be an integer from 0 to 2**32 - 1, found {self.seed}")
        seeds = (int(seed) + np.arange(n)) % 2**32 if seed.ndim == 0 else seed
        seeds = _each("seed", seeds, n, np.uint32)
        return Rows(temperature, top_p, seeds, self._constraints(n, vocab_size))  # type: ignore[arg-type]

    def _constraints(self, n: int, vocab_size: int) -> Constraints | None:
        """`None` where all are left at what changes nothing."""
        top_k = np.asarray(self.top_k)
        if top_k.dtype.kind not in "iu" or (top_k < 0).any():
            raise PromptError(f"top_k must be an integer, 0 or more, found {self.top_k}")
        min_p = _each("min_p", self.min_p, n, np.float32)
        if not ((min_p >= 0) & (min_p <= 1)).all():
            raise PromptError(f"min_p must be from 0 to 1, found {self.min_p}")
        penalty = _each("repetition_penalty", self.repetition_penalty, n, np.float32)
        if not (np.isfinite(penalty).all() and (penalty > 0).all()):
            raise PromptError(
                f"repetition_penalty must be above 0, found {self.repetition_penalty}"
            )
        top_k = _each("top_k", np.minimum(top_k, vocab_size), n, np.int32)
        if self.allowed is None and not top_k.any() and not min_p.any() and (penalty == 1).all():
            return None
        allowed = _mask(self.allowed, n, vocab_size)
        return Constraints(top_k, min_p, penalty, allowed)  # type: ignore[arg-type]


def _each(name: str, value: Any, n: int, dtype: Any) -> np.ndarray:
    values = np.asarray(value, dtype)
    if values.ndim > 1 or values.ndim == 1 and values.shape[0] != n:
        raise PromptError(f"{name}: expected one value, or one for each of {n} prompts, found "
                          f"{values.size}")  # fmt: skip
    return np.broadcast_to(values, (n,))


def _mask(allowed: Allowed | None, n: int, vocab_size: int) -> Bool[np.ndarray, "batch vocab"]:
    """Which tokens each of `n` sequences may draw."""
    if allowed is None:
        return np.ones((n, vocab_size), bool)
    values = np.asarray(allowed)
    if values.shape in ((vocab_size,), (n, vocab_size)) and np.isin(values, (0, 1)).all():
        values = values.astype(bool)  # nobody names tokens 0 and 1 as often as there are tokens
    if values.dtype == bool:
        if values.shape not in ((vocab_size,), (n, vocab_size)):
            raise PromptError(f"allowed: expected a mask of shape {(vocab_size,)} or "
                              f"{(n, vocab_size)}, found {values.shape}")  # fmt: skip
        mask = np.broadcast_to(values, (n, vocab_size))
    else:
        if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
            raise PromptError(f"allowed: expected token ids or a mask, found an array of shape "
                              f"{values.shape} and dtype {values.dtype}")  # fmt: skip
        outside = values[(values < 0) | (values >= vocab_size)]
        if outside.size:
            raise PromptError(f"allowed holds token id {outside[0]}; ids go from 0 to "
                              f"{vocab_size - 1}")  # fmt: skip
        mask = np.zeros((n, vocab_size), bool)
        mask[:, values.astype(np.int64)] = True
    if not mask.any(axis=1).all():
        raise PromptError("allowed must leave at least one token to draw, found none")
    return mask


def stack(rows: Sequence[Rows | None], vocab_size: int) -> Rows:
    """One batch of several sequences' settings; `None` for a row that holds no sequence."""
    idle = Rows(np.zeros(1, np.float32), np.ones(1, np.float32), np.zeros(1, np.uint32))  # type: ignore[arg-type]
    filled = [idle if r is None else r for r in rows]
    firsts = [np.concatenate(values) for values in zip(*(r[:3] for r in filled), strict=True)]
    if not any(r.constraints for r in filled):
        return Rows(*firsts)  # type: ignore[arg-type]
    zero, one = np.zeros(1, np.float32), np.ones(1, np.float32)
    none = Constraints(np.zeros(1, np.int32), zero, one, np.ones((1, vocab_size), bool))  # type: ignore[arg-type]
    each = [r.constraints or none for r in filled]
    return Rows(*firsts, Constraints(*map(np.concatenate, zip(*each, strict=True))))  # type: ignore[arg-type]


class Draw(eqx.Module):
    """The tokens drawn at one step, and how probable the model held them to be.

    Probabilities are the model's own: softmax of the logits, before any setting applies.
    """

    token: Int[Array, " *batch"]
    prob: Float[Array, " *batch"]
    top_tokens: Int[Array, "*batch alternative"]
    """The most probable tokens, best first."""
    top_probs: Float[Array, "*batch alternative"]


@jax.jit
def sample(
    logits: Float[Array, "batch vocab"],
    rows: Rows,
    position: Int[Array, " batch"],
    seen: Bool[Array, "batch vocab"] | None = None,
) -> Draw:
    """Draw each sequence's next token.

    **Arguments:**

    - `logits`: of the sequence's last token.
    - `rows`: see `Sampling`.
    - `position`: that the new token will have; with the seed it determines the draw.
    - `seen`: which tokens each sequence holds, where `rows` has constraints; see `mark_seen`.
    """

    def local(logits, rows, position, seen):
        greedy = rows.temperature == 0
        wanted = logits if rows.constraints is None else _constrain(logits, rows.constraints, seen)
        # Zero at the largest, so that the smallest temperature cannot make that infinite.
        largest = jnp.max(wanted, axis=-1, keepdims=True)
        scaled = (wanted - largest) / jnp.where(greedy, 1, rows.temperature)[:, None]
        noise = jax.vmap(lambda s, p: jax.random.gumbel(
            jax.random.fold_in(jax.random.key(s), p), logits.shape[1:]
        ))(rows.seed, position)  # fmt: skip
        # The largest of logit + Gumbel noise is a draw from the softmax.
        noisy = jnp.where(_kept(scaled, rows), scaled + noise, -jnp.inf)
        token = _largest(jnp.where(greedy[:, None], wanted, noisy))
        probs = jax.nn.softmax(logits, axis=-1)
        top_probs, top_tokens = jax.lax.top_k(probs, min(N_ALTERNATIVES, probs.shape[1]))
        prob = jnp.take_along_axis(probs, token[:, None], axis=1)[:, 0]
        return Draw(token, prob, top_tokens, top_probs)

    return jax.shard_map(local, in_specs=(_ROWS,) * 4, out_specs=_ROWS)(
        jax.reshard(logits, P("data", None)), rows, position, seen
    )


def _constrain(
    logits: Float[Array, "batch vocab"], to: Constraints, seen: Bool[Array, "batch vocab"]
) -> Float[Array, "batch vocab"]:
    """What repetition costs, and -inf for tokens that are not allowed."""
    penalty = to.repetition_penalty[:, None]
    penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(to.allowed, jnp.where(seen, penalised, logits), -jnp.inf)


def _kept(scaled: Float[Array, "batch vocab"], rows: Rows) -> Bool[Array, "batch vocab"]:
    """Which tokens may be drawn, of logits over temperature that are 0 at the largest."""
    everything = jnp.ones_like(scaled, bool)
    to, of_top_k = rows.constraints, everything
    if to is not None:
        of_top_k = jax.lax.cond(
            jnp.any(to.top_k > 0), lambda: most_probable(scaled, to.top_k), lambda: everything
        )
        scaled = jnp.where(of_top_k, scaled, -jnp.inf)
    kept = jax.lax.cond(
        jnp.any(rows.top_p < 1), lambda: nucleus(scaled, rows.top_p), lambda: everything
    )
    if to is not None:
        kept = kept & of_top_k & (jnp.exp(scaled) >= to.min_p[:, None])
    return kept


def nucleus(
    logits: Float[Array, "batch vocab"], top_p: Float[Array, " batch"]
) -> Bool[Array, "batch vocab"]:
    """The fewest most probable tokens whose probabilities together reach `top_p`.

    A token is kept if those more probable than it do not reach `top_p`; so one always is. Of
    equally probable tokens the lower id counts as the more probable.
    """
    probs = jax.nn.softmax(logits, axis=-1)
    # At top_p = 1 rounding of the sum must not cut a token off.
    return _before_reaching(probs, probs, jnp.where(top_p < 1, top_p, jnp.inf))


def most_probable(
    logits: Float[Array, "batch vocab"], top_k: Int[Array, " batch"]
) -> Bool[Array, "batch vocab"]:
    """The `top_k` most probable tokens, or all where it is 0; of equal ones the lower ids."""
    limit = jnp.where(top_k > 0, top_k.astype(jnp.float32), jnp.inf)
    return _before_reaching(logits, jnp.ones_like(logits), limit)


def _before_reaching(
    values: Float[Array, "batch vocab"],
    weights: Float[Array, "batch vocab"],
    limit: Float[Array, " batch"],
) -> Bool[Array, "batch vocab"]:
    """Which entries come before the weights reach a limit, from the largest value on.

    The smallest such value is found by halving the range of numbers, since a sort takes many times
    as long.
    """
    bits = jax.lax.bitcast_convert_type(values + 0.0, jnp.int32)  # of zeros only the positive one
    order = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # integers in the order of the values

    def above(value: Int[Array, " batch"]) -> Float[Array, " batch"]:
        return jnp.sum(jnp.where(order > value[:, None], weights, 0), axis=-1)

    def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low & high) + ((low ^ high) >> 1)  # of which the sum could overflow
        below = above(middle) >= limit
        return jnp.where(below, middle + 1, low), jnp.where(below, high, middle)

    ends = jnp.min(order, axis=-1), jnp.max(order, axis=-1)
    last = jax.lax.fori_loop(0, 32, halve, ends)[1]
    is_last = order == last[:, None]
    equal = jnp.where(is_last, weights, 0)
    before = above(last)[:, None] + jnp.cumsum(equal, axis=-1) - equal
    return (order > last[:, None]) | is_last & (before < limit[:, None])


def _largest(values: Float[Array, "batch vocab"]) -> Int[Array, " batch"]:
    """`jnp.argmax`, in two passes that use the processor's lanes where its one does not."""
    is_largest = (values == jnp.max(values, axis=-1, keepdims=True)) | jnp.isnan(values)
    places = jnp.arange(values.shape[-1], dtype=jnp.int32)
    return jnp.min(jnp.where(is_largest, places, values.shape[-1]), axis=-1)


@jax.jit
def mark_seen(
    seen: Bool[Array, "batch vocab"],
    tokens: Int[Array, "batch position"],
    counts: Int[Array, " batch"],
) -> Bool[Array, "batch vocab"]:
    """Record the first `counts` of each row's tokens among those that its sequence holds."""

    def local(seen, tokens, counts):
        real = jnp.arange(tokens.shape[1]) < counts[:, None]
        tokens = jnp.where(real, tokens, seen.shape[1])  # one too many: dropped
        row = jnp.arange(seen.shape[0])[:, None]
        return seen.at[row, tokens].set(True, mode="drop")

    return jax.shard_map(local, in_specs=(_ROWS,) * 3, out_specs=_ROWS)(
        *jax.reshard((seen, tokens, counts), (P("data", None), P("data", None), _ROWS))
    )
