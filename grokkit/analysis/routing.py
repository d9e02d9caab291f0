"""How a router spreads tokens over experts: functions of the captured choices and probabilities.

Arrays are the captures `expert_indices` [layer, batch, position, choice] and `router_probs`
[layer, batch, position, expert] as numpy. Except where order matters, functions take the tokens
of all sequences on one axis, [layer, token, ...], as `flatten_tokens` makes them, pads left out;
any axes, or none, may stand before `token`. In the definitions E is the number of experts, k the
number chosen for a token, and N_i the number of tokens whose choices hold expert i.

`grokkit.analysis.statistics` has the nulls to hold each number against.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from grokkit.errors import GrokkitError


def flatten_tokens(
    values: Shaped[np.ndarray, "layer batch position *rest"],
    mask: Bool[np.ndarray, "batch position"] | None = None,
) -> Shaped[np.ndarray, "layer token *rest"]:
    """All sequences' tokens on one axis, in order.

    **Arguments:**

    - `values`: a capture from all layers.
    - `mask`: which positions are real; all by default.
    """
    if mask is None:
        mask = np.ones(values.shape[1:3], bool)
    if not mask.any():
        raise GrokkitError("mask: no position is selected")
    return values[:, mask]


def expert_use(
    experts: Int[np.ndarray, "*lead token choice"], n_experts: int
) -> Bool[np.ndarray, "*lead token expert"]:
    """Whether each expert is among a token's choices.

    **Raises:** `GrokkitError` for an expert that does not exist.
    """
    if experts.size == 0:
        raise GrokkitError("experts: expected at least one token, found none")
    if experts.min() < 0 or experts.max() >= n_experts:
        raise GrokkitError(f"experts: expected numbers from 0 to {n_experts - 1}, found "
                           f"{experts.min()} to {experts.max()}")  # fmt: skip
    use = np.zeros((*experts.shape[:-1], n_experts), bool)
    np.put_along_axis(use, experts, True, axis=-1)
    return use


# Load


def expert_load(
    experts: Int[np.ndarray, "*lead token choice"], n_experts: int
) -> Float[np.ndarray, "*lead expert"]:
    """Each expert's share of all choices: N_i / (k N). Sums to 1; 1/E if even."""
    return expert_use(experts, n_experts).mean(axis=-2) / experts.shape[-1]


def entropy(p: Float[np.ndarray, "*lead n"]) -> Float[np.ndarray, "*lead"]:
    """Shannon entropy over the last axis, in nats: of a router's distribution or of a load.

    At most ln E, for an even distribution.
    """
    safe = np.where(p > 0, p, 1)
    return np.asarray(-np.sum(p * np.log(safe), axis=-1))


def load_variation(load: Float[np.ndarray, "*lead expert"]) -> Float[np.ndarray, "*lead"]:
    """Imbalance as the coefficient of variation: the load's standard deviation over its mean.

    0 if even, sqrt(E - 1) if one expert takes all. Shazeer et al. (arXiv 1701.06538, section 4)
    train against its square.
    """
    return np.asarray(load.std(axis=-1) / load.mean(axis=-1))


def load_peak(load: Float[np.ndarray, "*lead expert"]) -> Float[np.ndarray, "*lead"]:
    """Imbalance as the largest load over the mean: 1 if even, E if one expert takes all.

    How much longer the fullest device works than it would under an even load; Shazeer et al.,
    arXiv 1701.06538, appendix A.
    """
    return np.asarray(load.max(axis=-1) / load.mean(axis=-1))


@dataclasses.dataclass(frozen=True)
class Margin:
    """How close a token's last chosen expert was to losing its place."""

    prob: Float[np.ndarray, "*lead token"]
    """Probability of choice k less that of choice k + 1."""
    log_prob: Float[np.ndarray, "*lead token"]
    """The same of log-probabilities: the gap between the two router logits."""


def router_margin(probs: Float[np.ndarray, "*lead token expert"], n_chosen: int) -> Margin:
    """The gap between the least probable chosen expert and the most probable other one.

    **Arguments:**

    - `probs`: the router's softmax over all experts.
    - `n_chosen`: k, fewer than there are experts.
    """
    n_experts = probs.shape[-1]
    if not 1 <= n_chosen < n_experts:
        raise GrokkitError(f"n_chosen must be from 1 to {n_experts - 1}, found {n_chosen}")
    ordered = np.sort(probs, axis=-1)[..., ::-1]
    inside, outside = ordered[..., n_chosen - 1], ordered[..., n_chosen]
    with np.errstate(divide="ignore"):
        return Margin(inside - outside, np.log(inside) - np.log(outside))


# Experts together


def coactivation(
    experts: Int[np.ndarray, "*lead token choice"], n_experts: int
) -> Float[np.ndarray, "*lead expert expert"]:
    """Share of expert i's tokens that expert j gets too: N_ij / N_i, zero on the diagonal.

    OLMoE's definition (arXiv 2409.02060, section 5). Rows sum to k - 1; NaN for an expert that
    is never used.
    """
    counts = pair_counts(experts, n_experts)
    used = expert_use(experts, n_experts).sum(axis=-2)
    return counts / np.where(used > 0, used, np.nan)[..., :, None]


