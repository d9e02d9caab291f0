"""What attention heads do: functions of captured patterns and scores.

A pattern is the capture `pattern`, [..., batch, head, query, key]: every axis before the batch
(the layer, or none) is kept, and each function averages over the batch and its queries, so that
the result is [..., head]. They run inside the compiled program too, as the `reduce` of a capture.

`queries` says which queries count, [batch, query]; leave out pads with it. All count by default.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from grokkit.errors import GrokkitError
from grokkit.inspection import entropy

AnyArray = Array | np.ndarray
Queries = Bool[AnyArray, "batch query"] | None


def previous_token_score(
    pattern: Float[AnyArray, "*lead batch head query key"], queries: Queries = None
) -> Float[Array, "*lead head"]:
    """Mean attention to the token just before, over queries that have one.

    **Raises:** `GrokkitError` if no query has a token before it.
    """
    n, k = pattern.shape[-2:]
    before = np.broadcast_to(np.eye(n, k, -1, dtype=bool), (pattern.shape[-4], n, k))
    return _mass_on(pattern, before, queries, "a token before it")


def duplicate_token_score(
    pattern: Float[AnyArray, "*lead batch head query key"],
    tokens: Int[AnyArray, "batch position"],
    queries: Queries = None,
) -> Float[Array, "*lead head"]:
    """Mean attention to earlier occurrences of the query's own token.

    The mean is over queries whose token occurred before. Wang et al., arXiv 2211.00593.

    **Raises:** `GrokkitError` if no counted query's token occurred before.
    """
    return _mass_on(pattern, _repeats(tokens), queries, "an earlier occurrence of its token")


def induction_score(
    pattern: Float[AnyArray, "*lead batch head query key"],
    tokens: Int[AnyArray, "batch position"],
    queries: Queries = None,
) -> Float[Array, "*lead head"]:
    """Mean attention to the tokens that followed earlier occurrences of the query's own token.

    The mean is over queries for which there is such a token before the query itself. On a random
    sequence written twice, this is the prefix-matching score of Olsson et al., arXiv 2209.11895.

    **Raises:** `GrokkitError` if there is no counted query of this kind.
    """
    repeats = _repeats(tokens)
    followers = np.zeros_like(repeats)
    followers[:, :, 1:] = repeats[:, :, :-1]
    n = followers.shape[-1]
    followers &= np.tri(n, n, -1, dtype=bool)
    return _mass_on(pattern, followers, queries, "a token after an earlier occurrence of its own")


def attention_entropy(
    pattern: Float[AnyArray, "*lead batch head query key"], queries: Queries = None
) -> Float[Array, "*lead head"]:
    """Mean entropy of the attention weights, in nats; at most log(number of visible keys)."""
    return _mean(entropy(jnp.asarray(pattern)), _counted(pattern, queries))


def first_token_mass(
    pattern: Float[AnyArray, "*lead batch head query key"], queries: Queries = None
) -> Float[Array, "*lead head"]:
    """Mean attention to the first token, over queries after it.

    Heads that find nothing rest there: the sink of Xiao et al., arXiv 2309.17453.

    **Raises:** `GrokkitError` if no counted query is after the first token.
    """
    batch, n, k = pattern.shape[-4], *pattern.shape[-2:]
    first = np.zeros((batch, n, k), bool)
    first[:, 1:, 0] = True
    return _mass_on(pattern, first, queries, "a position after the first")


def distance_profile(
    pattern: Float[AnyArray, "*lead batch head query key"], queries: Queries = None
) -> Float[Array, "*lead head distance"]:
    """Mean attention to the token `distance` positions back, 0 being the query's own.

    Each distance's mean is over the counted queries that reach so far back, so that a head which
    always looks one back scores 1 at distance 1; the profile need not sum to one. A distance that
    no counted query reaches is NaN.
    """
    n, k = pattern.shape[-2:]
    if n != k:
        raise GrokkitError(f"pattern: expected as many queries as keys, found {n} and {k}")
    counted = _counted(pattern, queries)
    distances = np.arange(n)[:, None] - np.arange(n)
    profile = []
    for distance in range(n):
        at = jnp.asarray(distances == distance)
        mass = jnp.sum(jnp.where(at, pattern, 0), axis=-1)
        profile.append(_mean(mass, counted & (np.arange(n) >= distance)))
    return jnp.stack(profile, axis=-1)


def softcap_share(
    scores: Float[AnyArray, "*lead batch head query key"],
    cap: float,
    fraction: float = 0.9,
    queries: Queries = None,
) -> Float[Array, "*lead head"]:
    """Share of the visible scores within a tenth (`1 - fraction`) of the soft cap, either side.

    **Arguments:**

    - `scores`: the capture `attn_scores`, capped already, -inf where masked.
    - `cap`: the model's `attention_softcap`. A score before the cap is `cap * atanh(score / cap)`:
        at a fraction of .9 it is 1.47 times the cap.
    - `fraction`: from which share of the cap a score counts as near.

    **Raises:** `GrokkitError` for a cap or fraction out of range, or scores beyond the cap.
    """
    if not cap > 0 or not 0 < fraction < 1:
        raise GrokkitError(f"expected cap > 0 and 0 < fraction < 1, found {cap} and {fraction}")
    counted = jnp.asarray(_counted(scores, queries))[:, None, :, None]
    visible = jnp.isfinite(scores) & counted
    near = visible & (jnp.abs(scores) > fraction * cap)

    def count(hits: Array) -> Array:
        return jnp.sum(hits.astype(jnp.float32), axis=(-4, -2, -1))

    return count(near) / jnp.maximum(count(visible), 1)


def _repeats(tokens: Int[AnyArray, "batch position"]) -> np.ndarray:
    """[batch, query, key]: whether the key is an earlier occurrence of the query's token."""
    tokens = np.asarray(tokens)
    n = tokens.shape[-1]
    return (tokens[:, :, None] == tokens[:, None, :]) & np.tri(n, n, -1, dtype=bool)


def _counted(pattern: Array | np.ndarray, queries: Queries) -> np.ndarray:
    batch, n = pattern.shape[-4], pattern.shape[-2]
    return np.ones((batch, n), bool) if queries is None else np.asarray(queries)


def _mass_on(pattern: Array | np.ndarray, target: np.ndarray, queries: Queries, what: str) -> Array:
    """Mean attention to the target keys [batch, query, key], over queries that have any."""
    if target.shape != (pattern.shape[-4], *pattern.shape[-2:]):
        raise GrokkitError(
            f"tokens: expected one for each of the pattern's {pattern.shape[-4]} x "
            f"{pattern.shape[-1]} keys and as many queries, found "
            f"{target.shape[0]} x {target.shape[-1]}; the pattern has {pattern.shape[-2]} queries"
        )
    counted = _counted(pattern, queries) & target.any(axis=-1)
    if not counted.any():
        raise GrokkitError(f"no counted query has {what}")
    mass = jnp.sum(jnp.where(jnp.asarray(target)[:, None], pattern, 0), axis=-1)
    return _mean(mass, counted)


def _mean(
    values: Float[Array, "*lead batch head query"], counted: np.ndarray
) -> Float[Array, "*lead head"]:
    """Mean over the counted queries of all sequences."""
    kept = jnp.where(jnp.asarray(counted)[:, None], values, 0)
    total = float(counted.sum())
    return jnp.sum(kept, axis=(-3, -1)) / (total if total else float("nan"))
