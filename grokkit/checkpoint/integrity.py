"""Whether two checkpoints are the same, whether files were altered, whether values are finite."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Shaped

from grokkit.checkpoint.manifest import check_digests, read_manifest, sha256
from grokkit.checkpoint.official import Checkpoint, Entry
from grokkit.checkpoint.pickle_objects import INT8
from grokkit.checkpoint.refusal import refusal
from grokkit.checkpoint.tensor_file import INT4, ArraySpan, StackedTensors, TensorFile
from grokkit.runtime.progress import byte_bar

_PLACES = 16  # looked at in each array, for a fingerprint
_SAMPLE = 4096  # bytes of each
_THREADS = 8  # that wait for the disk
_CHUNK = 1 << 22  # entries looked at together: a few tens of megabytes with the temporaries


def fingerprint(checkpoint: Checkpoint, whole: bool = False, progress: bool = False) -> str:
    """SHA-256 of the configuration, of every array's dtype and shape, and of samples of its bytes.

    The samples are 4 KB at each of 16 places from an array's first byte to its last: of Grok-1
    80 MB in all. Other weights are told apart by them, and so is a file that was cut off or that
    holds a hole of a fifteenth of an array. A few altered bytes between the samples are not; for
    those there are the digests of all files in a conversion's manifest, which count here too, and
    `whole`.

    **Arguments:**

    - `checkpoint`: from `open_checkpoint`.
    - `whole`: read all files.
    - `progress`: with `whole`, show a progress bar, in bytes.

    **Returns:** 64 hexadecimal digits.
    """
    digest = hashlib.sha256(json.dumps(checkpoint.config.to_dict(), sort_keys=True).encode())
    for name, record in sorted(read_manifest(checkpoint.directory).items()):
        digest.update(f"{name} {record.sha256}\n".encode())
    with ThreadPoolExecutor(_THREADS, "fingerprint") as pool:
        for entry, sampled in zip(checkpoint, pool.map(_sampled, checkpoint), strict=True):
            digest.update(f"{entry.key.name} {entry.file} {entry.file.k_last}\n".encode())
            digest.update(sampled)
        if whole:
            files = checkpoint.files
            with byte_bar("comparing", sum(files.values()), progress) as bar:
                for of_file, size in zip(pool.map(sha256, files), files.values(), strict=True):
                    digest.update(of_file.encode())
                    bar.update(size)
    return digest.hexdigest()


def _sampled(entry: Entry) -> bytes:
    """SHA-256 of the samples of an entry's arrays."""
    digest, file = hashlib.sha256(), entry.file
    for part in _parts(file):
        with part.reading() as reader:
            for span in part.spans:
                size = min(_SAMPLE, span.nbytes)
                buffer = bytearray(size)
                last = span.nbytes - size
                for start in sorted({i * last // (_PLACES - 1) for i in range(_PLACES)}):
                    reader.read(buffer, span.offset + start)
                    digest.update(buffer)
    return digest.digest()


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


def check_finite(checkpoint: Checkpoint, progress: bool = True) -> None:
    """Read every float weight and every scale, and refuse NaN and infinity.

    **Arguments:**

    - `checkpoint`: from `open_checkpoint`.
    - `progress`: show a progress bar, in bytes.

    **Raises:** `CheckpointError` that lists the arrays with such entries.
    """
    spans = [
        (entry, what, span)
        for entry in checkpoint
        for what, span in (("weight", entry.file.weight), ("scales", entry.file.scales))
        if span is not None and span.dtype not in (INT8, INT4)
    ]
    found = []
    total = sum(span.nbytes for _, _, span in spans)
    with byte_bar(f"checking {checkpoint.directory.name}", total, progress) as bar:
        for entry, what, span in spans:
            count, first = 0, 0
            for start, chunk in _chunks(entry.file, span):
                bad = ~np.isfinite(chunk)
                if bad.any():
                    first = first if count else start + int(np.argmax(bad))
                    count += int(np.count_nonzero(bad))
            if count:
                index = list(map(int, np.unravel_index(first, span.shape)))
                name = f"{entry.file.path.name} ({entry.key.name})"
                found.append(f"{name}: {count:,} in its {what}, the first at {index}")
            bar.update(span.nbytes)
    if found:
        more = [f"and {len(found) - 10} more arrays"] if len(found) > 10 else []
        raise refusal(
            checkpoint.directory,
            "finite weights and scales",
            "\n    ".join([f"NaN or infinity in {len(found)} arrays:", *found[:10], *more]),
            "download these files again; if you wrote them, look at the training run",
        )


def _chunks(
    file: TensorFile | StackedTensors, span: ArraySpan
) -> Iterator[tuple[int, Shaped[np.ndarray, " n"]]]:
    """A floating-point array's entries in order, with the number of each chunk's first."""
    parts = _parts(file)
    n = math.prod(span.shape) // len(parts)
    for i, part in enumerate(parts):
        place = span if part is file else part.weight
        flat: Any = part.open(dataclasses.replace(place, shape=(n,)))
        for start in range(0, n, _CHUNK):
            yield i * n + start, flat[start : start + _CHUNK]


def _parts(file: TensorFile | StackedTensors) -> tuple[TensorFile, ...]:
    return file.parts if isinstance(file, StackedTensors) else (file,)
