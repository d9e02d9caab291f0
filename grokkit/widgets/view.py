"""The one component whose clicks reach Python, and the page that shows the same without it.

A view is drawn by JavaScript from two dictionaries: `data`, computed in Python, and `state`, what
the reader has chosen (a layer, a token). The scripts are plain ones, without imports, so that the
notebook's component and an exported page hold the same code.
"""

import functools
import html
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import anywidget
import traitlets

KINDS = ("routing", "attention", "lens", "sampling", "patching")
_STATIC = Path(__file__).parent / "static"

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'; \
style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ margin: 1.5rem auto; max-width: 70rem; padding: 0 1rem; background: #fff; color: #1a1a1a;
       font-family: system-ui, sans-serif; }}
h1 {{ font-size: 1.3rem; }}
{style}
</style>
</head>
<body>
<h1>{title}</h1>
<div id="grokkit-root" class="grokkit-{kind}"></div>
<p class="gk-note">{note}</p>
<script type="application/json" id="grokkit-data">{data}</script>
<script>
"use strict";
{script}
mountPage();
</script>
</body>
</html>
"""


@functools.cache
def _source(name: str) -> str:
    return (_STATIC / name).read_text()


def _script(*kinds: str) -> str:
    return "\n".join(_source(f"{name}.js") for name in ("core", *kinds))


class View(anywidget.AnyWidget):
    """Draws `data` as one of `KINDS`, and keeps in `state` what the reader chose.

    While `status` is not ready, what is shown is of an earlier request, and looks so.
    """

    _esm = _script(*KINDS) + "\nexport default { render };\n"
    _css = _source("style.css")
    kind = traitlets.Enum(KINDS).tag(sync=True)
    data = traitlets.Dict().tag(sync=True)
    state = traitlets.Dict().tag(sync=True)
    status = traitlets.Enum(("ready", "busy", "failed"), "ready").tag(sync=True)


def page(kind: str, title: str, data: dict[str, Any], state: dict[str, Any]) -> str:
    """A page that needs no kernel and no network, as its content policy makes sure.

    **Arguments:**

    - `kind`: one of `KINDS`.
    - `title`: plain text.
    - `data`, `state`: what the view draws.
    """
    content = {"kind": kind, "data": data, "state": state}
    # Text from a prompt can close no element: < is never written.
    encoded = json.dumps(content, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
    note = f"Saved by grokkit {metadata.version('grokkit')}; needs no network and no kernel."
    return _PAGE.format(
        title=html.escape(title),
        kind=kind,
        note=html.escape(note),
        style=_source("style.css"),
        script=_script(kind),
        data=encoded,
    )
