"""The API reference leaves no module out."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
NO_API = {"grokkit.demo", "grokkit.cli", "grokkit.zoo", "grokkit.layers"}  # commands and folders


def modules(folder: Path, package: str) -> set[str]:
    """The modules of a package, and its packages by their own name alone."""
    files = {f"{package}.{path.stem}" for path in folder.glob("*.py") if path.stem != "__init__"}
    return files | {f"{package}.{path.parent.name}" for path in folder.glob("*/__init__.py")}


def test_every_module_is_in_the_reference():
    pages = "".join(page.read_text() for page in (REPOSITORY / "docs" / "api").glob("*.md"))
    documented = set(re.findall(r"automodule:: (\S+)", pages))
    package = REPOSITORY / "grokkit"
    expected = modules(package, "grokkit") | modules(package / "layers", "grokkit.layers")
    assert documented == expected - NO_API
