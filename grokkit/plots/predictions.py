"""Figures of what the model predicts, how early, and what writes it."""

import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from jaxtyping import Array, Float
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from grokkit.errors import GrokkitError
from grokkit.plots.style import (
    EXPERT_COLOURS,
    bare,
    check_experts,
    check_tokens,
    checked,
    token_axis,
    token_label,
    write_cells,
)  # fmt: skip


def next_token(tokens: Sequence[str], probs: Float[np.ndarray | Array, " alternative"]) -> Figure:
    """Bars of the most probable next tokens.

    **Arguments:**

    - `tokens`: what each alternative shows.
    - `probs`: their probabilities.

    **Raises:** `GrokkitError` unless there is a probability for each token.

    ```python
    probs = jax.nn.softmax(lm(text).logits[0, -1])
    best = np.argsort(-np.asarray(probs))[:8]
    next_token(lm.to_str_tokens(best), probs[best])
    ```
    """
    probs = checked("probs", probs, "alternative")
    if len(probs) != len(tokens):
        raise GrokkitError(f"expected a probability for each of {len(tokens)} tokens, found "
                           f"{len(probs)}")  # fmt: skip
    figure = Figure(figsize=(5.5, 0.32 * len(tokens) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(tokens))[::-1]
    bars = axes.barh(places, probs, color=EXPERT_COLOURS[0])
    words = [f"{p:.1%}" if p >= 0.0005 else "<0.1%" for p in probs]
    axes.bar_label(bars, words, padding=3, fontsize=9)
    axes.set_yticks(places, [token_label(t) for t in tokens])
    axes.set_xlim(0, float(probs.max()) * 1.2 or 1.0)
    axes.xaxis.set_major_formatter(lambda p, _: f"{p:.0%}")
    axes.set_xlabel("probability of the next token")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def logit_lens(
    tokens: Sequence[str],
    depths: Sequence[tuple[str, int | None]],
    top_tokens: Sequence[Sequence[str]] | np.ndarray,
    probs: Float[np.ndarray | Array, "depth position"],
    title: str = "What the stream already says",
) -> Figure:
    """A table of the most probable next token at each depth and position, the end on top.

    The darker a cell, the more probable its token; up to 26 depths, the percentage stands below
    it. A token that does not fit is cut, and so should be a very long text: its table is as long.

    **Arguments:**

    - `tokens`: the input token at each position.
    - `depths`: site and layer of each row, as in `grokkit.analysis.lens.LensReading`.
    - `top_tokens`: [depth, position], what the most probable next token shows.
    - `probs`: its probability.
    - `title`: over the figure.

    **Raises:** `GrokkitError` for shapes that do not fit.

    ```python
    reading = lens.logit_lens(lm, text, ["resid_post"], top=1)
    ids = reading.top_tokens[:, 0, :, 0]
    logit_lens(lm.to_str_tokens(text), reading.depths,
               np.reshape(lm.to_str_tokens(ids), ids.shape),
               np.exp(reading.top_log_probs[:, 0, :, 0]))
    ```
    """
    probs = checked("probs", probs, "depth", "position")
    shown = checked("top_tokens", top_tokens, "depth", "position")
    if shown.shape != probs.shape:
        raise GrokkitError(f"top_tokens: expected shape {probs.shape}, as probs, found "
                           f"{shown.shape}")  # fmt: skip
    n_depths, n = probs.shape
    check_tokens(tokens, n)
    if len(depths) != n_depths:
        raise GrokkitError(f"depths: expected {n_depths}, one for each row, found {len(depths)}")
    with_percent = n_depths <= 26
    texts = np.array(
        [[token_label(t, 9 if n <= 32 else 6) for t in row] for row in shown], dtype=object
    )
    longest = max(len(t) for t in texts.flat)
    if with_percent:
        texts = texts + np.vectorize(lambda p: f"\n{p:.0%}", otypes=[object])(probs)
    width = max(0.36, 0.065 * longest + 0.08)
    names = [site if layer is None else f"{site} {layer}" for site, layer in depths]
    figure = Figure(
        figsize=(max(5.0, width * n + 0.075 * max(map(len, names)) + 1.5),
                 max(3.2, (0.34 if with_percent else 0.2) * n_depths + 1.9)), layout="constrained",
    )  # fmt: skip
    axes = figure.add_subplot()
    norm, colours = Normalize(0, 1), matplotlib.colormaps["Blues"]
    image = axes.imshow(probs, norm=norm, cmap=colours, origin="lower", aspect="auto")
    write_cells(axes, texts, probs, norm, colours, 7.5)
    token_axis(axes, tokens)
    axes.set_yticks(np.arange(n_depths), names, fontsize=8)
    bare(axes)
    axes.set_xlabel("token read so far")
    axes.set_ylabel("stream")
    axes.set_title(title)
    bar = figure.colorbar(image, shrink=0.8 if n_depths < 26 else 0.3, pad=0.01,
                          format=lambda p, _: f"{p:.0%}")  # fmt: skip
    bar.set_label("probability of the token shown")
    return figure


_HEAD, _OTHER = "#999999", "#BBBBBB"


def attribution_terms(
    terms: Mapping[str, float],
    n: int = 15,
    label: str = "contribution to the logit",
    title: str = "What writes this logit",
) -> Figure:
    """Bars of a logit's largest terms, those of the rest together, and the sum of all.

    Experts have their colours; heads and the embedding are grey.

    **Arguments:**

    - `terms`: as `grokkit.analysis.attribution.Attribution.terms()` names them: `embed`, `L2H5` a
        head, `L3E1` an expert.
    - `n`: how many of the largest absolute value to show.
    - `label`: what a bar's length means.
    - `title`: over the figure.

    **Raises:** `GrokkitError` for no terms, or an expert beyond the colours.

    ```python
    found = attribution.logit_attribution(lm, "27+58=", right, against=wrong)
    attribution_terms(found.terms())
    ```
    """
    if not terms or n < 1:
        raise GrokkitError(f"expected at least one term to show, found {len(terms)} and n = {n}")
    ordered = sorted(terms.items(), key=lambda item: -abs(item[1]))
    rows = [(name, value, _term_colour(name)) for name, value in ordered[:n]]
    rest = ordered[n:]
    if rest:
        rows.append((f"{len(rest)} others", sum(value for _, value in rest), _OTHER))
    rows.append(("sum", sum(terms.values()), "black"))
    figure = Figure(figsize=(6.2, 0.28 * len(rows) + 1.3), layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(rows))[::-1]
    values = np.array([value for _, value, _ in rows])
    bars = axes.barh(places, values, color=[colour for *_, colour in rows])
    axes.bar_label(bars, [f"{value:+z.2f}" for value in values], padding=3, fontsize=8)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.axhline(0.5, color=_OTHER, linewidth=0.8, linestyle=":")
    axes.set_yticks(places, [name for name, *_ in rows], fontsize=9)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    # Room for the numbers, on the sides that have bars.
    span = max(values.max(), 0) - min(values.min(), 0) or 1.0
    axes.set_xlim(min(values.min(), 0) - (0.14 if values.min() < 0 else 0) * span,
                  max(values.max(), 0) + (0.14 if values.max() > 0 else 0) * span)  # fmt: skip
    axes.set_xlabel(label)
    axes.set_title(title)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    used = sorted({int(m[1]) for name, *_ in rows if (m := _EXPERT.fullmatch(name))})
    kinds = [Patch(color=EXPERT_COLOURS[e], label=f"expert {e}") for e in used]
    kinds.append(Patch(color=_HEAD, label="a head"))
    figure.legend(handles=kinds, loc="outside right center", frameon=False, fontsize=8,
                  handlelength=1, handleheight=1)  # fmt: skip
    return figure


_EXPERT = re.compile(r"L\d+E(\d+)")


def _term_colour(name: str) -> str:
    if match := _EXPERT.fullmatch(name):
        check_experts(int(match[1]) + 1)
        return EXPERT_COLOURS[int(match[1])]
    return _HEAD if re.fullmatch(r"L\d+H\d+", name) else _OTHER
