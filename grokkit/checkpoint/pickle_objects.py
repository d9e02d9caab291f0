"""What the globals of an official tensor file would build, as descriptions.

Calling `numpy.dtype` or numpy's `_reconstruct`, and setting an object's state, become notes of
which array was meant. Only the arguments that an official file holds are accepted.
"""

import dataclasses
import math
from typing import Any

import ml_dtypes
import numpy as np

from grokkit.checkpoint.refusal import DOWNLOAD_AGAIN, Refused

MAX_NDIM = 8
"""Official arrays have at most 3 axes."""

FLOAT32 = np.dtype("<f4")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
INT8 = np.dtype(np.int8)


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

_ALLOWED = {g: g for g in (RECONSTRUCT, NDARRAY, DTYPE, BFLOAT16_TYPE, QUANTIZED)}
_ALLOWED[Global("numpy._core.multiarray", "_reconstruct")] = RECONSTRUCT  # its name in numpy 2

# The first argument of numpy.dtype -> the dtype, its byte order, and its (size, alignment) as
# numpy records them: -1 for its own dtypes.
_DTYPES: dict[str | Global, tuple[np.dtype, str, tuple[int, int]]] = {
    "f4": (FLOAT32, "<", (-1, -1)),
    "i1": (INT8, "|", (-1, -1)),
    BFLOAT16_TYPE: (BFLOAT16, "<", (2, 2)),
}
# Bits of numpy's dtype flags that concern how Python reads an item, and differ between ml_dtypes
# releases (NEEDS_PYAPI, USE_GETITEM, USE_SETITEM). The others mean objects or pointers.
_HARMLESS_FLAGS = 0x70


@dataclasses.dataclass
class Payload:
    """Bytes of the file that were skipped: where they start and how many there are."""

    offset: int
    nbytes: int
    only_byte: bytes | None = None
    """The content, if it is a single byte: numpy's placeholder type code is one."""


@dataclasses.dataclass
class DtypeNote:
    """A `numpy.dtype` under construction."""

    dtype: np.dtype
    byte_order: str
    size: tuple[int, int]
    built: bool = False


@dataclasses.dataclass
class ArrayNote:
    """A `numpy.ndarray` under construction."""

    dtype: np.dtype | None = None
    shape: tuple[int, ...] = ()
    payload: Payload | None = None


@dataclasses.dataclass
class QuantizedNote:
    """A `__main__.QuantizedWeight8bit` under construction."""

    weight: ArrayNote | None = None
    scales: ArrayNote | None = None


def allowed_global(module: Any, name: Any) -> Global:
    """The global of this name. **Raises:** `Refused` unless it is one of the five."""
    if not (isinstance(module, str) and isinstance(name, str)):
        raise Refused("a global's module and name", f"{describe(module)} and {describe(name)}")
    allowed = _ALLOWED.get(Global(module, name))
    if allowed is None:
        raise Refused(
            f"only the globals {', '.join(map(str, _ALLOWED))}",
            f"the global {f'{module}.{name}'!a}",
            f"the file may try to run a program; {DOWNLOAD_AGAIN}",
        )
    return allowed


def new_object(cls: Any, arguments: Any) -> QuantizedNote:
    """What `cls.__new__(cls, *arguments)` would make."""
    if cls is not QUANTIZED or arguments != ():
        raise Refused(
            f"a new {QUANTIZED} without arguments",
            f"a new {describe(cls)} with {describe(arguments)}",
        )
    return QuantizedNote()


def call(function: Any, arguments: Any) -> ArrayNote | DtypeNote:
    """What `function(*arguments)` would make."""
    if function is RECONSTRUCT:
        return _reconstruct(arguments)
    if function is DTYPE:
        return _dtype(arguments)
    raise Refused(f"a call of {RECONSTRUCT} or {DTYPE}", f"a call of {describe(function)}")


def set_state(target: Any, state: Any) -> None:
    """Complete a dtype, an array or a quantised weight with its pickled state."""
    match target:
        case DtypeNote():
            _set_dtype(target, state)
        case ArrayNote():
            _set_array(target, state)
        case QuantizedNote():
            _set_quantized(target, state)
        case _:
            raise Refused(
                "the state of an array, a dtype or a quantised weight",
                f"the state of {describe(target)}",
            )


