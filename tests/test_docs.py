"""The code in the documentation's tables of equivalents runs as it stands."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "coming-from-other-libraries.md"
ROW = re.compile(r"^\| .* \| `([^|]*)` \|$", re.MULTILINE)


@pytest.mark.slow
def test_every_equivalent_runs():
    page = PAGE.read_text()
    (setup,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict = {}
    exec(setup, names)  # noqa: S102
    rows = ROW.findall(page)
    assert len(rows) > 30
    for code in rows:
        try:
            exec(code, names)  # noqa: S102
        except Exception as e:
            raise AssertionError(f"{PAGE.name}: `{code}` does not run") from e
    assert names["cache"] is not None and names["logits"].ndim == 3
