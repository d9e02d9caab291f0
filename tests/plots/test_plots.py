"""Figures hold what they should, and are neither blank nor clipped."""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from grokkit import plots


def pixels(figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def assert_shown_whole(figure) -> None:
    """Something is drawn, and nothing touches the figure's edge."""
    image = pixels(figure)
    assert (image != 255).any(axis=-1).mean() > 0.02
    edge = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    assert (edge == 255).all()


@pytest.mark.parametrize(("n_layers", "n"), [(6, 20), (64, 60), (1, 1)])
def test_chosen_experts(n_layers, n):
    rng = np.random.default_rng(0)
    experts = rng.permuted(np.tile(np.arange(8), (n_layers, n, 1)), axis=-1)[..., :2]
    weights = np.sort(rng.uniform(0.05, 0.6, (n_layers, n, 2)))[..., ::-1]
    tokens = [" word", "\n", "x", "$"] * (n // 4) + [" end"] * (n % 4)
    figure = plots.chosen_experts(tokens, experts, weights)
    assert_shown_whole(figure)
    drawn = figure.axes[0].images[0].get_array()
    first = tuple(round(c * 255) for c in drawn[0, 0, :3])
    assert "#{:02X}{:02X}{:02X}".format(*first) == plots.EXPERT_COLOURS[experts[0, 0, 0]].upper()
    labels = [t.get_text() for t in figure.axes[0].get_xticklabels()]
    assert labels[0] in ("␣word", "␣end")


def test_colours_differ():
    assert len(set(plots.EXPERT_COLOURS)) == 8


def test_next_token():
    figure = plots.next_token([" the", " a", "\n"], np.array([0.5, 0.3, 0.1]))
    assert_shown_whole(figure)
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    np.testing.assert_allclose(widths, [0.5, 0.3, 0.1])


def test_labels_must_match():
    with pytest.raises(ValueError, match="expected 3 token labels"):
        plots.chosen_experts(["a"], np.zeros((2, 3, 2), int), np.ones((2, 3, 2)))
    with pytest.raises(ValueError, match="at most 8 experts"):
        plots.chosen_experts(["a"], np.full((1, 1, 2), 9), np.ones((1, 1, 2)))
