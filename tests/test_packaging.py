"""The wheel holds the whole package, the shipped model's weights among it, and nothing else."""

import os
import signal
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
        ["git", "ls-files", "grokkit", "grokkit_command.py"],
        cwd=REPOSITORY,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    (wheel,) = tmp_path.glob("grokkit-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        (entry_points,) = [name for name in held if name.endswith("/entry_points.txt")]
        assert "grokkit = grokkit_command:main" in archive.read(entry_points).decode()
    package = {name for name in held if ".dist-info/" not in name}
    # Files that are not committed yet may be there too; compiled and temporary ones never.
    assert set(listed.stdout.split()) <= package
    assert not [name for name in package if "__pycache__" in name or name.endswith(".tmp")]


def test_interrupted_while_libraries_are_imported(tmp_path):
    """With a package of the same name that takes long to import."""
    (tmp_path / "grokkit").mkdir()
    slow = "import time\nprint('importing', flush=True)\ntime.sleep(60)\n"
    (tmp_path / "grokkit" / "__init__.py").write_text(slow)
    run = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('c', {str(REPOSITORY / 'grokkit_command.py')!r})\n"
        "command = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(command)\n"
        "sys.exit(command.main())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", run],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "grokkit: interrupted\n")
