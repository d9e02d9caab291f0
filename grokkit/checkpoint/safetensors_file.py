"""The safetensors container: headers read strictly, files laid out before their data is there.

Source: the format's description in github.com/huggingface/safetensors (README, "Format"): eight
bytes of header length, a JSON header, the arrays' bytes in C order without gaps.
"""

import dataclasses
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from grokkit.checkpoint.pickle_objects import BFLOAT16, FLOAT32, INT8
from grokkit.checkpoint.refusal import Refused, reading
from grokkit.checkpoint.tensor_file import ArraySpan

DTYPES: dict[str, np.dtype] = {
    "F32": FLOAT32,
    "BF16": BFLOAT16,
    "F16": np.dtype("<f2"),
    "I8": INT8,
    "U8": np.dtype(np.uint8),
}
"""The format's names of the dtypes that a Grok-1 may be stored in."""
DATA_TYPES = DTYPES | {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": "?", "I16": "<i2", "U16": "<u2", "I32": "<i4", "U32": "<u4", "I64": "<i8",
        "U64": "<u8", "F64": "<f8",
    }.items()
}  # fmt: skip
"""The format's names of all dtypes that grokkit writes."""
_NAMES = {dtype: name for name, dtype in DATA_TYPES.items()}
_LARGEST_HEADER = 100_000_000  # the limit of the safetensors library
_LARGEST_AXIS = (1 << 31) - 1
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
    with reading(path, _REMEDY) as status:
        with open(path, "rb") as file:
            length = _header_length(file.read(8), status.st_size)
            text = file.read(length)
        metadata, spans = _parse(text, length, status.st_size)
    return SafetensorsFile(path, status.st_size, metadata, spans)


def _header_length(start: bytes, size: int) -> int:
    expected = "a safetensors file"
    if start.startswith(b"version "):
        raise Refused(
            expected,
            "a git-LFS pointer: the repository was cloned without its large files",
            "run `git lfs pull` in the clone",
        )
    if len(start) < 8:
        raise Refused(expected, f"{size} bytes", _REMEDY)
    (length,) = struct.unpack("<Q", start)
    if length > _LARGEST_HEADER or 8 + length > size:
        raise Refused(expected, f"a header of {length:,} bytes in a file of {size:,}", _REMEDY)
    return length


def _parse(text: bytes, length: int, size: int) -> tuple[dict[str, str], dict[str, ArraySpan]]:
    expected = "a safetensors header"
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_name_twice)
    except (ValueError, RecursionError) as e:
        raise Refused(expected, f"no readable JSON ({e})", _REMEDY) from None
    if not isinstance(header, dict):
        raise Refused(expected, f"JSON of a {type(header).__name__}", _REMEDY)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise Refused(expected, "metadata that is not text", _REMEDY)
    spans = {name: _span(name, note, 8 + length) for name, note in header.items()}
    end = 8 + length
    for name, span in sorted(spans.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if span.offset != end:
            raise Refused(
                "arrays one after the other, without gaps",
                f"{name!r} at byte {span.offset:,}, where {end:,} was due",
                _REMEDY,
            )
        end += span.nbytes
    if end != size:
        raise Refused(f"{end:,} bytes, as the header says", f"{size:,} bytes", _REMEDY)
    return metadata, spans


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name twice")
    return found


def _span(name: str, note: Any, data_start: int) -> ArraySpan:
    expected = f"dtype, shape and data_offsets of {name!r}"
    if not isinstance(note, dict) or set(note) != {"dtype", "shape", "data_offsets"}:
        raise Refused(expected, f"{note!r:.100}", _REMEDY)
    kind, shape, offsets = note["dtype"], note["shape"], note["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise Refused(
            f"{name!r} in one of {', '.join(DTYPES)}",
            f"{kind!r:.100}",
            "this is not a Grok-1, or one in a precision that grokkit does not read",
        )
    numbers = [shape, offsets]
    if (
        not all(isinstance(n, list) and all(type(i) is int and i >= 0 for i in n) for n in numbers)
        or len(offsets) != 2
        or len(shape) > 8
        or any(not 1 <= n <= _LARGEST_AXIS for n in shape)
    ):
        raise Refused(expected, f"shape {shape!r:.100}, data_offsets {offsets!r:.100}", _REMEDY)
    span = ArraySpan(DTYPES[kind], tuple(shape), data_start + offsets[0])
    if offsets[1] - offsets[0] != span.nbytes:
        raise Refused(
            f"{span.nbytes:,} bytes for {name!r}, {span}",
            f"{offsets[1] - offsets[0]:,} bytes",
            _REMEDY,
        )
    return span


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
