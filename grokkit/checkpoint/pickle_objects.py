"""What an official tensor file says, as a tree of values: no object of it is ever made.

`tensor_writer` writes such a tree as a pickle. `pickle_walk` reads a pickle as such a tree, and
`recognised` compares it with the only two kinds that official files hold.
"""

import dataclasses
import math
from typing import Any

import ml_dtypes
import numpy as np

from grokkit.checkpoint.refusal import Refused

MAX_NDIM = 8
"""Official arrays have at most 3 axes."""

FLOAT32 = np.dtype("<f4")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
INT8 = np.dtype(np.int8)

# Pickle's instructions, and how many bytes their numbers have, or values their tuples.
INTEGERS = {b"K": 1, b"M": 2}
PAYLOADS = {b"C": 1, b"B": 4, b"\x8e": 8}
TUPLES = {1: b"\x85", 2: b"\x86", 3: b"\x87"}


@dataclasses.dataclass(frozen=True)
class Global:
    """A name in the file. It is compared, never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


RECONSTRUCT = Global("numpy.core.multiarray", "_reconstruct")
NDARRAY = Global("numpy", "ndarray")
DTYPE = Global("numpy", "dtype")
BFLOAT16_TYPE = Global("ml_dtypes", "bfloat16")
QUANTIZED = Global("__main__", "QuantizedWeight8bit")

GLOBALS = {g: g for g in (RECONSTRUCT, NDARRAY, DTYPE, BFLOAT16_TYPE, QUANTIZED)}
"""The globals that a file may name, and what they mean: numpy 2 has another name for one."""
GLOBALS[Global("numpy._core.multiarray", "_reconstruct")] = RECONSTRUCT

# Each dtype, with its first argument and its state as numpy pickles them. No dict: a dtype's hash
# changes when somebody unpickles one.
_DTYPES: tuple[tuple[np.dtype, str | Global, tuple[Any, ...]], ...] = (
    (FLOAT32, "f4", (3, "<", None, None, None, -1, -1, 0)),
    (INT8, "i1", (3, "|", None, None, None, -1, -1, 0)),
    (BFLOAT16, BFLOAT16_TYPE, (3, "<", None, None, None, 2, 2, 64)),
)
SUPPORTED_DTYPES = tuple(dtype for dtype, _, _ in _DTYPES)
_KINDS = {RECONSTRUCT: "an array", DTYPE: "a dtype", QUANTIZED: "a quantised weight"}
# Bits of the state's last entry that concern how Python reads an item, and differ between ml_dtypes
# releases (NEEDS_PYAPI, USE_GETITEM, USE_SETITEM). The others mean objects or pointers.
_HARMLESS_FLAGS = 0x70


@dataclasses.dataclass(frozen=True)
class Payload:
    """The bytes of an array, which lie in a file or will."""

    nbytes: int
    offset: int = -1
    """Where they begin, if they are there."""
    only_byte: bytes | None = None
    """The content, if it is a single byte: numpy's placeholder type code is one."""


@dataclasses.dataclass(eq=False)
class Object:
    """What would be called or created, with which arguments, and the state it would be given."""

    maker: Global
    arguments: Any
    state: Any = None


@dataclasses.dataclass(frozen=True)
class ArrayNote:
    """A `numpy.ndarray`."""

    dtype: np.dtype
    shape: tuple[int, ...]
    payload: Payload


@dataclasses.dataclass(frozen=True)
class QuantizedNote:
    """A `__main__.QuantizedWeight8bit`."""

    weight: ArrayNote
    scales: ArrayNote


def array_object(shape: tuple[int, ...], dtype: np.dtype, reconstruct: Global) -> Object:
    """An array as numpy's `__reduce__` describes it to the pickler."""
    code, state = next((code, state) for known, code, state in _DTYPES if known == dtype)
    payload = Payload(math.prod(shape) * dtype.itemsize)
    of_dtype = Object(DTYPE, (code, False, True), state)
    return Object(reconstruct, (NDARRAY, (0,), b"b"), (1, shape, of_dtype, False, payload))


