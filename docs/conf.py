"""Sphinx configuration; `make docs` builds with every warning an error."""

import importlib.util
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from docutils import nodes

HERE = Path(__file__).parent

project = "grokkit"
author = "the grokkit developers"
copyright = "the grokkit developers, Apache-2.0"
release = metadata.version("grokkit")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.viewcode",
    "sphinx.ext.doctest",
]
exclude_patterns = ["_build", "_templates", "_static", "_explorers"]
templates_path = ["_templates"]

html_theme = "furo"
html_title = "grokkit"
html_static_path = ["_static"]
html_css_files = ["grokkit.css"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

# The notebooks hold the outputs that nbval checks in the tests: show those. Sphinx reads only what
# lies below this folder.
nb_execution_mode = "off"
if (HERE.parent / "notebooks").is_dir():
    shutil.rmtree(HERE / "notebooks", ignore_errors=True)
    shutil.copytree(
        HERE.parent / "notebooks",
        HERE / "notebooks",
        ignore=shutil.ignore_patterns(".ipynb_checkpoints"),
    )

# Reference pages of an earlier build whose modules are gone.
for page in (HERE / "reference").glob("*.rst"):
    if importlib.util.find_spec(page.stem) is None:
        page.unlink()

# Pages that stand alone, saved by the explorers themselves; docs/widgets.md shows them.
html_extra_path = ["_explorers"]
subprocess.run(
    [sys.executable, HERE / "make_explorers.py", HERE / "_explorers" / "explorers"], check=True
)

pygments_dark_style = "github-dark"  # furo's own underlines what is imported, as if it were a link

autodoc_member_order = "bysource"
autodoc_default_options = {
    "special-members": "__call__, __getitem__, __contains__, __iter__, __len__"
}
autoclass_content = "both"  # a class's arguments stand in its __init__
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
maximum_signature_line_length = 88
default_role = "code"  # docstrings put names in single backticks, as Markdown does


def as_restructured_text(app, what, name, obj, options, lines):
    """Docstrings are Markdown, of which reStructuredText reads all but three things.

    It wants a list's text aligned under its bullet, a letter right after a closing backtick (the
    plural of `ParamSpec`) escaped, and code indented below a directive instead of between fences.
    """
    result = []
    text_column = None  # of the list item that the line may belong to
    in_code = False
    for line in lines:
        if line.startswith("```"):
            in_code = not in_code
            result += ["", f".. code-block:: {line[3:] or 'text'}", ""] if in_code else [""]
        elif in_code:
            result.append("   " + line)
        else:
            if bullet := re.match(r"( *)- ", line):
                text_column = len(bullet[1]) + 2
            elif not line.startswith(" "):
                text_column = None
            elif text_column is not None:
                line = " " * text_column + line.strip()
            result.append(re.sub(r"(?<!`)(`[^`]+`)(?=\w)", r"\1\\ ", line))
    lines[:] = result


def shorten_array_types(app, doctree):
    """Write `Float[Array, ...]` for jaxtyping's `Float[jaxlib._jax.Array, ...]`."""
    for text in list(doctree.findall(nodes.Text)):
        if "jaxlib._jax." in text:
            text.parent.replace(text, nodes.Text(text.replace("jaxlib._jax.", "")))


def setup(app):
    app.connect("autodoc-process-docstring", as_restructured_text)
    app.connect("doctree-read", shorten_array_types)
