"""A search for NaN and infinite weights, reading a checkpoint from start to end."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Shaped

from grokkit.checkpoint.manifest import check_digests, read_manifest
from grokkit.checkpoint.official import Checkpoint, Entry
from grokkit.checkpoint.pickle_objects import INT8
from grokkit.checkpoint.progress import byte_bar
from grokkit.checkpoint.refusal import refusal
from grokkit.checkpoint.tensor_file import INT4, ArraySpan, StackedTensors, TensorFile

_CHUNK = 1 << 22  # entries looked at together: a few tens of megabytes with the temporaries


@dataclasses.dataclass(frozen=True)
class NonFinite:
    """An array with entries that are not numbers, or not finite."""

    entry: Entry
    what: str
    """`"weight"` or `"scales"`."""
    count: int
    """How many such entries there are."""
    first: tuple[int, ...]
    """Index of the first."""

    def __str__(self) -> str:
        return (
            f"{self.entry.file.path.name} ({self.entry.key.name}): {self.count:,} in its "
            f"{self.what}, the first at {list(self.first)}"
        )


def check_finite(checkpoint: Checkpoint, progress: bool = True) -> None:
    """Read every float weight and every scale, and refuse NaN and infinity.

    **Arguments:**

    - `checkpoint`: from `open_checkpoint`.
    - `progress`: show a progress bar, in bytes.

    **Raises:** `CheckpointError` that lists the arrays with such entries.
    """
    found = find_non_finite(checkpoint, progress)
    if found:
        shown = "\n    ".join(map(str, found[:10]))
        more = f"\n    and {len(found) - 10} more arrays" if len(found) > 10 else ""
        raise refusal(
            checkpoint.directory,
            "finite weights and scales",
            f"NaN or infinity in {len(found)} arrays:\n    {shown}{more}",
            "download these files again; if you wrote them, look at the training run",
        )


def check_content(checkpoint: Checkpoint, progress: bool = True) -> None:
    """Read a checkpoint's files and refuse altered ones, and values that are not finite.

    **Arguments:** as for `check_finite`. What has a manifest, as conversions have, is compared with
    the digests in it.

    **Raises:** `CheckpointError` that names the files or arrays.
    """
    records = read_manifest(checkpoint.directory)
    if records:
        check_digests(checkpoint.directory, records, progress)
    check_finite(checkpoint, progress)


def find_non_finite(checkpoint: Checkpoint, progress: bool = True) -> list[NonFinite]:
    """The arrays with NaN or infinite entries; arguments as for `check_finite`."""
    jobs = [
        (entry, what, span)
        for entry in checkpoint
        for what, span in (("weight", entry.file.weight), ("scales", entry.file.scales))
        if span is not None and span.dtype not in (INT8, INT4)
    ]
    found = []
    total = sum(span.nbytes for _, _, span in jobs)
    with byte_bar(f"checking {checkpoint.directory.name}", total, progress) as bar:
        for entry, what, span in jobs:
            count, first = 0, 0
            for start, chunk in _chunks(entry.file, span):
                bad = ~np.isfinite(chunk)
                if bad.any():
                    first = first if count else start + int(np.argmax(bad))
                    count += int(np.count_nonzero(bad))
            if count:
                index = tuple(map(int, np.unravel_index(first, span.shape)))
                found.append(NonFinite(entry, what, count, index))
            bar.update(span.nbytes)
    return found


def _chunks(
    file: TensorFile | StackedTensors, span: ArraySpan
) -> Iterator[tuple[int, Shaped[np.ndarray, " n"]]]:
    """A floating-point array's entries in order, with the number of each chunk's first."""
    parts = file.parts if isinstance(file, StackedTensors) else (file,)
    n = math.prod(span.shape) // len(parts)
    for i, part in enumerate(parts):
        place = span if part is file else part.weight
        flat: Any = part.open(dataclasses.replace(place, shape=(n,)))
        for start in range(0, n, _CHUNK):
            yield i * n + start, flat[start : start + _CHUNK]
