"""Figures of attention hold the patterns they were given, and are fit to show."""

import numpy as np
import pytest
from figures import assert_fit_to_show, visible_axes

from grokkit import plots


def patterns(rng, n_heads: int, n: int) -> np.ndarray:
    scores = np.where(np.tri(n, dtype=bool), rng.normal(size=(n_heads, n, n)), -np.inf)
    weights = np.exp(scores)
    return weights / weights.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("n", [1, 12, 64, 150])
def test_attention_pattern(rng, n):
    pattern = patterns(rng, 1, n)[0]
    tokens = [[" word", "\n", "ing"][i % 3] for i in range(n)]
    figure = plots.attention_pattern(tokens, pattern)
    assert_fit_to_show(figure)
    drawn = np.ma.filled(figure.axes[0].images[0].get_array(), np.nan)
    past = np.tri(n, dtype=bool)
    np.testing.assert_allclose(drawn[past], pattern[past])
    assert np.isnan(drawn[~past]).all()
    for labels in (figure.axes[0].get_xticklabels(), figure.axes[0].get_yticklabels()):
        assert labels[0].get_text() == "␣word"


@pytest.mark.parametrize(("n_heads", "n"), [(8, 12), (48, 64), (1, 3)])
def test_attention_heads(rng, n_heads, n):
    given = patterns(rng, n_heads, n)
    figure = plots.attention_heads(given, "layer 4")
    assert_fit_to_show(figure)
    grid = visible_axes(figure)[:n_heads]
    assert [axes.get_title() for axes in grid] == [f"head {i}" for i in range(n_heads)]
    past = np.tri(n, dtype=bool)
    for axes, pattern in zip(grid, given, strict=True):
        np.testing.assert_allclose(axes.images[0].get_array()[past], pattern[past])
        assert axes.images[0].get_clim() == (0, 1)  # one scale for all


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.attention_pattern(["a"], np.ones((1, 1, 1))), r"axes \[query, key\]"),
        (lambda: plots.attention_pattern(["a"], np.ones((2, 2))), "expected 2 token labels"),
        (lambda: plots.attention_pattern(["a", "b"], np.ones((2, 3))), "as many queries as keys"),
        (lambda: plots.attention_heads(np.ones((2, 2))), r"axes \[head, query, key\]"),
        (lambda: plots.attention_heads(np.ones((0, 2, 2))), "none of them empty"),
        (lambda: plots.attention_heads(np.ones((2, 2, 2)), heads=["a"]), "expected 2 names"),
    ],
)
def test_what_does_not_fit_is_refused(unchecked, call, message):
    with pytest.raises(ValueError, match=message):
        call()
