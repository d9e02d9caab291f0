"""Figures of predictions hold the numbers they were given, and are fit to show."""

import numpy as np
import pytest
from figures import assert_fit_to_show
from matplotlib.colors import to_hex

from grokkit import plots


def test_next_token():
    figure = plots.next_token([" the", " a", "\n"], np.array([0.5, 0.3, 0.0001]))
    assert_fit_to_show(figure)
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    np.testing.assert_allclose(widths, [0.5, 0.3, 0.0001])
    assert [text.get_text() for text in figure.axes[0].texts] == ["50.0%", "30.0%", "<0.1%"]


@pytest.mark.parametrize("prob", [1.0, 0.0])
def test_next_token_that_is_certain(prob):
    assert_fit_to_show(plots.next_token(["a", "b"], np.array([prob, 0.0])), ink=0.005)


@pytest.mark.parametrize(("n_depths", "n"), [(8, 12), (64, 16), (8, 64), (1, 1)])
def test_logit_lens(rng, n_depths, n):
    tokens = [[" word", "\n", "ing"][i % 3] for i in range(n)]
    shown = np.array([[[" a", "representation", "$"][(i + d) % 3] for i in range(n)]
                      for d in range(n_depths)])  # fmt: skip
    probs = rng.uniform(0.05, 1, (n_depths, n))
    depths = [("embed", None), *(("resid_post", i) for i in range(n_depths - 1))]
    figure = plots.logit_lens(tokens, depths, shown, probs)
    assert_fit_to_show(figure)
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), probs)
    cells = {tuple(int(v) for v in t.get_position()): t for t in figure.axes[0].texts}
    assert len(cells) == n_depths * n
    first = cells[0, 0].get_text().split("\n")
    assert first[0] == "␣a"
    assert first[1:] == ([f"{probs[0, 0]:.0%}"] if n_depths <= 26 else [])
    # A cell's text stays in its cell.
    axes = figure.axes[0]
    (x0, y0), (x1, y1) = axes.transData.transform([(0, 0), (1, 1)])
    for text in cells.values():
        box = text.get_window_extent()
        assert box.width <= (x1 - x0) + 2 and box.height <= (y1 - y0) + 2
    rows = [label.get_text() for label in axes.get_yticklabels()]
    assert rows == ["embed", *(f"resid_post {i}" for i in range(n_depths - 1))]


@pytest.mark.parametrize("n_layers", [8, 64])
def test_attribution_terms(rng, n_layers):
    terms = {"embed": -0.5}
    for layer in range(n_layers):
        terms |= {f"L{layer}H{i}": float(rng.normal()) for i in range(8)}
        terms |= {f"L{layer}E{i}": float(rng.normal()) for i in range(8)}
    terms["L5E1"], terms["L2H3"] = 9.0, -8.0
    figure = plots.attribution_terms(terms, n=10)
    assert_fit_to_show(figure)
    axes = figure.axes[0]
    names = [t.get_text() for t in axes.get_yticklabels()]
    widths = [b.get_width() for b in axes.patches]
    assert names[:2] == ["L5E1", "L2H3"] and widths[:2] == [9.0, -8.0]
    assert names[-2:] == [f"{len(terms) - 10} others", "sum"]
    assert widths[-1] == pytest.approx(sum(terms.values()))
    assert sum(widths[:-1]) == pytest.approx(widths[-1])
    assert to_hex(axes.patches[0].get_facecolor()).upper() == plots.EXPERT_COLOURS[1]
    assert to_hex(axes.patches[1].get_facecolor()).upper() not in plots.EXPERT_COLOURS


def test_attribution_of_one_sign():
    assert_fit_to_show(plots.attribution_terms({"embed": 1.0, "L0H1": 2.0}))
    assert_fit_to_show(plots.attribution_terms({"embed": -1.0, "L0E1": -2.0}))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.next_token(["a"], np.ones(2)), "a probability for each of 1 tokens"),
        (lambda: plots.logit_lens(["a"], [("embed", None)], [["x"]], np.ones((1, 2))),
         r"top_tokens: expected shape \(1, 2\)"),
        (lambda: plots.logit_lens(["a"], [("embed", None)], [["x", "y"]], np.ones((1, 2))),
         "expected 2 token labels"),
        (lambda: plots.logit_lens(["a"], [], [["x"]], np.ones((1, 1))), "depths: expected 1"),
        (lambda: plots.logit_lens(["a"], [], ["x"], np.ones(1)), r"axes \[depth, position\]"),
        (lambda: plots.attribution_terms({}), "at least one term"),
        (lambda: plots.attribution_terms({"L0E9": 1.0}), "at most 8 experts"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(unchecked, call, message):
    with pytest.raises(ValueError, match=message):
        call()
