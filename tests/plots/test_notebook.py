"""A figure that is a cell's value is drawn, without a pyplot of the user's."""

import subprocess
import sys

CODE = """
import base64
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
from matplotlib.figure import Figure
before = shell.display_formatter.format(Figure())[0]
from grokkit import plots
figure = plots.patching_map([[0.0, 1.0]])
after = shell.display_formatter.format(figure)[0]
png = after["image/png"]
print("image/png" in before, (base64.b64decode(png) if isinstance(png, str) else png)[1:4])
"""


def test_ipython_draws_figures_without_pyplot():
    shown = subprocess.run(
        [sys.executable, "-c", CODE], check=True, stdout=subprocess.PIPE, text=True
    ).stdout.strip()
    assert shown == "False b'PNG'"
