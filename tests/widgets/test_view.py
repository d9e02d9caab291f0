"""The exported page: nothing in it runs but its own script, and nothing is fetched."""

import json
import re

import pytest

from grokkit.widgets.view import KINDS, View, page

EVIL = '</script><script>window.broken = 1</script><img src=x onerror="window.broken = 1">&<!--'


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_becomes_markup(kind):
    text = page(kind, f"title {EVIL}", {"tokens": [EVIL, "\u2028"]}, {"token": None})
    assert len(re.findall(r"<script\b", text)) == 2  # the data and the one that draws them
    assert len(re.findall(r"</script>", text)) == 2
    assert "<img" not in text and "<!--" not in text
    found = re.search(r'<script type="application/json" id="grokkit-data">(.*?)</script>', text)
    assert found is not None
    saved = json.loads(found[1])
    assert saved == {"kind": kind, "data": {"tokens": [EVIL, "\u2028"]}, "state": {"token": None}}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_fetched(kind):
    text = page(kind, "a page", {}, {})
    addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"')]*", text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, which nobody fetches
    assert not re.search(
        r"\b(?:src|href)\s*=|@import|url\(|fetch\(|XMLHttpRequest|import\s*\(", text
    )
    assert "default-src 'none'" in text
    assert re.findall(r"^views\.(\w+) =", text, re.MULTILINE) == [kind]  # its own view alone


def test_scripts_never_write_markup():
    """Text goes into elements as text, so that no prompt can be read as HTML."""
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", View._esm
    )
