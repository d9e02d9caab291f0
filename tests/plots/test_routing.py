"""Figures of routing hold what they should, at 8 layers and at 64, and are fit to show."""

import numpy as np
import pytest
from figures import assert_fit_to_show, pixels, visible_axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex, to_rgb
from matplotlib.patches import Rectangle

from grokkit import plots
from grokkit.analysis import routing, specialisation

DOMAINS = ["prose", "verse", "code", "french", "spanish"]


def choices(rng, n_layers: int, n: int) -> np.ndarray:
    """Two experts a token, [layer, token, choice], unevenly, and some alike from layer to layer."""
    logits = rng.normal(size=(n_layers, n, 8)) + rng.normal(size=(n_layers, 1, 8))
    logits[1:] += logits[:-1]
    return np.argsort(-logits, axis=-1)[..., :2]


@pytest.mark.parametrize(("n_layers", "n"), [(8, 20), (64, 64), (1, 1), (2, 150)])
def test_chosen_experts(rng, n_layers, n):
    experts = choices(rng, n_layers, n)
    weights = np.sort(rng.uniform(0.05, 0.6, (n_layers, n, 2)))[..., ::-1]
    tokens = [[" word", "\n", "x", "$", "日"][i % 5] for i in range(n)]
    figure = plots.chosen_experts(tokens, experts, weights)
    assert_fit_to_show(figure)
    drawn = np.asarray(figure.axes[0].images[0].get_array())
    expected = np.array([to_rgb(c) for c in plots.EXPERT_COLOURS])[experts.reshape(n_layers, -1)]
    np.testing.assert_allclose(drawn[..., :3], expected)
    shown = np.argsort(drawn[..., 3], axis=None)
    assert np.array_equal(shown, np.argsort(weights.reshape(n_layers, -1), axis=None))
    labels = [t.get_text() for t in figure.axes[0].get_xticklabels()]
    assert labels[:5] == ["␣word", "\\n", "x", r"\$", r"\u65e5"][:n] or n > 128


def test_a_cell_on_the_page_has_the_experts_colour():
    figure = plots.chosen_experts(["a"], np.array([[[3, 6]]]), np.array([[[0.5, 0.5]]]))
    image = pixels(figure)
    box = figure.axes[0].get_window_extent()
    row = image.shape[0] - int((box.y0 + box.y1) / 2)
    for share, expert in ((0.25, 3), (0.75, 6)):
        seen = image[row, int(box.x0 + share * box.width)]
        assert to_hex(seen / 255).upper() == plots.EXPERT_COLOURS[expert]


@pytest.mark.parametrize("n_layers", [8, 64])
def test_expert_load(rng, n_layers):
    experts = choices(rng, n_layers, 400)
    even = rng.permuted(np.tile(np.arange(8), (99, 400, 1)), axis=-1)[..., :2]
    load = routing.expert_load(experts, 8)
    band = np.quantile(routing.expert_load(even, 8), [0.025, 0.975], axis=0)
    figure = plots.expert_load(load, (band[0], band[1]))
    assert_fit_to_show(figure, ink=0.01)
    bars = [b for axes in figure.axes for b in axes.patches if isinstance(b, Rectangle)]
    coloured = [b for b in bars if to_hex(b.get_facecolor()) != "#c8c8c8"]
    ends = np.array([b.get_y() + b.get_height() for b in coloured]).reshape(n_layers, 8)
    np.testing.assert_allclose(ends, load)
    names = [to_hex(b.get_facecolor()).upper() for b in coloured]
    assert names == list(plots.EXPERT_COLOURS) * n_layers
    grey = [b for b in bars if to_hex(b.get_facecolor()) == "#c8c8c8"]
    low, high = (np.broadcast_to(end, (n_layers, 8)).ravel() for end in band)
    np.testing.assert_allclose([b.get_y() for b in grey], low)
    np.testing.assert_allclose([b.get_y() + b.get_height() for b in grey], high)


@pytest.mark.parametrize("n_layers", [8, 64])
def test_coactivation(rng, n_layers):
    shares = routing.coactivation(choices(rng, n_layers, 400), 8)
    figure = plots.coactivation(shares)
    assert_fit_to_show(figure)
    images = [axes.images[0] for axes in visible_axes(figure)[:n_layers]]
    for image, expected in zip(images, shares, strict=True):
        drawn = np.ma.filled(image.get_array(), np.nan)
        off = ~np.eye(8, dtype=bool)
        np.testing.assert_allclose(drawn[off], expected[off])
        assert np.isnan(np.diag(drawn)).all()
    # White is chance: one other expert of seven.
    assert np.ravel(images[0].norm(1 / 7))[0] == pytest.approx(0.5, abs=0.02)


def test_coactivation_of_one_layer_with_an_expert_never_used(rng):
    experts = choices(rng, 1, 50)[0]
    shares = routing.coactivation(np.where(experts == 5, 4, experts), 8)
    shares[5] = np.nan
    assert_fit_to_show(plots.coactivation(shares))