def _reconstruct(arguments: Any) -> ArrayNote:
    match arguments:
        case (Global() as cls, (int(length),), Payload(only_byte=b"b")):
            if cls is NDARRAY and _same(length, 0):
                return ArrayNote()
    raise Refused(
        f"{RECONSTRUCT}({NDARRAY}, (0,), b'b')", f"a call of it with {describe(arguments)}"
    )


def _dtype(arguments: Any) -> DtypeNote:
    match arguments:
        case (str() | Global() as code, False, True) if code in _DTYPES:
            return DtypeNote(*_DTYPES[code])
        case (str() | Global() as code, *_):
            found = f"dtype {describe(code)}"
        case _:
            found = f"a dtype from {describe(arguments)}"
    raise Refused("one of the dtypes float32 ('f4'), int8 ('i1') and bfloat16", found)


def _set_dtype(note: DtypeNote, state: Any) -> None:
    if note.built:
        raise Refused("one state for each dtype", "a second one")
    match state:
        case (int(version), str(order), None, None, None, int(size), int(align), int(flags)):
            if order == ">":
                raise Refused(
                    f"little-endian data (byte order {note.byte_order!r})",
                    "big-endian data (byte order '>')",
                    "convert the file on the machine that wrote it",
                )
            if (
                _same(version, 3)
                and order == note.byte_order
                and (size, align) == note.size
                and not flags & ~_HARMLESS_FLAGS
            ):
                note.built = True
                return
    raise Refused(
        f"the state (3, {note.byte_order!r}, None, None, None, {note.size[0]}, {note.size[1]}, "
        f"flags) of dtype {note.dtype}",
        f"the state {describe(state)}",
    )


def _set_array(note: ArrayNote, state: Any) -> None:
    if note.payload is not None:
        raise Refused("one state for each array", "a second one")
    match state:
        case (int(version), tuple(shape), DtypeNote() as dtype, bool(fortran), Payload() as p):
            pass
        case _:
            raise Refused("an array's state (version, shape, dtype, order, bytes)", describe(state))
    if not _same(version, 1) or not dtype.built:
        raise Refused(
            "version 1 of an array's state, with a complete dtype",
            f"version {version!r}, dtype {dtype.dtype}{'' if dtype.built else ' without state'}",
        )
    if fortran:
        raise Refused(
            "an array in C order (rows together)",
            "an array in Fortran order",
            "write it again from np.ascontiguousarray(array)",
        )
    if len(shape) > MAX_NDIM or not all(type(n) is int and n > 0 for n in shape):
        raise Refused(f"a shape of at most {MAX_NDIM} positive integers", describe(shape))
    expected = math.prod(shape) * dtype.dtype.itemsize
    if p.nbytes != expected:
        raise Refused(
            f"{expected:,} bytes for shape {shape} of {dtype.dtype}",
            f"a payload of {p.nbytes:,} bytes at byte {p.offset:,}",
        )
    note.dtype, note.shape, note.payload = dtype.dtype, shape, p


def _set_quantized(note: QuantizedNote, state: Any) -> None:
    if note.weight is not None:
        raise Refused(f"one state for {QUANTIZED}", "a second one")
    match state:
        case {"weight": ArrayNote() as weight, "scales": ArrayNote() as scales}:
            if len(state) == 2 and weight.payload and scales.payload:
                note.weight, note.scales = weight, scales
                return
    raise Refused("the state {weight: array, scales: array}", describe(state))


def _same(value: int, expected: int) -> bool:
    """Equal, and a real integer: in Python `True == 1`."""
    return type(value) is int and value == expected


def describe(value: Any, deep: bool = True) -> str:
    """A short description. Values of a hostile file may be nested or long: go one level deep."""
    match value:
        case Payload():
            return f"{value.nbytes:,} bytes"
        case ArrayNote():
            return "an array"
        case DtypeNote():
            return f"dtype {value.dtype}"
        case QuantizedNote():
            return "a quantised weight"
        case Global():
            return str(value)
        case tuple() if deep:
            inner = ", ".join(describe(v, deep=False) for v in value[:8])
            return f"({inner}{', ...' if len(value) > 8 else ''})"
        case tuple():
            return f"a tuple of {len(value)}"
        case dict():
            return f"a dict of {len(value)}"
        case _:
            return ascii(value)
