"""grokkit's own safetensors layout: what its arrays are called, and how its files are opened.

    model-00001-of-00066.safetensors ...   a layer's arrays are together
    model.safetensors.index.json           which file holds which array
    manifest.json                          size and SHA-256 of each file; written last
    tokenizer.model                        optional

Arrays are stored as the model holds them, so that loading transposes none: 8-bit and 4-bit matrices
as [..., n, k], with `.weight` and `.scales`; matrices of floats as [..., k, n]. Each file's metadata
holds the model's configuration and how each matrix is stored.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from grokkit.checkpoint.manifest import MANIFEST, check_sizes, read_manifest
from grokkit.checkpoint.names import TensorKey, tensor_keys
from grokkit.checkpoint.official import Checkpoint, Entry
from grokkit.checkpoint.pickle_objects import BFLOAT16, FLOAT32, INT8
from grokkit.checkpoint.refusal import refusal
from grokkit.checkpoint.safetensors_file import Arrays, SafetensorsFile, read_safetensors
from grokkit.checkpoint.tensor_file import INT4, ArraySpan, TensorFile
from grokkit.config import GrokConfig
from grokkit.errors import ConfigError

FORMAT = "grokkit"
VERSION = "1"
INDEX = "model.safetensors.index.json"
SUFFIX = ".safetensors"

FLOATS = {dtype.name: dtype for dtype in (FLOAT32, BFLOAT16, np.dtype("<f2"))}
INTEGERS = {dtype.name: dtype for dtype in (INT8, INT4)}
_UINT8 = np.dtype(np.uint8)
_AGAIN = "convert the checkpoint again"


@dataclasses.dataclass(frozen=True)
class Storage:
    """How a parameter is stored."""

    dtype: np.dtype
    """float32, bfloat16 or float16; or int8 or int4, with scales."""
    groups: int | None = None
    """Number of scale groups along the contracting axis; `None` for floats."""

    def __str__(self) -> str:
        return self.dtype.name if self.groups is None else f"{self.dtype.name}/{self.groups}"


def array_name(key: TensorKey) -> str:
    """What a parameter is called: its place in the model, with the layer's number."""
    if key.layer is None:
        return key.path
    first, rest = key.path.split(".", 1)
    return f"{first}.{key.layer}.{rest}"


def stored_arrays(key: TensorKey, storage: Storage) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Dtype and shape in the file of each array of a parameter, by name: scales before weights."""
    name = array_name(key)
    if storage.groups is None:
        return {name: (storage.dtype, key.shape)}
    *lead, k, n = key.shape
    packed = storage.dtype == INT4
    weight = (_UINT8, (*lead, n, k // 2)) if packed else (INT8, (*lead, n, k))
    return {
        f"{name}.scales": (BFLOAT16, (*lead, storage.groups, n)),
        f"{name}.weight": weight,
    }


def metadata(config: GrokConfig, storages: Mapping[str, Storage]) -> dict[str, str]:
    """What every file of a checkpoint says about itself; `storages` by place in the model."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "config": json.dumps(config.to_dict()),
        "storage": json.dumps({path: str(storages[path]) for path in sorted(storages)}),
    }


def open_dialect(directory: Path, config: GrokConfig | None) -> Checkpoint:
    """Open a checkpoint in grokkit's own safetensors layout, as `open_checkpoint` does."""
    records = read_manifest(directory, is_needed=True)
    check_sizes(directory, {name: record.size for name, record in records.items()})
    files = [read_safetensors(directory / n) for n in sorted(records) if n.endswith(SUFFIX)]
    if not files:
        raise refusal(directory / MANIFEST, "safetensors files", "none listed", _AGAIN)
    for file in files:
        if file.metadata != files[0].metadata:
            raise refusal(
                file.path,
                f"metadata as in {files[0].path.name}",
                "other metadata: the file is of another checkpoint",
                _AGAIN,
            )
    found, storages = _read_metadata(files[0])
    if config is not None and config != found:
        remedy = "leave the configuration to the files"
        raise refusal(files[0].path, f"{config}", f"{found}", remedy)
    arrays = Arrays(directory, files, _AGAIN)
    entries = tuple(Entry(key, _tensor(key, storages, arrays)) for key in tensor_keys(found))
    arrays.check_all_taken("the arrays of this configuration")
    return Checkpoint(directory, found, entries, "safetensors")


def _read_metadata(file: SafetensorsFile) -> tuple[GrokConfig, dict[str, Storage]]:
    notes = file.metadata
    if notes.get("version") != VERSION:
        raise refusal(
            file.path, f"version {VERSION} of grokkit's layout",
            f"version {notes.get('version')!r:.50}", "use the grokkit that wrote it",
        )  # fmt: skip
    try:
        config = GrokConfig.from_dict(json.loads(notes["config"]), source=str(file.path))
        storages = {p: _storage(text) for p, text in json.loads(notes["storage"]).items()}
    except (KeyError, ValueError, AttributeError, RecursionError) as e:
        if isinstance(e, ConfigError):
            raise
        raise refusal(
            file.path, "config and storage in the metadata", f"{type(e).__name__}: {e}", _AGAIN
        ) from None
    return config, storages


def _storage(text: Any) -> Storage:
    name, _, groups = str(text).partition("/")
    if groups:
        return Storage(INTEGERS[name], int(groups))
    return Storage(FLOATS[name])


def _tensor(key: TensorKey, storages: dict[str, Storage], arrays: Arrays) -> TensorFile:
    """Take a parameter's arrays, checked."""
    storage = storages.get(key.path)
    if storage is None:
        raise refusal(arrays.directory, f"how {key.path} is stored", "nothing on it", _AGAIN)
    groups = storage.groups
    if groups is not None and (key.scales_shape is None or groups < 1 or key.shape[-2] % groups):
        expected = f"a way to store {key.path}, {key}"
        raise refusal(arrays.directory, expected, str(storage), _AGAIN)
    stored = stored_arrays(key, storage)
    *scales, file = [arrays.take(name, shape, dtype) for name, (dtype, shape) in stored.items()]
    if not scales:
        return file
    if scales[0].path != file.path:
        raise refusal(file.path, f"{key.path} with its scales", "no scales", _AGAIN)
    weight = file.weight
    if storage.dtype == INT4:
        weight = ArraySpan(INT4, (*weight.shape[:-1], 2 * weight.shape[-1]), weight.offset)
    return TensorFile(file.path, file.size, weight, scales[0].weight, k_last=True)