@pytest.mark.parametrize("n_layers", [8, 64])
def test_domain_specialisation(rng, n_layers):
    experts = choices(rng, n_layers, 400)
    shares = specialisation.domain_specialisation(experts, np.arange(400) % 5, 8, 5)
    significant = shares > 0.4
    figure = plots.domain_specialisation(shares, DOMAINS, significant)
    assert_fit_to_show(figure)
    for layer, axes in enumerate(visible_axes(figure)[:n_layers]):
        np.testing.assert_allclose(axes.images[0].get_array(), shares[layer])
        outlines = {(int(p.get_y() + 0.5), int(p.get_x() + 0.5)) for p in axes.patches}
        assert outlines == {(int(a), int(b)) for a, b in np.argwhere(significant[layer])}
    texts = [t.get_text() for t in figure.axes[0].texts]
    expected = [f"{100 * share:.0f}" for share in shares[0].ravel()] if n_layers == 8 else []
    assert texts == expected


@pytest.mark.parametrize("n_layers", [2, 8, 64])
def test_transitions(rng, n_layers):
    experts = choices(rng, n_layers, 400)
    load = routing.expert_load(experts, 8)
    shares = routing.transitions(experts, 8)
    figure = plots.transitions(shares, load)
    assert_fit_to_show(figure)
    flows = next(c for c in figure.axes[0].collections if isinstance(c, PolyCollection))
    colours = [to_hex(c) for c in flows.get_facecolors()]
    heights = np.array([np.ptp(p.vertices[:17, 1] - p.vertices[17:34, 1][::-1])
                        for p in flows.get_paths()])  # fmt: skip
    np.testing.assert_allclose(heights, 0, atol=1e-9)  # a ribbon is as wide all along
    # Ribbons that leave an expert have its colour and together its load.
    leaving = [p.vertices[0, 1] - p.vertices[33, 1] for p in flows.get_paths()]
    for expert, colour in enumerate(plots.EXPERT_COLOURS):
        sizes = [s for s, c in zip(leaving, colours, strict=True) if c.upper() == colour]
        assert any(sizes) == (load[0, expert] > 0)
    assert sum(leaving) <= sum(load[0]) * len(figure.axes[0].collections) + 1e-6


def test_a_flow_is_as_wide_as_its_share_and_bold_beyond_chance():
    load = np.array([[0.5, 0.5], [0.5, 0.5]])
    shares = np.array([[[1.0, 0.0], [0.0, 1.0]]])  # every token keeps its expert
    flows = plots.transitions(shares, load).axes[0].collections[0]
    widths = [path.vertices[0, 1] - path.vertices[33, 1] for path in flows.get_paths()]
    np.testing.assert_allclose(widths, [0.5, 0.5])
    assert flows.get_facecolors()[:, 3].min() > 0.7
    shares = np.full((1, 2, 2), 0.5)  # what comes next does not depend on what was
    flows = plots.transitions(shares, load).axes[0].collections[0]
    assert flows.get_facecolors()[:, 3].max() < 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.chosen_experts(["a"], np.zeros((2, 3, 2), int), np.ones((2, 3, 2))),
         "expected 3 token labels"),
        (lambda: plots.chosen_experts(["a"], np.full((1, 1, 2), 9), np.ones((1, 1, 2))),
         "at most 8 experts"),
        (lambda: plots.chosen_experts(["a"], np.zeros((1, 2), int), np.ones((1, 2))),
         r"expected axes \[layer, position, choice\], found shape \(1, 2\)"),
        (lambda: plots.chosen_experts(["a"], np.zeros((1, 1, 2), int), np.ones((1, 1, 1))),
         r"weights: expected shape \(1, 1, 2\)"),
        (lambda: plots.expert_load(np.ones(8)), r"axes \[layer, expert\]"),
        (lambda: plots.expert_load(np.ones((2, 9)) / 9), "at most 8 experts"),
        (lambda: plots.expert_load(np.ones((2, 8)) / 8, (np.ones(3), np.ones(3))),
         r"band: expected two arrays that broadcast to \[layer, expert\] = \(2, 8\)"),
        (lambda: plots.coactivation(np.ones((2, 8, 7))), "as many rows as columns"),
        (lambda: plots.coactivation(np.zeros((8, 8))), "at least two choices"),
        (lambda: plots.domain_specialisation(np.ones((2, 3, 8)), ["a"]), "expected 3 names"),
        (lambda: plots.domain_specialisation(np.ones((1, 8)), ["a"], np.ones((2, 8), bool)),
         r"significant: expected shape \(1, 8\)"),
        (lambda: plots.transitions(np.ones((1, 8, 8)) / 8, np.ones((1, 8)) / 8), "one layer more"),
        (lambda: plots.transitions(np.ones((1, 2, 2)) / 2, np.array([[0.5, 0.5], [0.9, 0.1]])),
         "from the same tokens"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(unchecked, call, message):
    with pytest.raises(ValueError, match=message):
        call()
