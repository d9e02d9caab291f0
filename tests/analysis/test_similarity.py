"""Similarity of experts from weights: what is known by construction."""

from itertools import permutations

import numpy as np
import pytest

from grokkit.analysis.similarity import (
    cosine_similarity,
    gate_similarity,
    matrix_similarity,
    mean_neuron_similarity,
    neuron_similarity,
    off_diagonal,
    similarity_null,
)
from grokkit.errors import GrokkitError

RNG = np.random.default_rng(0)


def test_cosines_by_hand():
    found = cosine_similarity(np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]]))
    half = 1 / np.sqrt(2)
    np.testing.assert_allclose(found, [[1, 0, half], [0, 1, half], [half, half, 1]], atol=1e-12)
    np.testing.assert_allclose(off_diagonal(found), [0, half, half], atol=1e-12)
    router = np.array([[1.0, 0.0], [0.0, 5.0]])
    np.testing.assert_allclose(gate_similarity(router), np.eye(2))
    with pytest.raises(GrokkitError, match="row 1 is zero"):
        cosine_similarity(np.array([[1.0], [0.0]]))


def test_reordered_neurons_are_found_again():
    first = RNG.normal(size=(16, 24))
    reordered = first[:, RNG.permutation(24)]
    other = RNG.normal(size=(16, 24))
    matrices = np.stack([first, reordered, other])
    neurons = neuron_similarity(matrices)
    assert neurons[0, 1] == pytest.approx(1) and neurons[0, 2] < 0.6
    assert matrix_similarity(matrices)[0, 1] < 0.5
    assert mean_neuron_similarity(matrices)[0, 1] == pytest.approx(1)
    np.testing.assert_allclose(neurons, neurons.T)


def test_the_matching_is_the_best_of_all():
    matrices = RNG.normal(size=(2, 5, 3))
    units = matrices / np.linalg.norm(matrices, axis=1, keepdims=True)
    cosines = units[0].T @ units[1]
    best = max(np.mean([cosines[i, p[i]] for i in range(3)]) for p in permutations(range(3)))
    assert neuron_similarity(matrices)[0, 1] == pytest.approx(best)


def test_null_is_at_chance_for_random_experts_and_beaten_by_related_ones():
    rng = np.random.default_rng(1)
    p = [
        similarity_null(neuron_similarity, rng.normal(size=(3, 12, 8)), rng, samples=19).p_value
        for _ in range(40)
    ]
    assert 0.3 < np.mean(np.array(p) <= 0.5) < 0.7
    common = rng.normal(size=(1, 12, 8))
    related = common + 0.5 * rng.normal(size=(3, 12, 8))
    null = similarity_null(neuron_similarity, related, rng, samples=19)
    assert null.p_value == 1 / 20 and null.observed > null.mean + 0.2
    with pytest.raises(GrokkitError, match="at least one shuffle"):
        similarity_null(neuron_similarity, related, rng, samples=0)
