"""environment.yml asks conda for what pyproject.toml asks pip for."""

import re
import tomllib
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).parents[1]
EXTRA_OF_SELF = re.compile(r"grokkit\[(.+)\]")
CONDA_NAMES = {"matplotlib-base": "matplotlib"}  # conda's matplotlib would bring a Qt as well
CONDA_ONLY = {"python", "pip", "git", "make"}


def split(requirement: str) -> tuple[str, str]:
    """`pyright[nodejs]>=1.1` -> (`pyright[nodejs]`, `>=1.1`), the name normalised."""
    name, bound = re.fullmatch(r"([\w.\[\]-]+)\s*(.*)", requirement).groups()
    return name.lower().replace("_", "-"), bound


def pip_requirements(project: dict) -> dict[str, str]:
    """What `pip install grokkit[dev]` asks for."""
    extras = project["optional-dependencies"]
    found, waiting = {}, [*project["dependencies"], *extras["dev"]]
    while waiting:
        requirement = waiting.pop()
        if of_self := EXTRA_OF_SELF.fullmatch(requirement):
            for extra in of_self[1].split(","):
                waiting += extras[extra.strip()]
            continue
        name, bound = split(requirement)
        assert found.setdefault(name, bound) == bound, f"{name} is given two bounds"
    return found


def test_environment_agrees_with_pyproject():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    environment = yaml.safe_load((REPOSITORY / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert pip["pip"].pop() == "--editable ."
    listed = [split(requirement) for requirement in conda + pip["pip"]]
    asked = {CONDA_NAMES.get(name, name): bound for name, bound in listed}
    assert len(asked) == len(listed), "a package is listed twice"

    assert asked["python"] == project["requires-python"]
    assert CONDA_ONLY <= asked.keys()
    assert {n: b for n, b in asked.items() if n not in CONDA_ONLY} == pip_requirements(project)
