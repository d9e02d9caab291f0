"""A short digest of a checkpoint, to tell in a moment whether two processes have the same one."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm.auto import tqdm

from grokkit.checkpoint.manifest import read_manifest, sha256
from grokkit.checkpoint.official import Checkpoint, Entry
from grokkit.checkpoint.tensor_file import StackedTensors, TensorFile

_PLACES = 16  # looked at in each array
_SAMPLE = 4096  # bytes of each
_THREADS = 8  # that wait for the disk


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
            files = dict(item for entry in checkpoint for item in entry.file.files.items())
            for of_file in _with_bar(pool.map(sha256, files), files, progress):
                digest.update(of_file.encode())
    return digest.hexdigest()


def _sampled(entry: Entry) -> bytes:
    """SHA-256 of the samples of an entry's arrays."""
    digest, file = hashlib.sha256(), entry.file
    for part in file.parts if isinstance(file, StackedTensors) else (file,):
        _sample(part, digest)
    return digest.digest()


def _sample(file: TensorFile, digest: "hashlib._Hash") -> None:
    with file.reading() as reader:
        for span in file.spans:
            size = min(_SAMPLE, span.nbytes)
            buffer = bytearray(size)
            for start in sorted(
                {i * (span.nbytes - size) // (_PLACES - 1) for i in range(_PLACES)}
            ):
                reader.read(buffer, span.offset + start)
                digest.update(buffer)


def _with_bar(digests: Iterable[str], files: dict[Path, int], progress: bool) -> Iterator[str]:
    """The digests, and a bar that moves on with each."""
    with tqdm(
        total=sum(files.values()), unit="B", unit_scale=True, desc="comparing", disable=not progress
    ) as bar:
        for digest, size in zip(digests, files.values(), strict=True):
            yield digest
            bar.update(size)
