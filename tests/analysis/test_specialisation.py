"""OLMoE's specialisations against loops over tokens."""

import numpy as np
import pytest

from grokkit.analysis.specialisation import (
    domain_distance,
    domain_specialisation,
    vocabulary_specialisation,
)
from grokkit.errors import GrokkitError


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    experts = np.argsort(rng.random((2, 300, 8)), axis=-1)[..., :2]
    return experts, rng.integers(0, 3, 300), rng.integers(100, 130, 300)


def test_domain_specialisation_by_loop(data):
    experts, domains, _ = data
    found = domain_specialisation(experts, domains, 8, 3)
    expected = np.zeros((2, 3, 8))
    for layer in range(2):
        for d in range(3):
            of = [t for t in range(300) if domains[t] == d]
            for i in range(8):
                expected[layer, d, i] = sum(i in experts[layer, t] for t in of) / len(of)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(found.sum(axis=-1), 2, rtol=1e-6)


def test_domain_distance_by_hand():
    assert domain_distance(np.array([[0.5, 0.5], [0.5, 0.5]])) == 0
    assert domain_distance(np.array([[[1.0, 0.0], [0.0, 1.0]]])).tolist() == [0.5]


def test_vocabulary_specialisation_by_loop(data):
    experts, _, tokens = data
    found = vocabulary_specialisation(experts[..., :1], tokens, 8, min_count=10)
    kept = [x for x in range(100, 130) if (tokens == x).sum() >= 10]
    assert found.ids.tolist() == kept
    for n, x in enumerate(kept):
        assert found.counts[n] == (tokens == x).sum()
        for layer in range(2):
            for i in range(8):
                share = np.mean(experts[layer, tokens == x, 0] == i)
                assert found.shares[layer, n, i] == pytest.approx(share)
    top = [np.mean([found.shares[layer, n].max() for n in range(len(kept))]) for layer in range(2)]
    np.testing.assert_allclose(found.top(), top)


def test_a_token_seen_once_is_always_specialised():
    found = vocabulary_specialisation(np.array([[3], [5]]), np.array([7, 9]), 8)
    assert found.top() == 1


def test_wrong_input_is_refused(data):
    experts, domains, tokens = data
    with pytest.raises(GrokkitError, match=r"\[3\] have no tokens"):
        domain_specialisation(experts, domains, 8, 4)
    with pytest.raises(GrokkitError, match="from 0 to 1"):
        domain_specialisation(experts, domains, 8, 2)
    with pytest.raises(GrokkitError, match="no token occurs 1000 times"):
        vocabulary_specialisation(experts, tokens, 8, min_count=1000)
