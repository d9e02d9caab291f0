"""Nulls and intervals: hand-computed cases, and how often they are right on random data."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from grokkit.analysis.statistics import (
    Null,
    Resampled,
    bootstrap,
    permutation_null,
    shuffle_within,
    spearman,
)
from grokkit.errors import GrokkitError


def test_p_value_counts_the_observed_one():
    null = Null(np.array([3.0, 0.0]), np.array([[1.0, 1.0], [3.0, 2.0], [2.0, 3.0]]))
    assert null.p_value.tolist() == [2 / 4, 4 / 4]
    assert null.mean.tolist() == [2, 2]
    np.testing.assert_allclose(null.z, [1 / np.sqrt(2 / 3), -2 / np.sqrt(2 / 3)])
    assert np.isnan(Null(np.array(1.0), np.array([2.0, 2.0])).z)


def test_interval_is_central():
    samples = np.arange(101, dtype=float)
    low, high = Resampled(np.array(50.0), samples).interval(0.9)
    np.testing.assert_allclose([low, high], [5, 95])
    with pytest.raises(GrokkitError, match="between 0 and 1"):
        Resampled(np.array(50.0), samples).interval(95.0)


def test_bootstrap_interval_of_a_mean_covers_it_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        values = rng.normal(size=40)
        low, high = bootstrap(lambda i, v=values: v[i].mean(), 40, rng, samples=200).interval(0.9)
        covered += bool(low <= 0 <= high)
    assert 0.84 <= covered / 300 <= 0.95


def test_bootstrap_draws_each_stratum_as_often_as_it_occurs():
    strata = np.array([0, 1, 1, 2, 2, 2])
    counts = bootstrap(
        lambda i: np.bincount(strata[i]), 6, np.random.default_rng(0), strata, samples=20
    )
    assert (counts.samples == [1, 2, 3]).all()
    assert counts.observed.tolist() == [1, 2, 3]


def test_permutation_p_values_are_uniform_where_there_is_nothing():
    rng = np.random.default_rng(1)
    labels = np.repeat([0, 1], 15)
    p = []
    for _ in range(200):
        values = rng.normal(size=30)

        def difference(order, values=values):
            return abs(values[order][labels == 1].mean() - values[order][labels == 0].mean())

        p.append(permutation_null(difference, 30, rng, samples=99).p_value)
    assert 0.02 <= np.mean(np.array(p) <= 0.05) <= 0.09
    assert 0.42 <= np.mean(np.array(p) <= 0.5) <= 0.58


def test_permutation_finds_what_is_there():
    labels = np.repeat([0, 1], 15)
    values = 1.5 * labels + np.random.default_rng(2).normal(size=30)
    null = permutation_null(
        lambda order: values[order][labels == 1].mean(), 30, np.random.default_rng(3)
    )
    assert null.samples.shape == (999,)
    assert null.p_value < 0.01 and null.z > 2


def test_matched_shuffles_stay_within_the_group():
    rng = np.random.default_rng(4)
    groups = rng.integers(0, 5, 200)
    order = shuffle_within(groups, rng)
    assert sorted(order.tolist()) == list(range(200))
    assert (groups[order] == groups).all()
    assert (order != np.arange(200)).mean() > 0.8
    alone = shuffle_within(np.arange(10), rng)
    assert alone.tolist() == list(range(10))


def test_matched_shuffles_of_one_group_are_even():
    rng = np.random.default_rng(5)
    groups = np.array([0, 1, 0, 1, 0])
    orders = [tuple(shuffle_within(groups, rng)[[0, 2, 4]]) for _ in range(1200)]
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 6 and counts.min() > 150 and counts.max() < 250


def test_control_matched_on_the_token_tells_context_from_identity():
    rng = np.random.default_rng(6)
    tokens, domain = rng.integers(0, 20, 3000), rng.integers(0, 2, 3000)
    tokens[domain == 1] = np.minimum(tokens[domain == 1] + 5, 19)
    by_identity = (tokens >= 10).astype(float)
    by_context = np.where(rng.random(3000) < 0.3, domain, by_identity)

    def p_value(values):
        def gap(order):
            return values[order][domain == 1].mean() - values[order][domain == 0].mean()

        free = permutation_null(gap, 3000, rng, samples=99).p_value
        return free, permutation_null(gap, 3000, rng, tokens, samples=99).p_value

    assert p_value(by_identity)[0] == 0.01
    assert p_value(by_identity)[1] == 1.0
    assert p_value(by_context) == (0.01, 0.01)


def test_spearman_is_scipys():
    rng = np.random.default_rng(7)
    x = rng.integers(0, 5, (3, 40)).astype(float)
    y = x + rng.normal(size=(3, 40))
    expected = [spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(spearman(x, y), expected, rtol=1e-12)
    assert spearman(np.array([1.0, 2, 3]), np.array([10.0, 20, 15])) == pytest.approx(0.5)
    assert np.isnan(spearman(np.ones(4), np.arange(4.0)))


def test_wrong_input_is_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(GrokkitError, match="at least two units"):
        bootstrap(lambda i: 0.0, 1, rng)
    with pytest.raises(GrokkitError, match="at least one resample"):
        permutation_null(lambda i: 0.0, 5, rng, samples=0)
    with pytest.raises(GrokkitError, match="one label for each of 5 units"):
        permutation_null(lambda i: 0.0, 5, rng, np.zeros(4, int))
    with pytest.raises(GrokkitError, match="1 NaN"):
        spearman(np.array([1.0, np.nan]), np.array([1.0, 2.0]))
