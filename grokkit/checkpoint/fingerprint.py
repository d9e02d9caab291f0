"""A short digest of a checkpoint, to tell in a moment whether two processes have the same one."""

import hashlib
import json

import numpy as np

from grokkit.checkpoint.official import Checkpoint
from grokkit.checkpoint.tensor_file import ArraySpan, StackedTensors

_SAMPLE = 4096  # bytes of each array


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 of the configuration, of every array's dtype and shape, and of its first bytes.

    Reads a few megabytes of a checkpoint of any size. It does not tell checkpoints apart that
    differ only later in their arrays; the digests in a conversion's manifest do.

    **Arguments:**

    - `checkpoint`: from `open_checkpoint`.

    **Returns:** 64 hexadecimal digits.
    """
    digest = hashlib.sha256(json.dumps(checkpoint.config.to_dict(), sort_keys=True).encode())
    for entry in checkpoint:
        digest.update(f"{entry.key.name} {entry.file} {entry.file.k_last}\n".encode())
        file = entry.file
        for part in file.parts if isinstance(file, StackedTensors) else (file,):
            for span in part.spans:
                start = ArraySpan(np.dtype(np.uint8), (min(_SAMPLE, span.nbytes),), span.offset)
                digest.update(np.asarray(part.open(start)).tobytes())
    return digest.hexdigest()
