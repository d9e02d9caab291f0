"""The models that ship with grokkit, and the recipes that trained them."""

from pathlib import Path

_WEIGHTS = Path(__file__).parent / "weights"


def shipped(name: str) -> Path | None:
    """The directory of a shipped model's checkpoint; `None` if none has this name."""
    directory = _WEIGHTS / name
    known = {path.name for path in _WEIGHTS.iterdir()} if _WEIGHTS.is_dir() else set()
    return directory if name in known else None
