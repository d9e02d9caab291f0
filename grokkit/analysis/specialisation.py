"""Which experts serve which domain and which token: OLMoE's definitions, arXiv 2409.02060.

Arrays as in `grokkit.analysis.routing`.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from grokkit.analysis.routing import expert_use
from grokkit.errors import GrokkitError


def domain_specialisation(
    experts: Int[np.ndarray, "*lead token choice"],
    domains: Int[np.ndarray, " token"],
    n_experts: int,
    n_domains: int,
) -> Float[np.ndarray, "*lead domain expert"]:
    """Share of a domain's tokens that each expert serves: N_{i,D} / N_D.

    N_{i,D} counts the tokens of domain D among whose choices expert i is, so that a row sums to
    the number of choices, k, and chance is k / E. Give the first choice only,
    `experts[..., :1]`, for OLMoE's figure with k = 1.

    **Arguments:**

    - `experts`: each token's choices.
    - `domains`: each token's domain, from 0.
    - `n_experts`, `n_domains`: how many there are.

    **Raises:** `GrokkitError` for a domain without tokens or beyond `n_domains`.
    """
    counts = _counts(domains, n_domains)
    use = expert_use(experts, n_experts)
    members = domains == np.arange(n_domains)[:, None]
    return (members.astype(np.float32) @ use.astype(np.float32)) / counts[:, None]


def domain_distance(shares: Float[np.ndarray, "*lead domain expert"]) -> Float[np.ndarray, "*lead"]:
    """How far domains differ in their use of experts.

    The root of the mean, over domains and experts, of the squared distance between a domain's
    share and the mean of all domains'. One number a layer, for a permutation test.
    """
    centred = shares - shares.mean(axis=-2, keepdims=True)
    return np.asarray(np.sqrt((centred**2).mean(axis=(-1, -2))))


def _counts(domains: np.ndarray, n_domains: int) -> np.ndarray:
    if domains.size == 0 or domains.min() < 0 or domains.max() >= n_domains:
        raise GrokkitError(f"domains: expected numbers from 0 to {n_domains - 1}")
    counts = np.bincount(domains, minlength=n_domains)
    if (counts == 0).any():
        raise GrokkitError(f"domains {np.flatnonzero(counts == 0).tolist()} have no tokens")
    return counts


@dataclasses.dataclass(frozen=True)
class VocabularySpecialisation:
    """For each token id that occurs, the share of its occurrences that each expert serves."""

    ids: Int[np.ndarray, " id"]
    counts: Int[np.ndarray, " id"]
    """Occurrences of each id."""
    shares: Float[np.ndarray, "*lead id expert"]

    def top(self) -> Float[np.ndarray, "*lead"]:
        """Mean over token ids of the largest share.

        An id seen once has 1 (with one choice) whatever the router does, so that this is high
        by chance: set `min_count`, and compare with a permutation null.
        """
        return np.asarray(self.shares.max(axis=-1).mean(axis=-1))


def vocabulary_specialisation(
    experts: Int[np.ndarray, "*lead token choice"],
    tokens: Int[np.ndarray, " token"],
    n_experts: int,
    min_count: int = 1,
) -> VocabularySpecialisation:
    """Share of a token id's occurrences that each expert serves: N_{x,i} / N_x.

    Rows sum to the number of choices; OLMoE reports the first choice, `experts[..., :1]`.

    **Arguments:**

    - `experts`: each token's choices.
    - `tokens`: each token's id: of the input token, or of the next one.
    - `n_experts`: how many there are.
    - `min_count`: leave out ids that occur less often.

    **Raises:** `GrokkitError` if no id occurs so often.
    """
    ids, inverse, counts = np.unique(tokens, return_inverse=True, return_counts=True)
    kept = counts >= min_count
    if not kept.any():
        raise GrokkitError(f"min_count: no token occurs {min_count} times; the most frequent "
                           f"one occurs {counts.max(initial=0)} times")  # fmt: skip
    use = expert_use(experts, n_experts)
    lead = use.shape[:-2]
    sums = np.zeros((len(ids), *lead, n_experts))
    np.add.at(sums, inverse, np.moveaxis(use, -2, 0))
    shares = np.moveaxis(sums, 0, -2) / counts[:, None]
    return VocabularySpecialisation(ids[kept], counts[kept], shares[..., kept, :])
