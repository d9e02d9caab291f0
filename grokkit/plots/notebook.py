"""Showing figures in a notebook that has not imported pyplot."""

import sys
from typing import Any


def show_figures() -> None:
    """Let IPython, if this is it, draw a `Figure` that is a cell's value.

    It learns that otherwise from pyplot, which nothing here needs. Once pyplot is imported, its
    choice of formats stands.
    """
    if "IPython" not in sys.modules:
        return
    from IPython.core.getipython import get_ipython
    from IPython.core.pylabtools import select_figure_formats
    from matplotlib.figure import Figure

    shell: Any = get_ipython()
    if shell is None:
        return
    formatters = shell.display_formatter.formatters
    if not any(Figure in formatters[kind] for kind in ("image/png", "image/svg+xml")):
        select_figure_formats(shell, {"png"})
