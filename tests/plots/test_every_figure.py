"""What holds of every figure: an example that runs, a place in the gallery, colours told apart."""

import ast
import inspect
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from figures import assert_fit_to_show
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from grokkit import plots

FIGURES = [name for name in plots.__all__ if callable(getattr(plots, name))]
GALLERY = Path(__file__).parents[2] / "docs" / "gallery.md"


def example(name: str) -> str:
    """The code in a figure's docstring."""
    doc = inspect.getdoc(getattr(plots, name)) or ""
    found = re.findall(r"```python\n(.*?)```", doc, re.DOTALL)
    assert len(found) == 1, f"{name}: expected one example, found {len(found)}"
    return found[0]


@pytest.mark.parametrize("name", FIGURES)
def test_it_has_an_example_and_is_in_the_gallery(name):
    assert f"{name}(" in example(name)
    assert f"plots.{name}(" in GALLERY.read_text()
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert f"plots.{name}(" in tests  # where assert_fit_to_show judges it


@pytest.mark.slow
def test_examples_run_as_they_stand():
    import jax

    import grokkit
    from grokkit.analysis import attribution, causal_routing, lens, routing, specialisation
    from grokkit.analysis.patching import LogitDifference, Positions, patch
    from grokkit.analysis.routing import flatten_tokens
    from grokkit.analysis.statistics import permutation_null

    lm = grokkit.load("nano", progress=False)
    text = "The duty of the Congress is clear. 27+58=85. def read(self): return self.value"
    right, wrong = (lm.tokenizer.encode(f"27+58={digit}")[-1] for digit in "87")
    ids = np.array([lm.tokenizer.encode(text)[:20]] * 4)
    names, domain_of_sequence = ["one", "other"], np.array([0, 0, 1, 1])
    domain_of_token = np.repeat(domain_of_sequence, 20)
    _, cache = lm.run_with_cache(ids, ["expert_indices"])
    chosen = flatten_tokens(np.asarray(cache["expert_indices"]))

    def statistic(order):
        return specialisation.domain_specialisation(chosen[:, order], domain_of_token, 8, 2)

    names_here = {
        "attribution": attribution, "causal_routing": causal_routing, "jax": jax, "lens": lens,
        "routing": routing, "specialisation": specialisation, "np": np, "patch": patch,
        "Positions": Positions, "flatten_tokens": flatten_tokens, "lm": lm, "text": text,
        "right": right, "wrong": wrong, "ids": ids, "names": names, "n_domains": 2,
        "domain_of_sequence": domain_of_sequence, "domain_of_token": domain_of_token,
        "chosen": chosen, "metric": LogitDifference(right, wrong),
        "rng": np.random.default_rng(0),
        "null": permutation_null(statistic, chosen.shape[1], np.random.default_rng(0), samples=9),
        **{name: getattr(plots, name) for name in FIGURES},
    }  # fmt: skip
    for name in FIGURES:
        here = dict(names_here)
        if name in ("expert_load", "coactivation", "transitions"):
            here["cache"] = cache
        *lines, last = ast.parse(example(name)).body
        assert isinstance(last, ast.Expr)
        exec(compile(ast.Module(lines, []), name, "exec"), here)  # noqa: S102
        figure = eval(compile(ast.Expression(last.value), name, "eval"), here)
        assert isinstance(figure, Figure), name
        assert_fit_to_show(figure, ink=0.005)


# How colours look to those who lack one of the three kinds of cone, in linear light (Machado,
# Oliveira and Fernandes 2009, severity 1).
SIGHT = {
    "all cones": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                   [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                     [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                   [0.004733, 0.691367, 0.303900]],
}  # fmt: skip
XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
                [0.0193339, 0.1191920, 0.9503041]])  # fmt: skip


def least_distance(colours, sight) -> float:
    """The least difference of two colours, in CIELAB, as this sight has them."""
    srgb = np.array([to_rgb(c) for c in colours])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.transpose(sight), 0, 1)
    t = seen @ XYZ.T / XYZ.sum(axis=1)
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    lab = np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], -1)
    return min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(lab, 2))


@pytest.mark.parametrize("sight", SIGHT)
def test_experts_colours_are_told_apart(sight):
    assert len(plots.EXPERT_COLOURS) == 8
    assert least_distance(plots.EXPERT_COLOURS, SIGHT[sight]) > 15  # about 2 can just be seen


def test_the_measure_finds_colours_that_are_not():
    red_and_green = ["#B0413E", "#6B7A26"]
    assert least_distance(red_and_green, SIGHT["all cones"]) > 40
    assert least_distance(red_and_green, SIGHT["deuteranopia"]) < 15
