"""Figures of what the model predicts."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from grokkit.plots.style import EXPERT_COLOURS, token_label


def next_token(tokens: Sequence[str], probs: Float[np.ndarray | Array, " alternative"]) -> Figure:
    """Bars of the most probable next tokens.

    **Arguments:**

    - `tokens`: what each alternative shows.
    - `probs`: their probabilities.
    """
    probs = np.asarray(probs)
    figure = Figure(figsize=(5.5, 0.32 * len(tokens) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(tokens))[::-1]
    bars = axes.barh(places, probs, color=EXPERT_COLOURS[0])
    axes.bar_label(bars, [f"{p:.1%}" for p in probs], padding=3, fontsize=9)
    axes.set_yticks(places, [token_label(t) for t in tokens])
    axes.set_xlim(0, min(1.0, float(probs.max()) * 1.2))
    axes.xaxis.set_major_formatter(lambda p, _: f"{p:.0%}")
    axes.set_xlabel("probability of the next token")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
