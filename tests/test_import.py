"""`import grokkit` stays light: plotting, widgets and training wait until they are asked for."""

import subprocess
import sys

WAITING = [
    "matplotlib",
    "ipywidgets",
    "anywidget",
    "IPython",
    "optax",
    "treescope",
    "huggingface_hub",
    "numba",
    "llvmlite",
    "scipy",
    "rich",
]

CODE = f"""
import sys
import grokkit
print([name for name in {WAITING} if name in sys.modules])
import matplotlib
print([name for name in {WAITING} if name in sys.modules])
"""


def test_import_loads_no_plotting_and_no_widgets():
    result = subprocess.run(
        [sys.executable, "-c", CODE], check=True, stdout=subprocess.PIPE, text=True
    )
    after_grokkit, after_matplotlib = result.stdout.splitlines()
    assert after_grokkit == "[]"
    assert after_matplotlib == "['matplotlib']"  # what is loaded, the check does see
