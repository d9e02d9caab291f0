"""The wheel holds the whole package, the shipped model's weights among it, and nothing else."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.mark.slow
def test_wheel_holds_what_git_holds(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path]
    subprocess.run(build, cwd=REPOSITORY, check=True)
    listed = subprocess.run(
        ["git", "ls-files", "grokkit"],
        cwd=REPOSITORY,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    (wheel,) = tmp_path.glob("grokkit-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        (entry_points,) = [name for name in held if name.endswith("/entry_points.txt")]
        assert "grokkit = grokkit.cli:main" in archive.read(entry_points).decode()
    package = {name for name in held if ".dist-info/" not in name}
    # Files that are not committed yet may be there too; compiled and temporary ones never.
    assert set(listed.stdout.split()) <= package
    assert not [name for name in package if "__pycache__" in name or name.endswith(".tmp")]
