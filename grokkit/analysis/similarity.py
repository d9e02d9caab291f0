"""How alike a layer's experts and the rows of its gate are, from their weights alone.

Measures of "A Closer Look into Mixture-of-Experts in Large Language Models", arXiv 2406.18219.
Matrices are float arrays of one layer; `grokkit.quant.dequantize` makes them of 8-bit ones.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment

from grokkit.analysis.statistics import Null
from grokkit.errors import GrokkitError


def cosine_similarity(rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n n"]:
    """Cosine between every two rows. **Raises:** `GrokkitError` for a row of zeros."""
    unit = _unit(rows)
    return unit @ unit.T


def gate_similarity(router: Float[np.ndarray, "d_model expert"]) -> Float[np.ndarray, "e e"]:
    """Cosine between the gate vectors of every two experts.

    **Arguments:**

    - `router`: one layer's router, whose columns are the experts' vectors (rows of the paper's
        gate matrix).
    """
    return cosine_similarity(router.T)


def matrix_similarity(matrices: Float[np.ndarray, "expert k n"]) -> Float[np.ndarray, "e e"]:
    """Cosine between experts' flattened matrices.

    Depends on the order of hidden units, which means nothing; see `neuron_similarity`.
    """
    return cosine_similarity(matrices.reshape(len(matrices), -1))


def mean_neuron_similarity(
    matrices: Float[np.ndarray, "expert d_model d_ff"],
) -> Float[np.ndarray, "e e"]:
    """Cosine between the means of experts' neurons (the paper's averaging)."""
    return cosine_similarity(matrices.mean(axis=-1))


def neuron_similarity(
    matrices: Float[np.ndarray, "expert d_model d_ff"],
) -> Float[np.ndarray, "e e"]:
    """Mean cosine of experts' neurons under the best matching (the paper's reordering).

    The neurons of two experts are paired so that the sum of cosines is largest
    (Jonker-Volgenant). Positive by chance, since the best of many is taken: compare with
    `similarity_null`.

    **Arguments:**

    - `matrices`: one layer's gate or value matrices, a neuron a column; transpose the output
        matrices, whose rows are neurons.
    """
    units = [_unit(m.T) for m in matrices]
    n = len(units)
    similarity = np.eye(n)
    for i in range(n):
        for j in range(i):
            cosines = units[i] @ units[j].T
            similarity[i, j] = similarity[j, i] = cosines[linear_sum_assignment(-cosines)].mean()
    return similarity


def off_diagonal(similarity: Float[np.ndarray, "n n"]) -> Float[np.ndarray, " pair"]:
    """The entries above the diagonal: one a pair."""
    return similarity[np.triu_indices(len(similarity), 1)]


def similarity_null(
    measure: Callable[[np.ndarray], np.ndarray],
    matrices: Float[np.ndarray, "expert d_model n"],
    rng: np.random.Generator,
    samples: int = 99,
) -> Null:
    """Mean similarity of pairs, against experts whose input coordinates are shuffled.

    Each expert gets its own order of d_model, which keeps its norms, its entries' distribution
    and the relations of its neurons among themselves, and takes away what aligns it with others.

    **Arguments:**

    - `measure`: from matrices to a similarity of every two experts, as the functions above.
    - `matrices`: one layer's.
    - `rng`: source of the orders.
    - `samples`: number of shuffles.
    """
    if samples < 1:
        raise GrokkitError(f"expected at least one shuffle, found {samples}")

    def shuffled() -> np.ndarray:
        return np.stack([m[rng.permutation(len(m))] for m in matrices])

    observed = off_diagonal(measure(matrices)).mean()
    null = [off_diagonal(measure(shuffled())).mean() for _ in range(samples)]
    return Null(np.asarray(observed), np.asarray(null))


def _unit(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    if not (norms > 0).all():
        raise GrokkitError(f"row {int(np.argmin(norms))} is zero, so it has no direction")
    return rows / norms
