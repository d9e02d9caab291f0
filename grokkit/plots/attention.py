"""Figures of attention patterns."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from grokkit.errors import GrokkitError
from grokkit.plots.style import (
    MISSING,
    bare,
    check_tokens,
    checked,
    number_axis,
    panel_grid,
    panels,
    token_axis,
    token_inches,
)  # fmt: skip

_COLOURS = matplotlib.colormaps["Blues"].with_extremes(bad=MISSING)


def attention_pattern(
    tokens: Sequence[str],
    pattern: Float[np.ndarray | Array, "query key"],
    title: str = "Where a head looks",
) -> Figure:
    """One head's attention: a row for each token that looks, a column for each looked at.

    **Arguments:**

    - `tokens`: what each position shows.
    - `pattern`: the attention weights; rows sum to 1. What lies in a query's future is grey.
    - `title`: over the figure.

    **Raises:** `GrokkitError` for shapes that do not fit.

    ```python
    _, cache = lm.run_with_cache(text, "pattern")
    attention_pattern(lm.to_str_tokens(text), cache["pattern", 4][0, 15], "layer 4, head 15")
    ```
    """
    pattern = _past(checked("pattern", pattern, "query", "key"))
    n = len(pattern)
    check_tokens(tokens, n)
    side = max(2.6, token_inches(n) * 0.8)
    figure = Figure(figsize=(side + 2.4, side + 1.4), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(pattern, cmap=_COLOURS, vmin=0, interpolation="none")
    token_axis(axes, tokens, "x")
    token_axis(axes, tokens, "y")
    bare(axes)
    axes.set_xlabel("key: the token looked at")
    axes.set_ylabel("query: the token that looks")
    axes.set_title(title)
    figure.colorbar(image, shrink=0.7, label="attention weight")
    return figure


def attention_heads(
    patterns: Float[np.ndarray | Array, "head query key"],
    title: str = "Where a layer's heads look",
    heads: Sequence[str] | None = None,
) -> Figure:
    """All heads of a layer as small multiples; each query's future is grey.

    **Arguments:**

    - `patterns`: the attention weights of each head.
    - `title`: over the figure.
    - `heads`: a name for each, `head 0` and so on by default.

    **Raises:** `GrokkitError` for shapes that do not fit.

    ```python
    _, cache = lm.run_with_cache(text, "pattern")
    attention_heads(cache["pattern", 4][0], "layer 4")
    ```
    """
    patterns = _past(checked("patterns", patterns, "head", "query", "key"))
    n_heads, n = patterns.shape[:2]
    names = [f"head {i}" for i in range(n_heads)] if heads is None else list(heads)
    if len(names) != n_heads:
        raise GrokkitError(f"heads: expected {n_heads} names, found {len(names)}")
    rows, columns = panel_grid(n_heads)
    figure = Figure(figsize=(max(4.0, 1.4 * columns + 1.4), 1.6 * rows + 1.0), layout="constrained")
    grid = panels(figure, n_heads)
    image = None
    for axes, pattern, name in zip(grid, patterns, names, strict=True):
        image = axes.imshow(pattern, cmap=_COLOURS, vmin=0, vmax=1, interpolation="none")
        axes.set_title(name, fontsize=8, pad=3)
        number_axis(axes, n, "x", most=4)
        number_axis(axes, n, "y", most=4)
        axes.tick_params(labelsize=7)
        bare(axes)
    figure.supxlabel("key: position looked at", fontsize="medium")
    figure.supylabel("query: position that looks", fontsize="medium")
    figure.suptitle(title)
    assert image is not None
    figure.colorbar(image, ax=grid, label="attention weight", shrink=0.9 if rows < 3 else 0.5,
                    pad=0.02)  # fmt: skip
    return figure


def _past(pattern: np.ndarray) -> np.ndarray:
    """The pattern with NaN above the diagonal."""
    n, k = pattern.shape[-2:]
    if n != k:
        raise GrokkitError(f"pattern: expected as many queries as keys, found {n} and {k}")
    return np.where(np.tri(n, dtype=bool), pattern, np.nan)
