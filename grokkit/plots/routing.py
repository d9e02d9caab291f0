"""Figures of where routers send tokens."""

import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from grokkit.errors import GrokkitError
from grokkit.plots.style import (
    EXPERT_COLOURS,
    MISSING,
    around,
    bare,
    check_experts,
    check_tokens,
    checked,
    expert_axis,
    expert_legend,
    number_axis,
    panel_grid,
    panels,
    token_axis,
    token_inches,
    write_cells,
)  # fmt: skip

_DIVERGING = matplotlib.colormaps["PuOr_r"].with_extremes(bad=MISSING)


def chosen_experts(
    tokens: Sequence[str],
    experts: Int[np.ndarray | Array, "layer position choice"],
    weights: Float[np.ndarray | Array, "layer position choice"],
    title: str = "Which experts each token is sent to",
) -> Figure:
    """A strip of tokens by layers, each cell split among the token's experts.

    **Arguments:**

    - `tokens`: what each position shows.
    - `experts`: the chosen experts, most probable first; at most 8 experts.
    - `weights`: their weights; a fainter colour is a smaller weight.
    - `title`: over the figure.

    **Returns:** a figure that grows with the text.

    **Raises:** `GrokkitError` for shapes that do not fit, or more experts than colours.

    ```python
    _, cache = lm.run_with_cache(text, ["expert_indices", "expert_weights"])
    chosen_experts(lm.to_str_tokens(text), cache["expert_indices"][:, 0],
                   cache["expert_weights"][:, 0])
    ```
    """
    experts = checked("experts", experts, "layer", "position", "choice")
    weights = checked("weights", weights, "layer", "position", "choice")
    if weights.shape != experts.shape:
        raise GrokkitError(f"weights: expected shape {experts.shape}, as experts, found "
                           f"{weights.shape}")  # fmt: skip
    n_layers, n, n_chosen = experts.shape
    check_tokens(tokens, n)
    check_experts(int(experts.max()) + 1)
    # A row of pixels for each layer, and one for each choice across a token's column.
    palette = np.array([to_rgba(c) for c in EXPERT_COLOURS])
    image = palette[experts.reshape(n_layers, -1)]
    image[..., 3] = 0.25 + 0.75 * weights.reshape(n_layers, -1) / max(weights.max(), 1e-9)
    figure = Figure(
        figsize=(max(5.0, token_inches(n) + 1.8), max(0.3 * min(n_layers, 24), 0.14 * n_layers)
                 + 2.0), layout="constrained",
    )  # fmt: skip
    axes = figure.add_subplot()
    axes.imshow(image, aspect="auto", origin="lower", interpolation="none",
                extent=(-0.5, n - 0.5, -0.5, n_layers - 0.5))  # fmt: skip
    token_axis(axes, tokens)
    number_axis(axes, n_layers)
    axes.set_xticks(np.arange(n + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(n_layers + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5 if n_layers <= 24 else 0.8)
    bare(axes)
    axes.set_xlabel(f"token (its {n_chosen} experts side by side, most probable first)")
    axes.set_ylabel("layer")
    axes.set_title(title)
    expert_legend(figure, int(experts.max()) + 1)
    return figure


def expert_load(
    load: Float[np.ndarray | Array, "layer expert"],
    band: tuple[Float[np.ndarray | Array, "..."], Float[np.ndarray | Array, "..."]] | None = None,
    title: str = "How often each expert is used",
) -> Figure:
    """Bars of each expert's share of a layer's choices, from what an even share would be.

    **Arguments:**

    - `load`: what `grokkit.analysis.routing.expert_load` returns; sums to 1 over the experts.
    - `band`: lower and upper end of what chance allows, drawn in grey; anything that broadcasts to
        [layer, expert]. Tokens of a text are not independent, so that draws of independent ones
        allow for less than they should.
    - `title`: over the figure.

    **Returns:** a figure with sixteen layers a row.

    **Raises:** `GrokkitError` for shapes that do not fit, or more experts than colours.

    ```python
    chosen = flatten_tokens(np.asarray(cache["expert_indices"]))
    # Pairs of experts drawn evenly for as many tokens: what chance alone does to the load.
    even = rng.permuted(np.tile(np.arange(8), (999, chosen.shape[1], 1)), axis=-1)[..., :2]
    band = np.quantile(routing.expert_load(even, 8), [0.025, 0.975], axis=0)
    expert_load(routing.expert_load(chosen, 8), tuple(band))
    ```
    """
    load = checked("load", load, "layer", "expert")
    n_layers, n_experts = load.shape
    check_experts(n_experts)
    ends = None
    if band is not None:
        try:
            ends = [np.broadcast_to(np.asarray(end), load.shape) for end in band]
        except ValueError as e:
            shapes = " and ".join(str(np.shape(end)) for end in band)
            raise GrokkitError(f"band: expected two arrays that broadcast to [layer, expert] = "
                               f"{load.shape}, found {shapes}") from e  # fmt: skip
    per_row = min(n_layers, 16)
    n_rows = math.ceil(n_layers / per_row)
    figure = Figure(
        figsize=(max(5.5, 0.62 * per_row + 2.4), max(2.8, 1.9 * n_rows + 0.9)), layout="constrained"
    )
    rows = figure.subplots(n_rows, 1, sharey=True, squeeze=False)[:, 0]
    even, width = 1 / n_experts, 0.86 / n_experts
    for axes, start in zip(rows, range(0, n_layers, per_row), strict=True):
        shown = slice(start, min(start + per_row, n_layers))
        layers = np.arange(shown.start, shown.stop)
        places = (layers[:, None] + (np.arange(n_experts) - (n_experts - 1) / 2) * width).ravel()
        if ends is not None:
            low, high = (end[shown].ravel() for end in ends)
            axes.bar(places, high - low, width, low, color="#C8C8C8", zorder=1)
        axes.bar(places, load[shown].ravel() - even, 0.8 * width, even, zorder=2,
                 color=np.tile(EXPERT_COLOURS[:n_experts], len(layers)))  # fmt: skip
        axes.axhline(even, color="black", linewidth=0.8, zorder=3)
        axes.set_xlim(start - 0.5, start + per_row - 0.5)
        axes.set_xticks(layers)
        axes.tick_params(axis="x", length=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(0, 1.1 * float(max(load.max(), 2 * even)))
        axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    rows[-1].set_xlabel("layer")
    figure.supylabel("share of the layer's choices", fontsize="medium")
    figure.suptitle(title)
    more = [Line2D([], [], color="black", linewidth=0.8, label="even")]
    if ends is not None:
        more.append(Patch(color="#C8C8C8", label="chance"))  # type: ignore[arg-type]
    expert_legend(figure, n_experts, *more)
    return figure


def coactivation(
    shares: Float[np.ndarray | Array, "*layer expert expert"],
    title: str = "Which experts are chosen together",
) -> Figure:
    """How often the column's expert gets the row's tokens too; white is chance.

    **Arguments:**

    - `shares`: what `grokkit.analysis.routing.coactivation` returns, of one layer or of all.
    - `title`: over the figure.

    **Returns:** a panel a layer, with numbers in the cells of up to eight.

    **Raises:** `GrokkitError` for shapes that do not fit, more experts than colours, or one choice
    a token.

    ```python
    chosen = flatten_tokens(np.asarray(cache["expert_indices"]))
    coactivation(routing.coactivation(chosen, lm.config.n_experts))
    ```
    """
    shares = checked("shares", shares, "expert", "expert", lead=True)
    n_experts = shares.shape[-1]
    if shares.shape[-2] != n_experts:
        raise GrokkitError(f"shares: expected as many rows as columns, found {shares.shape}")
    check_experts(n_experts)
    others = np.where(np.eye(n_experts, dtype=bool), np.nan, shares)
    others = others.reshape(-1, n_experts, n_experts)
    chance = float(np.nanmean(others)) if np.isfinite(others).any() else 0.0
    if chance <= 0:
        raise GrokkitError("shares: no experts go together; tokens need at least two choices")
    return _share_panels(
        others, None, None, chance,
        "share of the row's tokens that the column gets too", "the other expert", "expert", title,
    )  # fmt: skip


def domain_specialisation(
    shares: Float[np.ndarray | Array, "*layer domain expert"],
    domains: Sequence[str],
    significant: Bool[np.ndarray | Array, "*layer domain expert"] | None = None,
    title: str = "Which experts serve which kind of text",
) -> Figure:
    """A heat map of domains by experts for each layer; white is chance.

    **Arguments:**

    - `shares`: what `grokkit.analysis.specialisation.domain_specialisation` returns, of one layer
        or of all; rows sum to the number of choices.
    - `domains`: their names.
    - `significant`: which cells to outline.
    - `title`: over the figure.

    **Returns:** a panel a layer, with percentages in the cells of up to eight.

    **Raises:** `GrokkitError` for shapes that do not fit, or more experts than colours.

    ```python
    shares = specialisation.domain_specialisation(chosen, domain_of_token, 8, len(names))
    domain_specialisation(shares, names, null.p_value < 0.05)
    ```
    """
    shares = checked("shares", shares, "domain", "expert", lead=True)
    n_domains, n_experts = shares.shape[-2:]
    check_experts(n_experts)
    if len(domains) != n_domains:
        raise GrokkitError(f"domains: expected {n_domains} names, found {len(domains)}")
    outlined = None if significant is None else np.asarray(significant)
    if outlined is not None:
        if outlined.shape != shares.shape:
            raise GrokkitError(f"significant: expected shape {shares.shape}, as shares, found "
                               f"{outlined.shape}")  # fmt: skip
        outlined = outlined.reshape(-1, n_domains, n_experts)
    chance = max(float(np.nanmean(shares)), 1e-9)
    return _share_panels(
        shares.reshape(-1, n_domains, n_experts), domains, outlined, chance,
        "share of the domain's tokens that the expert serves", "expert", "", title,
    )  # fmt: skip


def _share_panels(
    values: np.ndarray,
    names: Sequence[str] | None,
    outlined: np.ndarray | None,
    chance: float,
    meaning: str,
    x_label: str,
    y_label: str,
    title: str,
) -> Figure:
    """A heat map of shares for each layer; rows are experts, or else have `names`."""
    n_panels, n_rows, n_experts = values.shape
    large = n_panels <= 8
    cell = (0.3, 0.28) if large else (0.16, 0.16)
    rows, columns = panel_grid(n_panels)
    label = 0.09 * max(map(len, names)) if names else 0.3
    figure = Figure(
        figsize=(max(4.2, columns * (cell[0] * n_experts + 0.15) + label + 1.4),
                 max(3.8, rows * (cell[1] * n_rows + 0.3) + 1.4)), layout="constrained",
    )  # fmt: skip
    norm, image = around(chance, values), None
    grid = panels(figure, n_panels)
    size = 8.0 if large else 6.0
    for layer, (axes, shown) in enumerate(zip(grid, values, strict=True)):
        image = axes.imshow(shown, norm=norm, cmap=_DIVERGING, aspect="auto")
        marks = None if outlined is None else outlined[layer]
        if large:
            percent = np.vectorize(lambda v: "" if np.isnan(v) else f"{100 * v:.0f}")(shown)
            write_cells(axes, percent, shown, norm, _DIVERGING, 7.5, marks)
        if marks is not None:
            for row, column in np.argwhere(marks):
                axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, clip_on=False,
                                         linewidth=1.6 if large else 0.8))  # fmt: skip
        if n_panels > 1:
            axes.set_title(f"layer {layer}", fontsize=9 if large else 7, pad=4)
    for axes in grid:
        expert_axis(axes, n_experts, "x", size)
        if names is None:
            expert_axis(axes, n_rows, "y", size)
        else:
            axes.set_yticks(np.arange(n_rows), list(names), fontsize=size)
        bare(axes)
    figure.supxlabel(x_label + (" (outlined: significant)" if outlined is not None else ""),
                     fontsize="medium")  # fmt: skip
    figure.supylabel(y_label, fontsize="medium")
    figure.suptitle(title)
    assert image is not None
    bar = figure.colorbar(image, ax=grid, shrink=0.9 if rows < 4 else 0.4, pad=0.02,
                          format=lambda share, _: f"{share:.0%}")  # fmt: skip
    # The two halves of the scale have steps of their own: put a tick where they meet.
    bar.set_ticks([0, chance / 2, chance, (chance + norm.vmax) / 2, norm.vmax])  # type: ignore[operator]
    bar.set_label(f"{meaning}\n(white: chance)", fontsize=9)
    return figure


def transitions(
    shares: Float[np.ndarray | Array, "transition expert expert"],
    load: Float[np.ndarray | Array, "layer expert"],
    title: str = "Where tokens go from layer to layer",
) -> Figure:
    """A flow diagram: experts are blocks, as high as their load, and tokens flow between layers.

    A flow has the colour of the expert that it leaves, and is faint unless it is larger than if
    the next choice did not depend on this one; at twice that it has its full colour.

    **Arguments:**

    - `shares`: what `grokkit.analysis.routing.transitions` returns.
    - `load`: what `expert_load` there returns for the same tokens, one layer more.
    - `title`: over the figure.

    **Returns:** a figure with up to twelve transitions a row.

    **Raises:** `GrokkitError` for shapes that do not fit, more experts than colours, or a load of
    other tokens.

    ```python
    chosen = flatten_tokens(np.asarray(cache["expert_indices"]))
    transitions(routing.transitions(chosen, 8), routing.expert_load(chosen, 8))
    ```
    """
    shares = checked("shares", shares, "transition", "expert", "expert")
    load = checked("load", load, "layer", "expert")
    n, n_experts = shares.shape[0], shares.shape[2]
    check_experts(n_experts)
    if shares.shape[1] != n_experts or load.shape != (n + 1, n_experts):
        raise GrokkitError(f"expected shares [transition, expert, expert] and load [layer, expert] "
                           f"with one layer more than transitions, found shapes {shares.shape} "
                           f"and {load.shape}")  # fmt: skip
    flows = load[:-1, :, None] * np.nan_to_num(shares)
    if not np.allclose(flows.sum(axis=1), load[1:], atol=1e-4):
        raise GrokkitError("load: these shares of choices do not lead to the next layer's load; "
                           "take both from the same tokens")  # fmt: skip
    per_row = math.ceil(n / math.ceil(n / 12))
    n_rows = math.ceil(n / per_row)
    figure = Figure(figsize=(max(5.0, 1.0 * per_row + 1.6), 2.6 * n_rows + 0.9),
                    layout="constrained")  # fmt: skip
    rows = figure.subplots(n_rows, 1, squeeze=False)[:, 0]
    for axes, start in zip(rows, range(0, n, per_row), strict=True):
        stop = min(start + per_row, n)
        for i in range(start, stop):
            _draw_flows(axes, i, flows[i], load[i], load[i + 1])
        for layer in range(start, stop + 1):
            tops = _tops(load[layer])
            axes.bar(np.full(n_experts, layer), load[layer], 0.1, tops - load[layer],
                     color=EXPERT_COLOURS[:n_experts], zorder=2)  # fmt: skip
        axes.set_xlim(start - 0.1, start + per_row + 0.1)
        axes.set_xticks(np.arange(start, stop + 1))
        axes.set_yticks([])
        bare(axes)
    rows[-1].set_xlabel("layer (strong colour: more often than chance)")
    figure.supylabel("share of the layer's choices", fontsize="medium")
    figure.suptitle(title)
    expert_legend(figure, n_experts)
    return figure


_GAP = 0.015
"""Between the blocks of a layer, in shares."""


def _tops(load: np.ndarray) -> np.ndarray:
    """Upper edge of each expert's block, expert 0 on top."""
    return 1 - np.cumsum(load) + load - _GAP * np.arange(len(load))


def _draw_flows(
    axes: Axes, layer: int, flow: np.ndarray, load: np.ndarray, following: np.ndarray
) -> None:
    """Ribbons from one layer's blocks to the next's, each as high as its share."""
    n = len(load)
    left = _tops(load)[:, None] - np.cumsum(flow, axis=1) + flow  # upper edges
    right = _tops(following) - np.cumsum(flow, axis=0) + flow
    steps = np.linspace(0, 1, 17)
    bend = steps**2 * (3 - 2 * steps)
    x = layer + 0.05 + 0.9 * steps
    expected = load[:, None] * following
    excess = flow / np.where(expected > 0, expected, 1) - 1
    alpha = 0.07 + 0.68 * np.clip(excess, 0, 1)
    ribbons, colours = [], []
    for i, j in np.argwhere(flow > 0):
        upper = left[i, j] + (right[i, j] - left[i, j]) * bend
        lower = upper - flow[i, j]
        ribbons.append(np.stack([np.r_[x, x[::-1]], np.r_[upper, lower[::-1]]], axis=-1))
        colours.append(to_rgba(EXPERT_COLOURS[i], float(alpha[i, j])))
    # Strong ones last, and so on top.
    order = np.argsort([c[3] for c in colours])
    axes.add_collection(PolyCollection([ribbons[i] for i in order], linewidths=0,
                                       facecolors=[colours[i] for i in order]))  # fmt: skip
    axes.set_ylim(-_GAP * n, 1 + _GAP)
