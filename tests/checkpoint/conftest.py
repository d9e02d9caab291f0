import json
import shutil
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent.parent / "golden" / "tiny"


@pytest.fixture(scope="session")
def golden() -> Path:
    """A 12-layer checkpoint that the official code wrote and read."""
    return GOLDEN


@pytest.fixture(scope="session")
def golden_files() -> list[Path]:
    return sorted((GOLDEN / "ckpt-0").iterdir())


@pytest.fixture(scope="session")
def golden_names() -> list[str]:
    return json.loads((GOLDEN / "names.json").read_text())


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The golden checkpoint, to be damaged."""
    target = tmp_path / "tiny"
    shutil.copytree(GOLDEN / "ckpt-0", target / "ckpt-0")
    shutil.copy(GOLDEN / "config.json", target)
    return target
