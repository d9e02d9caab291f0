"""Figures of what changes when something inside is changed."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from grokkit.errors import GrokkitError
from grokkit.plots.style import (
    EXPERT_COLOURS,
    MISSING,
    bare,
    check_experts,
    check_tokens,
    checked,
    expert_axis,
    expert_legend,
    number_axis,
    symmetric,
    token_axis,
    token_inches,
)  # fmt: skip

_DIVERGING = matplotlib.colormaps["RdBu_r"].with_extremes(bad=MISSING)


def patching_map(
    values: Float[np.ndarray | Array, "layer case"],
    axis: str = "position",
    tokens: Sequence[str] | None = None,
    label: str = "share of the difference restored",
    title: str = "What patching restores",
) -> Figure:
    """A patching sweep as a heat map, layers by positions, heads or experts; white is no effect.

    **Arguments:**

    - `values`: a sweep's `recovered` or `effect`; see `grokkit.analysis.patching.Sweep`.
    - `axis`: the sweep's `axis`: what the columns are.
    - `tokens`: what each position shows, where the columns are positions.
    - `label`: what a colour means.
    - `title`: over the figure.

    **Raises:** `GrokkitError` for shapes that do not fit.

    ```python
    sweep = patch(lm, "27+58=", "27+48=", metric, Positions("resid_pre"))
    patching_map(sweep.recovered, sweep.axis, lm.to_str_tokens("27+58="))
    ```
    """
    values = checked("values", values, "layer", axis)
    n_layers, n = values.shape
    if tokens is not None:
        if axis != "position":
            raise GrokkitError(f"tokens: the columns are {axis}s, which have none")
        check_tokens(tokens, n)
    width = token_inches(n) if tokens is not None else 0.3 * n if n <= 32 else 0.15 * min(n, 128)
    figure = Figure(
        figsize=(max(4.5, width + 2.3), max(0.3 * min(n_layers, 24), 0.14 * n_layers) + 1.6),
        layout="constrained",
    )
    axes = figure.add_subplot()
    image = axes.imshow(values, norm=symmetric(values), cmap=_DIVERGING, origin="lower",
                        aspect="auto", interpolation="none")  # fmt: skip
    number_axis(axes, n_layers)
    if tokens is not None:
        token_axis(axes, tokens)
    elif axis == "expert" and n <= len(EXPERT_COLOURS):
        expert_axis(axes, n)
    else:
        number_axis(axes, n, "x")
    bare(axes)
    axes.set_xlabel("token at the patched position" if tokens is not None else axis)
    axes.set_ylabel("layer")
    axes.set_title(title)
    figure.colorbar(image, label=label, shrink=0.9 if n_layers < 24 else 0.4, pad=0.02)
    return figure


def causal_versus_observed(
    observed: Float[np.ndarray | Array, "*lead expert"],
    effect: Float[np.ndarray | Array, "*lead expert"],
    x_label: str,
    y_label: str,
    interval: tuple[np.ndarray, np.ndarray] | None = None,
    title: str = "Does use predict harm?",
) -> Figure:
    """A point for each case: what was observed against what intervening does, by expert.

    **Arguments:**

    - `observed`: a number of each case, experts on the last axis, from watching.
    - `effect`: what intervening on the case changes, shaped alike. Cases with a NaN are left out.
    - `x_label`, `y_label`: what the numbers mean, with units.
    - `interval`: lower and upper end of each effect, for whiskers; fainter where there are many.
    - `title`: over the figure.

    **Raises:** `GrokkitError` for shapes that do not fit, more experts than colours or no case
    without NaN.

    ```python
    use = specialisation.domain_specialisation(chosen, domain_of_token, 8, n_domains)
    harm = causal_routing.remove_experts(lm, ids).effect(domain_of_sequence)
    causal_versus_observed(use, harm.swapaxes(-1, -2), "share of a domain's tokens served",
                           "harm of removal (nats a token)")
    ```
    """
    observed, effect = np.asarray(observed), np.asarray(effect)
    if observed.shape != effect.shape or observed.ndim < 1:
        raise GrokkitError(f"expected observed and effect of one shape, experts last, found "
                           f"{observed.shape} and {effect.shape}")  # fmt: skip
    n_experts = observed.shape[-1]
    check_experts(n_experts)
    known = np.isfinite(observed) & np.isfinite(effect)
    if not known.any():
        raise GrokkitError("observed and effect: expected at least one case without NaN")
    ends = None
    if interval is not None:
        ends = [np.asarray(end) for end in interval]
        if any(end.shape != effect.shape for end in ends):
            raise GrokkitError(f"interval: expected two arrays of shape {effect.shape}, found "
                               f"{' and '.join(str(end.shape) for end in ends)}")  # fmt: skip
    size = float(np.clip(3000 / known.sum(), 5, 36))
    faint = float(np.clip(150 / known.sum(), 0.06, 0.4))
    figure = Figure(figsize=(6.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(0, color="black", linewidth=0.8)
    for expert in range(n_experts):
        cases = known[..., expert]
        x, y = observed[..., expert][cases], effect[..., expert][cases]
        if ends is not None:
            low, high = (end[..., expert][cases] for end in ends)
            axes.vlines(x, low, high, color=EXPERT_COLOURS[expert], alpha=faint, linewidth=1,
                        zorder=1)  # fmt: skip
        axes.scatter(x, y, size, color=EXPERT_COLOURS[expert], edgecolor="white", linewidth=0.3,
                     alpha=0.9, zorder=2)  # fmt: skip
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    expert_legend(figure, n_experts)
    return figure
