"""Figures of interventions hold the effects they were given, and are fit to show."""

import numpy as np
import pytest
from figures import assert_fit_to_show
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex

from grokkit import plots


@pytest.mark.parametrize("n_layers", [8, 64])
@pytest.mark.parametrize(("axis", "n"), [("position", 12), ("position", 64), ("head", 48),
                                         ("expert", 8)])  # fmt: skip
def test_patching_map(rng, n_layers, axis, n):
    values = rng.normal(size=(n_layers, n)).astype(np.float32)
    values[1, 2] = 5.0
    tokens = [[" word", "\n", "ing"][i % 3] for i in range(n)] if axis == "position" else None
    figure = plots.patching_map(values, axis, tokens)
    assert_fit_to_show(figure)
    image = figure.axes[0].images[0]
    np.testing.assert_allclose(image.get_array(), values)
    assert image.get_clim() == (-5, 5)  # white is no effect
    assert image.origin == "lower"


@pytest.mark.parametrize("n_layers", [8, 64])
def test_causal_versus_observed(rng, n_layers):
    use = rng.uniform(size=(n_layers, 5, 8))
    harm = 0.2 * use**2 + rng.normal(0, 0.03, use.shape)
    harm[0, 0, 0] = np.nan
    figure = plots.causal_versus_observed(
        use, harm, "share served", "harm (nats a token)", (harm - 0.02, harm + 0.02)
    )
    assert_fit_to_show(figure)
    points = [c for c in figure.axes[0].collections if len(c.get_offsets()) > 1]
    assert [len(p.get_offsets()) for p in points] == [5 * n_layers - 1, *[5 * n_layers] * 7]
    for expert, shown in enumerate(points):
        assert to_hex(shown.get_facecolors()[0]).upper() == plots.EXPERT_COLOURS[expert]
    whiskers = [c for c in figure.axes[0].collections if isinstance(c, LineCollection)]
    assert len(whiskers) == 8 and all(w.get_zorder() < points[0].get_zorder() for w in whiskers)
    faint = 0.06 if n_layers == 64 else 0.4  # so many whiskers would hide each other
    assert {w.get_alpha() for w in whiskers} == {faint}
    np.testing.assert_allclose(points[3].get_offsets()[:, 0], use[..., 3].ravel())
    np.testing.assert_allclose(points[3].get_offsets()[:, 1], harm[..., 3].ravel())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.patching_map(np.ones(3)), r"axes \[layer, position\]"),
        (lambda: plots.patching_map(np.ones((2, 3)), "position", ["a"]), "expected 3 token labels"),
        (lambda: plots.patching_map(np.ones((2, 3)), "head", ["a"] * 3), "the columns are heads"),
        (lambda: plots.causal_versus_observed(np.ones((2, 8)), np.ones((8, 2)), "", ""),
         r"one shape, experts last, found \(2, 8\) and \(8, 2\)"),
        (lambda: plots.causal_versus_observed(np.ones(8), np.full(8, np.nan), "", ""),
         "at least one case"),
        (lambda: plots.causal_versus_observed(np.ones(8), np.ones(8), "", "", (1, np.ones(8))),
         "interval: expected two arrays"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(unchecked, call, message):
    with pytest.raises(ValueError, match=message):
        call()