def pair_counts(
    experts: Int[np.ndarray, "*lead token choice"], n_experts: int
) -> Float[np.ndarray, "*lead expert expert"]:
    """Number of tokens that went to both experts of each pair; zero on the diagonal."""
    use = expert_use(experts, n_experts).astype(np.float64)
    counts = np.swapaxes(use, -1, -2) @ use
    return counts * (1 - np.eye(n_experts))


def expected_pair_counts(
    counts: Float[np.ndarray, "*lead expert expert"], tolerance: float = 1e-9
) -> Float[np.ndarray, "*lead expert expert"]:
    """Pair counts under chance, given how often each expert is used.

    Quasi-independence (Goodman, 1968): the table a_i a_j off the diagonal that has the observed
    row sums, found by iterative proportional fitting. No expert can go with itself, so the plain
    product of the loads would be wrong.

    **Raises:** `GrokkitError` if the fit does not converge: one expert is in nearly every pair.
    """
    off = 1 - np.eye(counts.shape[-1])
    target = counts.sum(axis=-1)
    a = np.sqrt(target)
    for _ in range(10_000):
        found = a * (off @ a[..., None])[..., 0]
        # Half a step in the logarithm: rows and columns share the factors.
        a = a * np.sqrt(np.where(found > 0, target / np.where(found > 0, found, 1), 0))
        if np.all(np.abs(found - target) <= tolerance * np.maximum(target, 1)):
            return a[..., :, None] * a[..., None, :] * off
    raise GrokkitError("expected_pair_counts: no table of independent pairs has these sums; one "
                       "expert is in nearly every pair")  # fmt: skip


def transitions(
    experts: Int[np.ndarray, "layer token choice"], n_experts: int
) -> Float[np.ndarray, "transition expert expert"]:
    """Where tokens go in the next layer, given where they went in this one.

    Entry [l, i, j] is the share of expert j among the choices in layer l + 1 of the tokens that
    went to expert i in layer l. Rows sum to 1; without any relation every row is layer l + 1's
    load. NaN for an expert that is never used.
    """
    joint = _joint_counts(experts, n_experts)
    total = joint.sum(axis=-1, keepdims=True)
    return joint / np.where(total > 0, total, np.nan)


def transition_information(
    experts: Int[np.ndarray, "layer token choice"], n_experts: int
) -> Float[np.ndarray, " transition"]:
    """How much a choice in one layer tells about one in the next, in nats.

    Mutual information of the table of (choice in layer l, choice in layer l + 1), over all k * k
    combinations a token. Above 0 even by chance in a finite sample: compare with a null.
    """
    joint = _joint_counts(experts, n_experts)
    p = joint / joint.sum(axis=(-1, -2), keepdims=True)
    product = p.sum(axis=-1, keepdims=True) * p.sum(axis=-2, keepdims=True)
    ratio = np.where(p > 0, p / np.where(product > 0, product, 1), 1)
    return np.sum(p * np.log(ratio), axis=(-1, -2))


def _joint_counts(experts: np.ndarray, n_experts: int) -> np.ndarray:
    if len(experts) < 2:
        raise GrokkitError(f"transitions need at least two layers, found {len(experts)}")
    use = expert_use(experts, n_experts).astype(np.float64)
    return np.swapaxes(use[:-1], -1, -2) @ use[1:]


# Experts of neighbouring tokens


def neighbours(mask: Bool[np.ndarray, "batch position"]) -> Int[np.ndarray, "pair 2"]:
    """Each token and the next of its sequence, as indices into `flatten_tokens`' token axis."""
    index = np.full(mask.shape, -1, np.int64)
    index[mask] = np.arange(mask.sum())
    both = mask[:, :-1] & mask[:, 1:]
    return np.stack([index[:, :-1][both], index[:, 1:][both]], axis=1)


@dataclasses.dataclass(frozen=True)
class Repetition:
    """How often the next token goes where this one went."""

    first: Float[np.ndarray, "*lead"] | float
    """Share of next tokens with the same first choice."""
    any: Float[np.ndarray, "*lead"] | float
    """Share of next tokens with at least one expert in common."""


def repetition(
    experts: Int[np.ndarray, "*lead token choice"], pairs: Int[np.ndarray, "pair 2"]
) -> Repetition:
    """Repetition of a token's experts by the next token.

    As in Mixtral's table 5 (arXiv 2401.04088), "first choice" and "first or second choice".

    **Arguments:**

    - `experts`: choices, most probable first.
    - `pairs`: neighbouring tokens, from `neighbours`.
    """
    if len(pairs) == 0:
        raise GrokkitError("pairs: expected at least one token with a next one, found none")
    a, b = experts[..., pairs[:, 0], :], experts[..., pairs[:, 1], :]
    shared = (a[..., :, None] == b[..., None, :]).any(axis=(-1, -2))
    return Repetition((a[..., 0] == b[..., 0]).mean(axis=-1), shared.mean(axis=-1))


def repetition_chance(n_experts: int, n_chosen: int) -> Repetition:
    """Repetition if choices were drawn evenly: 1/E, and 1 - C(E - k, k) / C(E, k).

    For 8 experts and 2 choices 1/8 and 1 - (6/8)(5/7), about .464.
    """
    if not 1 <= n_chosen <= n_experts:
        raise GrokkitError(f"n_chosen must be from 1 to {n_experts}, found {n_chosen}")
    none = math.comb(n_experts - n_chosen, n_chosen) / math.comb(n_experts, n_chosen)
    return Repetition(1 / n_experts, 1 - none)
