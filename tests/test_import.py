"""`import grokkit` stays light: plotting, widgets and training wait until they are asked for."""

import subprocess
import sys

WAITING = ["matplotlib", "ipywidgets", "IPython", "optax", "treescope", "huggingface_hub"]


def test_import_loads_no_plotting_and_no_widgets():
    code = (
        "import sys, grokkit\n"
        f"print(*[name for name in {WAITING} if name in sys.modules])\n"
        "print('jax' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True
    )
    loaded, jax_is_loaded = result.stdout.splitlines()
    assert loaded == ""
    assert jax_is_loaded == "True"  # the check itself sees what is loaded
