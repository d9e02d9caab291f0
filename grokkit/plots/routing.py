"""Figures of where routers send tokens."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Float, Int
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from grokkit.plots.style import EXPERT_COLOURS, token_label


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

    ```python
    _, cache = lm.run_with_cache(text, ["expert_indices", "expert_weights"])
    chosen_experts(lm.to_str_tokens(text), cache["expert_indices"][:, 0],
                   cache["expert_weights"][:, 0])
    ```
    """
    experts, weights = np.asarray(experts), np.asarray(weights)
    n_layers, n, n_chosen = experts.shape
    if len(tokens) != n:
        raise ValueError(f"expected {n} token labels, one for each position, found {len(tokens)}")
    if experts.max() >= len(EXPERT_COLOURS):
        raise ValueError(f"expected at most {len(EXPERT_COLOURS)} experts, found expert "
                         f"{experts.max()}")  # fmt: skip
    # A row of pixels for each layer, and one for each choice across a token's column.
    image = np.array([[to_rgba(EXPERT_COLOURS[e]) for e in row] for row in
                      experts.reshape(n_layers, -1)])  # fmt: skip
    image[..., 3] = 0.25 + 0.75 * weights.reshape(n_layers, -1) / max(weights.max(), 1e-9)
    figure = Figure(figsize=(max(5.0, 0.34 * n + 1.8), 0.3 * n_layers + 2.0), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(image, aspect="auto", origin="lower", interpolation="none",
                extent=(-0.5, n - 0.5, -0.5, n_layers - 0.5))  # fmt: skip
    axes.set_xticks(np.arange(n), [token_label(t) for t in tokens], rotation=60, ha="right",
                    rotation_mode="anchor", fontsize=9)  # fmt: skip
    step = max(1, n_layers // 12)
    axes.set_yticks(np.arange(0, n_layers, step))
    axes.set_xticks(np.arange(n + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(n_layers + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(f"token (its {n_chosen} experts side by side, most probable first)")
    axes.set_ylabel("layer")
    axes.set_title(title)
    used = range(int(experts.max()) + 1)
    swatches = [axes.scatter([], [], marker="s", s=60, color=EXPERT_COLOURS[e]) for e in used]
    axes.legend(swatches, [str(e) for e in used], title="expert", loc="center left",
                bbox_to_anchor=(1.0, 0.5), frameon=False)  # fmt: skip
    return figure
