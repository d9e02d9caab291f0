"""Routing statistics against hand-computed cases and plain loops over tokens."""

import math

import numpy as np
import pytest

from grokkit.analysis.routing import (
    coactivation,
    entropy,
    expected_pair_counts,
    expert_load,
    expert_use,
    flatten_tokens,
    load_peak,
    load_variation,
    neighbours,
    pair_counts,
    repetition,
    repetition_chance,
    router_margin,
    transition_information,
    transitions,
)
from grokkit.errors import GrokkitError

E = 4
BY_HAND = np.array([[0, 1], [0, 2], [1, 0], [3, 0]])
"""Four tokens, two choices: expert 0 in every token, 1 in two, 2 and 3 in one."""


def random_choices(rng, *shape, n_experts=8, k=2):
    return np.argsort(rng.random((*shape, n_experts)), axis=-1)[..., :k]


def test_flattening_leaves_pads_out_and_keeps_order():
    values = np.arange(2 * 2 * 3).reshape(2, 2, 3)
    mask = np.array([[True, True, False], [True, True, True]])
    assert flatten_tokens(values, mask).tolist() == [[0, 1, 3, 4, 5], [6, 7, 9, 10, 11]]
    assert flatten_tokens(values[..., None]).shape == (2, 6, 1)
    with pytest.raises(GrokkitError, match="no position"):
        flatten_tokens(values, np.zeros((2, 3), bool))


def test_load_by_hand():
    load = expert_load(BY_HAND, E)
    assert load.tolist() == [4 / 8, 2 / 8, 1 / 8, 1 / 8]
    assert entropy(load) == pytest.approx(1.75 * math.log(2))
    assert load_peak(load) == 2
    assert load_variation(load) == pytest.approx(math.sqrt(0.0234375) / 0.25)
    even, single = np.full(8, 1 / 8), np.eye(8)[3]
    assert entropy(even) == pytest.approx(math.log(8)) and entropy(single) == 0
    assert load_variation(single) == pytest.approx(math.sqrt(7)) and load_peak(single) == 8
    assert load_variation(even) == 0 and load_peak(even) == 1


def test_margin_by_hand():
    probs = np.array([[0.1, 0.5, 0.15, 0.25], [0.25, 0.25, 0.25, 0.25]])
    margin = router_margin(probs, 2)
    np.testing.assert_allclose(margin.prob, [0.1, 0])
    np.testing.assert_allclose(margin.log_prob, [math.log(0.25 / 0.15), 0], atol=1e-15)
    logits = np.array([1.0, -2.0, 0.5, 3.0])
    softmax = np.exp(logits) / np.exp(logits).sum()
    assert router_margin(softmax[None], 2).log_prob[0] == pytest.approx(1.0 - 0.5)
    with pytest.raises(GrokkitError, match="from 1 to 3"):
        router_margin(probs, 4)


def test_coactivation_by_hand_and_by_loop():
    by_hand = coactivation(BY_HAND, E)
    assert by_hand[0].tolist() == [0, 2 / 4, 1 / 4, 1 / 4]
    assert by_hand[1].tolist() == [1, 0, 0, 0]
    experts = random_choices(np.random.default_rng(0), 3, 50, k=3)
    found = coactivation(experts, 8)
    counts = np.zeros((3, 8, 8))
    for layer in range(3):
        for token in experts[layer]:
            for i in token:
                for j in token:
                    counts[layer, i, j] += i != j
    np.testing.assert_array_equal(pair_counts(experts, 8), counts)
    used = np.array([[(layer == e).any(axis=-1).sum() for e in range(8)] for layer in experts])
    np.testing.assert_allclose(found, counts / used[..., None])
    np.testing.assert_allclose(found.sum(axis=-1), 2)
    assert np.isnan(coactivation(BY_HAND[:1], E)[3]).all()


def test_expected_pairs_have_the_loads_and_no_other_structure():
    # Pairs drawn independently apart from being different: the expectation is the truth.
    a = np.array([0.4, 0.3, 0.2, 0.5, 0.6])
    table = np.outer(a, a) * (1 - np.eye(5))
    np.testing.assert_allclose(expected_pair_counts(table), table, rtol=1e-6)
    structured = table.copy()
    structured[0, 1] = structured[1, 0] = 1.0
    fitted = expected_pair_counts(structured)
    np.testing.assert_allclose(fitted.sum(axis=1), structured.sum(axis=1), rtol=1e-6)
    assert fitted[0, 1] < structured[0, 1]
    with pytest.raises(GrokkitError, match="nearly every pair"):
        expected_pair_counts(pair_counts(BY_HAND, E))


def test_transitions_by_loop():
    experts = random_choices(np.random.default_rng(1), 3, 60)
    counts = np.zeros((2, 8, 8))
    for layer in range(2):
        for before, after in zip(experts[layer], experts[layer + 1], strict=True):
            for i in before:
                for j in after:
                    counts[layer, i, j] += 1
    expected = counts / counts.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(transitions(experts, 8), expected)
    information = np.zeros(2)
    for layer in range(2):
        p = counts[layer] / counts[layer].sum()
        for i in range(8):
            for j in range(8):
                if p[i, j]:
                    information[layer] += p[i, j] * math.log(p[i, j] / p[i].sum() / p[:, j].sum())
    np.testing.assert_allclose(transition_information(experts, 8), information)
    with pytest.raises(GrokkitError, match="at least two layers"):
        transitions(experts[:1], 8)


def test_transition_information_of_a_copied_and_of_an_independent_layer():
    rng = np.random.default_rng(2)
    first = rng.integers(0, 8, (1, 20_000, 1))
    copied = np.concatenate([first, first, rng.integers(0, 8, first.shape)])
    same, independent = transition_information(copied, 8)
    assert same == pytest.approx(math.log(8), abs=0.01)
    assert independent == pytest.approx(49 / 2 / 20_000, abs=0.002)  # its bias, (E-1)^2 / 2N


def test_repetition_by_hand_and_within_sequences_only():
    mask = np.array([[True, True, True, False], [True, True, False, False]])
    pairs = neighbours(mask)
    assert pairs.tolist() == [[0, 1], [1, 2], [3, 4]]
    experts = np.array([[[0, 1], [0, 2], [2, 0], [5, 6], [7, 4]]])
    found = repetition(experts, pairs)
    assert found.first.tolist() == [1 / 3] and found.any.tolist() == [2 / 3]
    with pytest.raises(GrokkitError, match="at least one token"):
        repetition(experts, pairs[:0])


def test_repetition_of_random_choices_is_at_chance():
    chance = repetition_chance(8, 2)
    assert chance.first == 1 / 8
    assert chance.any == pytest.approx(1 - (6 / 8) * (5 / 7))
    assert repetition_chance(4, 3).any == 1
    assert repetition_chance(6, 1).any == pytest.approx(1 / 6)
    experts = random_choices(np.random.default_rng(3), 40_000)
    found = repetition(experts, neighbours(np.ones((1, 40_000), bool)))
    assert found.first == pytest.approx(chance.first, abs=0.006)
    assert found.any == pytest.approx(chance.any, abs=0.01)
    with pytest.raises(GrokkitError, match="from 1 to 4"):
        repetition_chance(4, 5)


def test_experts_that_do_not_exist_are_refused():
    assert expert_use(BY_HAND, E).sum() == 8
    with pytest.raises(GrokkitError, match="from 0 to 2, found 0 to 3"):
        expert_use(BY_HAND, 3)
    with pytest.raises(GrokkitError, match="at least one token"):
        expert_load(BY_HAND[:0], E)