def recognised(value: Any) -> ArrayNote | QuantizedNote:
    """The array or quantised weight that a file's tree of values means.

    **Raises:** `Refused` for any other tree.
    """
    if isinstance(value, Object) and value.maker is QUANTIZED:
        match value.state:
            case {"weight": weight, "scales": scales}:
                return QuantizedNote(_array(weight), _array(scales))
        raise Refused("the state {weight: array, scales: array}", describe(value.state))
    return _array(value, "one array or one quantised weight")


def _array(value: Any, expected: str = "an array") -> ArrayNote:
    if not (isinstance(value, Object) and value.maker is RECONSTRUCT):
        raise Refused(expected, describe(value))
    match value.arguments, value.state:
        case (
            (Global() as cls, (int(length),), Payload(only_byte=b"b")),
            (int(version), tuple(shape), of_dtype, bool(fortran), Payload() as payload),
        ) if cls is NDARRAY and f"{length} {version}" == "0 1":  # as text: True equals 1 in Python
            dtype = _dtype(of_dtype)
        case _:
            raise Refused(
                f"{RECONSTRUCT}({NDARRAY}, (0,), b'b') and the state (1, shape, dtype, order, bytes)",
                f"a call of it with {describe(value.arguments)} and the state {describe(value.state)}",
            )
    if fortran:
        raise Refused(
            "an array in C order (row-major)",
            "an array in Fortran order",
            "write it again from np.ascontiguousarray(array)",
        )
    if len(shape) > MAX_NDIM or not all(type(n) is int and n > 0 for n in shape):
        raise Refused(f"a shape of at most {MAX_NDIM} positive integers", describe(shape))
    n_bytes = math.prod(shape) * dtype.itemsize
    if payload.nbytes != n_bytes:
        raise Refused(
            f"{n_bytes:,} bytes for shape {shape} of {dtype}",
            f"a payload of {payload.nbytes:,} bytes at byte {payload.offset:,}",
        )
    return ArrayNote(dtype, shape, payload)


def _dtype(value: Any) -> np.dtype:
    if not (isinstance(value, Object) and value.maker is DTYPE):
        raise Refused("a dtype", describe(value))
    dtype, (*expected, _) = dtype_of(value.arguments)
    match value.state:
        case (_, ">", *_):
            raise Refused(
                "little-endian data",
                "big-endian data (byte order '>')",
                "convert the file on the machine that wrote it",
            )
        case (*state, int(flags)) if state == expected and not flags & ~_HARMLESS_FLAGS:
            return dtype
    raise Refused(
        f"the state ({', '.join(map(repr, expected))}, flags) of dtype {dtype}",
        f"the state {describe(value.state)}",
    )


def dtype_of(arguments: Any) -> tuple[np.dtype, tuple[Any, ...]]:
    """The dtype that `numpy.dtype(*arguments)` is, if it is one of the three, and its state.

    **Raises:** `Refused` for others.
    """
    match arguments:
        case (code, False, True):
            for dtype, known, state in _DTYPES:
                if code == known:
                    return dtype, state
            found = f"dtype {describe(code)}"
        case _:
            found = f"a dtype of {describe(arguments)}"
    raise Refused("one of the dtypes float32 ('f4'), int8 ('i1') and bfloat16", found)


def describe(value: Any, deep: bool = True) -> str:
    """A short description. Values of a hostile file may be nested or long: go one level deep."""
    match value:
        case Payload():
            return f"{value.nbytes:,} bytes"
        case Object():
            return _KINDS[value.maker]
        case Global():
            return str(value)
        case tuple() if deep:
            inner = ", ".join(describe(v, deep=False) for v in value[:8])
            return f"({inner}{', ...' if len(value) > 8 else ''})"
        case tuple() | dict():
            return f"a {type(value).__name__} of {len(value)}"
        case None | bool() | int() | str():
            return ascii(value)
        case _:
            return "the start of a group"
