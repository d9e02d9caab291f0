"""What all figures share: one colour for each expert, readable tokens, checks, panels.

Layers run upwards, as the stream does. Sizes are in inches, and grow with what is shown.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize, TwoSlopeNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from grokkit.errors import GrokkitError

EXPERT_COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#555555",
)  # fmt: skip
"""One colour for each expert, in all figures: Okabe and Ito's palette, which most colour-blind
people can tell apart."""

MISSING = "#DDDDDD"
"""Where there is no value: NaN, an expert with itself, the future that a query cannot see."""

_LABELLED_TOKENS = 128
"""Most tokens that an axis labels; beyond, every second or third."""
_SLANTED_TOKENS = 32
"""Most tokens whose labels slant; beyond, they stand upright and are smaller."""


def token_label(token: str, longest: int = 16) -> str:
    """A token as it can be read in a tick label.

    Spaces and line ends are shown, characters that the font lacks as their escape, and what is
    longer than `longest` characters is cut.
    """
    shown = token.replace("\n", "\\n").replace("\t", "\\t").replace(" ", "␣")
    font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    shown = "".join(
        c if font.get_char_index(ord(c)) and c.isprintable() else ascii(c)[1:-1] for c in shown
    )
    if len(shown) > longest:
        shown = shown[: longest - 1] + "…"
    return shown.replace("$", r"\$")


def checked(name: str, values: Any, *axes: str, lead: bool = False) -> np.ndarray:
    """The array, once it has these axes and is not empty.

    **Arguments:**

    - `name`: what the message calls it.
    - `axes`: names of the axes it must have.
    - `lead`: whether an axis `layer` may stand before them.

    **Raises:** `GrokkitError`, a `ValueError`, with the shape that was found.
    """
    array = np.asarray(values)
    expected = f"{name}: expected axes [{', '.join(axes)}]"
    if lead:
        expected += f" or [{', '.join(('layer', *axes))}]"
    if array.ndim != len(axes) and not (lead and array.ndim == len(axes) + 1):
        raise GrokkitError(f"{expected}, found shape {array.shape}")
    if array.size == 0:
        raise GrokkitError(f"{expected}, none of them empty, found shape {array.shape}")
    return array


def check_tokens(tokens: Sequence[str], n: int) -> None:
    """**Raises:** `GrokkitError` unless there is a token for each of `n` positions."""
    if len(tokens) != n:
        raise GrokkitError(f"expected {n} token labels, one for each position, found {len(tokens)}")


def check_experts(n_experts: int) -> None:
    """**Raises:** `GrokkitError` for more experts than there are colours."""
    if n_experts > len(EXPERT_COLOURS):
        raise GrokkitError(f"expected at most {len(EXPERT_COLOURS)} experts, one for each colour, "
                           f"found {n_experts}")  # fmt: skip


def ink(colour: Any) -> str:
    """Black or white, whichever is easier to read on `colour`."""
    # Relative luminance, with 2.2 for the exponent of sRGB.
    luminance = np.dot(np.asarray(to_rgb(colour)) ** 2.2, (0.2126, 0.7152, 0.0722))
    return "white" if luminance < 0.25 else "black"


# Axes


def token_inches(n: int) -> float:
    """How long an axis of `n` tokens should be."""
    return 0.34 * n if n <= 24 else max(0.34 * 24, 0.19 * min(n, _LABELLED_TOKENS))


def token_axis(axes: Axes, tokens: Sequence[str], which: str = "x") -> None:
    """Label an axis with tokens; on the x axis they lie, slant or stand, as there is room."""
    n = len(tokens)
    step = math.ceil(n / _LABELLED_TOKENS)
    places = np.arange(0, n, step)
    labels = [token_label(t) for t in tokens[::step]]
    size = 9 if n <= _SLANTED_TOKENS else 7.5
    if which == "y":
        axes.set_yticks(places, labels, fontsize=size)
    elif n <= _SLANTED_TOKENS and max(map(len, labels)) <= 2:
        axes.set_xticks(places, labels, fontsize=size)
    elif n <= _SLANTED_TOKENS:
        axes.set_xticks(places, labels, fontsize=size, rotation=60, ha="right",
                        rotation_mode="anchor")  # fmt: skip
    else:
        axes.set_xticks(places, labels, fontsize=size, rotation=90)


def number_axis(axes: Axes, n: int, which: str = "y", most: int = 16) -> None:
    """Number layers, heads or positions: all of them, or every 2nd, 4th, 8th."""
    step = 1
    while math.ceil(n / step) > most:
        step *= 2
    (axes.set_yticks if which == "y" else axes.set_xticks)(np.arange(0, n, step))


def expert_axis(axes: Axes, n_experts: int, which: str = "x", size: float = 8) -> None:
    """Number experts on squares of their colours."""
    numbers = np.arange(n_experts)
    (axes.set_xticks if which == "x" else axes.set_yticks)(numbers, numbers.astype(str))
    axes.tick_params(axis=which, length=0, pad=size * 0.55, labelsize=size)  # type: ignore[arg-type]
    labels = axes.get_xticklabels() if which == "x" else axes.get_yticklabels()
    for label, colour in zip(labels, EXPERT_COLOURS, strict=False):
        label.set_bbox({"facecolor": colour, "edgecolor": "none", "boxstyle": "square,pad=0.25"})
        label.set_color(ink(colour))


def expert_legend(figure: Figure, n_experts: int, *more: Any) -> None:
    """Which colour is which expert, right of the figure; `more` are handles put below."""
    handles = [Patch(color=c, label=str(e)) for e, c in enumerate(EXPERT_COLOURS[:n_experts])]
    figure.legend(
        handles=[*handles, *more], title="expert", loc="outside right center", frameon=False,
        handlelength=1, handleheight=1, fontsize=9,
    )  # fmt: skip


def bare(axes: Axes) -> None:
    """No ticks and no frame: for cells, which show where they end."""
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)


# Panels and colours


def panel_grid(n: int, most: int = 8) -> tuple[int, int]:
    """Rows and columns for `n` panels: one row if they fit in four, else near a square."""
    columns = n if n <= 4 else min(most, math.ceil(math.sqrt(n)))
    return math.ceil(n / columns), columns


def panels(figure: Figure, n: int, most: int = 8) -> list[Axes]:
    """`n` axes in a grid that share both directions, numbered only on its left and lower edge."""
    rows, columns = panel_grid(n, most)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for i, axes in enumerate(grid.flat):
        axes.set_visible(i < n)
        # An axes above an unused place closes its column.
        axes.tick_params(labelbottom=i < n <= i + columns, labelleft=i % columns == 0)
    return list(grid.flat[:n])


def around(centre: float, values: np.ndarray) -> TwoSlopeNorm:
    """Colours for shares from 0, white at `centre`."""
    top = float(np.nanmax(values, initial=0.0))
    return TwoSlopeNorm(centre, 0.0, max(top, centre * 1.5))


def symmetric(values: np.ndarray) -> Normalize:
    """Colours for signed values, white at 0."""
    largest = float(np.nanmax(np.abs(values), initial=0.0)) or 1.0
    return Normalize(-largest, largest)


def write_cells(
    axes: Axes, texts: np.ndarray, values: np.ndarray, norm: Normalize, colours: Colormap,
    size: float, bold: np.ndarray | None = None,
) -> None:  # fmt: skip
    """Write into the cells of an image, legibly on each one's colour."""
    inks = np.apply_along_axis(ink, -1, colours(norm(np.nan_to_num(values)))[..., :3])
    for (row, column), text in np.ndenumerate(texts):
        strong = bold is not None and bool(bold[row, column])
        axes.text(column, row, text, ha="center", va="center", fontsize=size, clip_on=True,
                  color=inks[row, column], weight="bold" if strong else "normal")  # fmt: skip
