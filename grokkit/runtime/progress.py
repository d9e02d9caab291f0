"""Progress bars in bytes."""

from typing import Any

from tqdm.auto import tqdm


def byte_bar(what: str, total: int, progress: bool, initial: int = 0) -> Any:
    """A bar that says what happens to how many bytes; nothing is shown unless `progress`."""
    return tqdm(
        total=total, initial=initial, unit="B", unit_scale=True, desc=what, disable=not progress
    )
