"""The code in the documentation's tables of equivalents runs as it stands."""

import re
import shlex
from pathlib import Path
from unittest import mock

import pytest

from grokkit import cli, processes
from grokkit.zoo import shipped

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "coming-from-other-libraries.md"
ROW = re.compile(r"^\| .* \| `([^|]*)` \|$", re.MULTILINE)

# On these pages prose may follow the code.
HARDWARE = ("one-gpu.md", "no-gpu.md", "several-hosts.md", "official-weights.md")
HARDWARE_ROW = re.compile(r"^\| .* \| `([^|`]*)`[^|]* \|$", re.MULTILINE)
SHELL = ("grokkit ", "taskset ", "GROKKIT_")
NAMES = """
import jax
import grokkit
from grokkit.checkpoint import open_checkpoint
from grokkit.model import param_specs
from grokkit.sharding import abstract
lm = grokkit.load("nano", progress=False)
"""


def run(code: str, names: dict, page: str) -> None:
    try:
        exec(code, names)  # noqa: S102
    except Exception as e:
        raise AssertionError(f"{page}: `{code}` does not run") from e


@pytest.mark.slow
def test_every_equivalent_runs():
    page = PAGE.read_text()
    (setup,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict = {}
    exec(setup, names)  # noqa: S102
    rows = ROW.findall(page)
    assert len(rows) > 30
    for code in rows:
        run(code, names, PAGE.name)
    assert names["cache"] is not None and names["logits"].ndim == 3


@pytest.mark.parametrize("page", HARDWARE)
def test_commands_in_tables_are_understood(page):
    commands = [c for c in HARDWARE_ROW.findall((DOCS / page).read_text()) if c.startswith(SHELL)]
    assert len(commands) > 1
    for command in commands:
        if command.startswith("grokkit "):
            cli._parser().parse_args(shlex.split(command)[1:])  # exits if it does not know one


@pytest.mark.slow
@pytest.mark.parametrize("page", HARDWARE)
def test_every_equivalent_for_other_hardware_runs(page, tmp_path, monkeypatch):
    """With nano in Grok-1's place; calls that connect processes are only checked for form."""
    monkeypatch.chdir(tmp_path)
    for name in ("checkpoints", "port"):
        Path(name).symlink_to(shipped("nano"))
    names: dict = {}
    exec(NAMES, names)  # noqa: S102
    names["processes"] = mock.create_autospec(processes)
    rows = [c for c in HARDWARE_ROW.findall((DOCS / page).read_text()) if not c.startswith(SHELL)]
    assert len(rows) > 4
    for code in rows:
        run(code, names, page)
