"""The safetensors container: where arrays lie, and headers of files whose data is not there yet.

Source: the format's description in github.com/huggingface/safetensors (README, "Format"): eight
bytes of header length, a JSON header, the arrays' bytes in C order without gaps.
"""

import dataclasses
import json
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from grokkit.checkpoint.pickle_objects import BFLOAT16
from grokkit.checkpoint.refusal import LFS_POINTER, Refused, reading, refusal
from grokkit.checkpoint.tensor_file import ArraySpan, TensorFile

DATA_TYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": "?", "I8": "i1", "U8": "u1", "I16": "<i2", "U16": "<u2", "I32": "<i4", "U32": "<u4",
        "I64": "<i8", "U64": "<u8", "F16": "<f2", "BF16": BFLOAT16, "F32": "<f4", "F64": "<f8",
    }.items()
}  # fmt: skip
"""The format's names of all dtypes that grokkit writes."""
DTYPES = {name: DATA_TYPES[name] for name in ("F32", "BF16", "F16", "I8", "U8")}
"""Of the dtypes that a Grok-1 may be stored in."""
_NAMES = {dtype: name for name, dtype in DATA_TYPES.items()}
_ALIGNMENT = 4096  # bytes: where the data begins, so that arrays can be mapped, and read directly

_REMEDY = "download or convert the file again"


@dataclasses.dataclass(frozen=True)
class SafetensorsFile:
    """What one safetensors file holds, read from its header alone."""

    path: Path
    size: int
    """Bytes in the file."""
    metadata: dict[str, str]
    spans: dict[str, ArraySpan]
    """Each array's dtype, shape and place, by its name."""


def read_safetensors(path: str | os.PathLike[str]) -> SafetensorsFile:
    """Describe a safetensors file without reading its arrays.

    **Arguments:**

    - `path`: the file.

    **Returns:** its metadata and where its arrays are.

    **Raises:** `CheckpointError` if the file is missing, cut short, or not of the format.
    """
    path = Path(path)
    with reading(path, _REMEDY) as status, open(path, "rb") as file:
        start = file.read(8)
        if start.startswith(b"version "):
            raise Refused("a safetensors file", LFS_POINTER, "run `git lfs pull` in the clone")
        try:
            with safe_open(path, framework="numpy"):
                pass  # the format's own library has checked the whole header
        except SafetensorError as e:
            found = f"{status.st_size:,} bytes: {e!s:.300}"
            raise Refused("a safetensors file", found, _REMEDY) from None
        length = int.from_bytes(start, "little")
        header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        spans = {name: _span(name, note, 8 + length) for name, note in header.items()}
    return SafetensorsFile(path, status.st_size, metadata, spans)


def _span(name: str, note: Any, data_start: int) -> ArraySpan:
    match note:
        case {"dtype": kind, "shape": shape, "data_offsets": [start, _], **rest} if not rest:
            pass
        case _:
            expected = f"dtype, shape and data_offsets of {name!r}, and no more"
            raise Refused(expected, f"{note!r:.100}", _REMEDY)
    if kind not in DTYPES:
        raise Refused(
            f"{name!r} in one of {', '.join(DTYPES)}",
            f"{kind!r:.100}",
            "this is not a Grok-1, or one in a precision that grokkit does not read",
        )
    return ArraySpan(DTYPES[kind], tuple(shape), data_start + start)


class Arrays:
    """The arrays of a directory's files, by name, for a layout to take one after the other."""

    def __init__(self, directory: Path, files: Iterable[SafetensorsFile], remedy: str) -> None:
        """Gather them; `remedy` is what to do if one is missing, not as expected, or left over.

        **Raises:** `CheckpointError` if two have one name.
        """
        self.directory, self.remedy = directory, remedy
        self.left: dict[str, TensorFile] = {}
        for file in files:
            for name, span in file.spans.items():
                if name in self.left:
                    raise refusal(
                        file.path,
                        f"{name} once",
                        f"it in {self.left[name].path.name} too",
                        "remove the files of another download",
                    )
                self.left[name] = TensorFile(file.path, file.size, span)

    def take(self, name: str, shape: tuple[int, ...], *dtypes: np.dtype) -> TensorFile:
        """The array of this name. **Raises:** `CheckpointError` if it is not as expected."""
        found = self.left.pop(name, None)
        if found is None:
            raise refusal(self.directory, f"an array {name}", "none of this name", self.remedy)
        if found.weight.shape != shape or found.weight.dtype not in dtypes:
            expected = " or ".join(str(ArraySpan(dtype, shape, 0)) for dtype in dtypes)
            raise refusal(found.path, f"{name}: {expected}", str(found), self.remedy)
        return found

    def check_all_taken(self, expected: str) -> None:
        """**Raises:** `CheckpointError` if arrays are left."""
        if self.left:
            found = f"{', '.join(sorted(self.left)[:3])} besides"
            raise refusal(self.directory, expected, found, self.remedy)


def encode_header(
    arrays: Mapping[str, tuple[np.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """What stands in a safetensors file before the arrays' bytes.

    **Arguments:**

    - `arrays`: dtype and shape of each array, in the order in which their bytes follow.
    - `metadata`: what the file says about itself.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in arrays.items():
        span = ArraySpan(dtype, shape, end)
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [end, end + span.nbytes],
        }
        end += span.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text
