"""Opening a checkpoint in any of the layouts that grokkit reads."""

import os
import sys
from pathlib import Path

from grokkit.checkpoint.dialect import FORMAT, SUFFIX, open_dialect
from grokkit.checkpoint.hugging_face import is_hugging_face, open_hugging_face
from grokkit.checkpoint.manifest import MANIFEST
from grokkit.checkpoint.official import FOLDER, Checkpoint, open_official
from grokkit.checkpoint.refusal import refusal
from grokkit.checkpoint.safetensors_file import read_safetensors
from grokkit.config import GrokConfig


def open_checkpoint(
    directory: str | os.PathLike[str], config: GrokConfig | None = None
) -> Checkpoint:
    """Find a checkpoint, read all its headers and check them. No weight is read.

    **Arguments:**

    - `directory`: holds `ckpt-0/`, and optionally `config.json` and `tokenizer.model`; or the
        safetensors files that `grokkit convert` wrote, or those of a port to Hugging Face
        transformers with their `config.json`. The `ckpt-0` folder itself will do.
    - `config`: the model's sizes; by default those that the checkpoint states, or of Grok-1 if it
        is 770 official files and there is no `config.json`.

    **Returns:** a `Checkpoint`.

    **Raises:** `CheckpointError` if a file is missing, extra, misnumbered, damaged, or not of the
    shape, dtype and scale grouping that the sizes demand, and on a big-endian processor;
    `ConfigError` for a bad `config.json`.
    """
    if sys.byteorder != "little":
        # bfloat16 has no byte order of its own in numpy: its numbers would be read wrongly.
        raise refusal(
            directory, "a little-endian processor: the numbers of every layout are", "a big-endian "
            "one", "read it on another machine; x86-64 and ARM are little-endian",
        )  # fmt: skip
    root = Path(directory).expanduser()
    if not root.is_dir() or (root / FOLDER).exists():
        return open_official(directory, config)
    root = root.absolute()
    paths = sorted(p for p in root.iterdir() if p.name.endswith(SUFFIX) and p.name[0] != ".")
    if not paths:
        if (root / MANIFEST).exists():
            return open_dialect(root, config)  # which says what is missing
        return open_official(directory, config)
    if read_safetensors(paths[0]).metadata.get("format") == FORMAT:
        return open_dialect(root, config)
    files = [read_safetensors(path) for path in paths]
    names = {name for file in files for name in file.spans}
    if is_hugging_face(names):
        return open_hugging_face(root, files, config)
    shown = ", ".join(sorted(names)[:3])
    raise refusal(
        root,
        "safetensors files of grokkit's own layout, or of a port of Grok-1 to Hugging Face "
        "transformers (model.embed_tokens.weight and so on)",
        f"arrays called {shown or 'nothing'}",
        "give the directory of a Grok-1; all files of a port must be there",
    )
