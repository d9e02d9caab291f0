"""One form for every complaint about a checkpoint."""

import os

from grokkit.errors import CheckpointError

DOWNLOAD_AGAIN = (
    "download the file again from the official source; do not open it with pickle to look inside"
)
DOWNLOAD_COMMAND = '`hf download xai-org/grok-1 --include "ckpt-0/*" --local-dir checkpoints`'


class Refused(Exception):
    """Why bytes are not an official tensor, before it is known which file they came from."""

    def __init__(self, expected: str, found: str, remedy: str = DOWNLOAD_AGAIN):
        super().__init__(expected, found, remedy)
        self.expected = expected
        self.found = found
        self.remedy = remedy


def refusal(
    where: str | os.PathLike[str], expected: str, found: str, remedy: str
) -> CheckpointError:
    """The error that names the file, what was expected, what was found and what to do."""
    return CheckpointError(
        f"{os.fspath(where)}\n  expected: {expected}\n  found: {found}\n  what to do: {remedy}"
    )
