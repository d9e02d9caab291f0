"""What all figures share: one colour for each expert, and tokens as they can be read."""

EXPERT_COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#555555",
)  # fmt: skip
"""One colour for each expert, in all figures: Okabe and Ito's palette, which most colour-blind
people can tell apart."""


def token_label(token: str) -> str:
    """A token as it can be read in a tick label: spaces and control characters shown."""
    shown = token.replace("\n", "\\n").replace("\t", "\\t").replace(" ", "␣")
    return shown.replace("$", r"\$")
