"""Reads the structure of one official tensor file without unpickling it.

A pickle is a program for a small stack machine. This module runs the few instructions that an
official tensor file consists of on *descriptions*: calling a global builds a note of what would
have been called, and array bytes are skipped and remembered as an offset and a length. Nothing
is imported, no name from the file is looked up, and every other instruction, global or argument
raises `Refused`.

The work is bounded whatever the bytes say: at most `MAX_OPCODES` instructions, none of which
reads more than 255 bytes, and every length is compared with the file's size before it is used.

Source: the instruction set is documented in CPython's `Lib/pickletools.py`; which instructions
occur was read off official files.
"""

import dataclasses
import math
import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO, NoReturn

import ml_dtypes
import numpy as np

from grokkit.checkpoint.refusal import DOWNLOAD_AGAIN, Refused

_OPCODE_NAMES = {opcode.code: opcode.name for opcode in pickletools.opcodes}

MAX_OPCODES = 512
"""An official quantised file has about 150 instructions, a plain one about 70."""

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


def walk(file: BinaryIO, size: int) -> ArrayNote | QuantizedNote:
    """The structure of an official tensor file.

    **Arguments:**

    - `file`: open for reading, at its start; a small buffer suffices.
    - `size`: bytes in the file.

    **Returns:** a plain array or a quantised pair, complete, with the payloads' places.

    **Raises:** `Refused` for anything that is not exactly one official tensor.
    """
    return _Machine(file, size).run()


class _Machine:
    def __init__(self, file: BinaryIO, size: int):
        self.file = file
        self.size = size
        self.position = 0
        self.frame_end: int | None = None
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []

    def run(self) -> ArrayNote | QuantizedNote:
        if self._take(2) != b"\x80\x04":
            raise Refused("a pickle of protocol 4", "other bytes at the start of the file")
        for _ in range(MAX_OPCODES):
            start = self.position
            if start == self.frame_end:
                self.frame_end = None
            opcode = self._take(1)
            if opcode == b".":
                return self._stop()
            action = _ACTIONS.get(opcode)
            if action is None:
                self._refuse_opcode(opcode, start)
            action(self)
        raise Refused(
            f"one tensor, in at most {MAX_OPCODES} pickle instructions", "more instructions"
        )

    # Reading

    def _available(self, n: int, what: str) -> None:
        end = self.position + n
        if end > self.size:
            raise Refused(
                f"{what} of {n:,} bytes at byte {self.position:,}, in a file of at least "
                f"{end:,} bytes",
                f"a file of {self.size:,} bytes",
                "the file is cut short, as by an unfinished download: download it again",
            )
        if self.frame_end is not None and end > self.frame_end:
            raise Refused(
                f"{what} of {n:,} bytes at byte {self.position:,} inside its pickle frame",
                f"a frame that ends at byte {self.frame_end:,}",
            )

    def _take(self, n: int) -> bytes:
        self._available(n, "an instruction")
        taken = self.file.read(n)
        if len(taken) != n:
            raise Refused(f"a file of {self.size:,} bytes", "a file that shrank while it was read")
        self.position += n
        return taken

    def _unsigned(self, n: int) -> int:
        return int.from_bytes(self._take(n), "little")

    def _skip_payload(self, length_bytes: int) -> None:
        nbytes = self._unsigned(length_bytes)
        self._available(nbytes, "an array payload")
        self.stack.append(Payload(self.position, nbytes))
        self.position += nbytes
        self.file.seek(self.position)

    # The stack

    def _pop(self, n: int) -> list[Any]:
        floor = self.marks[-1] if self.marks else 0
        if len(self.stack) - floor < n:
            raise Refused("a well-formed pickle", f"an empty stack at byte {self.position:,}")
        items = self.stack[len(self.stack) - n :]
        del self.stack[len(self.stack) - n :]
        return items

    def _pop_to_mark(self) -> list[Any]:
        if not self.marks:
            raise Refused("a well-formed pickle", f"no mark to go back to, {self._where()}")
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def _peek(self) -> Any:
        (top,) = self._pop(1)
        self.stack.append(top)
        return top

    def _where(self) -> str:
        return f"at byte {self.position:,}"

    # Instructions

    def _frame(self) -> None:
        length = self._unsigned(8)
        if self.frame_end is not None:
            raise Refused("frames one after another", f"a frame inside another, {self._where()}")
        self._available(length, "a pickle frame")
        self.frame_end = self.position + length

    def _text(self) -> None:
        raw = self._take(self._unsigned(1))
        try:
            self.stack.append(raw.decode("utf-8"))
        except UnicodeDecodeError:
            raise Refused("UTF-8 text", f"the bytes {raw[:40]!r}, {self._where()}") from None

    def _get(self) -> None:
        index = self._unsigned(1)
        if index >= len(self.memo):
            raise Refused(
                f"one of {len(self.memo)} remembered values", f"number {index}, {self._where()}"
            )
        self.stack.append(self.memo[index])

    def _global(self) -> None:
        module, name = self._pop(2)
        if not (isinstance(module, str) and isinstance(name, str)):
            raise Refused(
                "a global's module and name", f"{_kind(module)} and {_kind(name)}, {self._where()}"
            )
        self.stack.append(_allowed_global(module, name))

    def _new_object(self) -> None:
        cls, arguments = self._pop(2)
        if cls is not QUANTIZED or arguments != ():
            raise Refused(
                f"a new {QUANTIZED} without arguments",
                f"a new {_kind(cls)} with {_kind(arguments)}, {self._where()}",
            )
        self.stack.append(QuantizedNote())

    def _reduce(self) -> None:
        function, arguments = self._pop(2)
        if function is RECONSTRUCT:
            self.stack.append(self._reconstruct(arguments))
        elif function is DTYPE:
            self.stack.append(self._dtype(arguments))
        else:
            raise Refused(
                f"a call of {RECONSTRUCT} or {DTYPE}",
                f"a call of {_kind(function)}, {self._where()}",
            )

    def _reconstruct(self, arguments: Any) -> ArrayNote:
        # The last argument is the type code b"b", which BUILD overrides; its value is not used.
        match arguments:
            case (Global() as cls, (int(length),), Payload(nbytes=1)):
                if cls is NDARRAY and _same(length, 0):
                    return ArrayNote()
        raise Refused(
            f"{RECONSTRUCT}({NDARRAY}, (0,), b'b')",
            f"a call of it with {_kind(arguments)}, {self._where()}",
        )

    def _dtype(self, arguments: Any) -> DtypeNote:
        match arguments:
            case (str() | Global() as code, False, True) if code in _DTYPES:
                return DtypeNote(*_DTYPES[code])
            case (str() | Global() as code, *_):
                found = f"{code if isinstance(code, Global) else ascii(code)}, {self._where()}"
            case _:
                found = f"{_kind(arguments)}, {self._where()}"
        raise Refused("one of the dtypes float32 ('f4'), int8 ('i1') and bfloat16", found)

    def _build(self) -> None:
        target, state = self._pop(2)
        match target:
            case DtypeNote():
                self._build_dtype(target, state)
            case ArrayNote():
                self._build_array(target, state)
            case QuantizedNote():
                self._build_quantized(target, state)
            case _:
                raise Refused(
                    "the state of an array, a dtype or a quantised weight",
                    f"the state of {_kind(target)}, {self._where()}",
                )
        self.stack.append(target)

    def _build_dtype(self, note: DtypeNote, state: Any) -> None:
        if note.built:
            raise Refused("one state for each dtype", f"a second one, {self._where()}")
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
            f"the state (3, {note.byte_order!r}, None, None, None, {note.size[0]}, "
            f"{note.size[1]}, flags) of dtype {note.dtype}",
            f"{_kind(state)}, {self._where()}",
        )

    def _build_array(self, note: ArrayNote, state: Any) -> None:
        if note.payload is not None:
            raise Refused("one state for each array", f"a second one, {self._where()}")
        match state:
            case (int(version), tuple(shape), DtypeNote() as dtype, bool(fortran), Payload() as p):
                pass
            case _:
                raise Refused(
                    "an array's state (version, shape, dtype, order, bytes)",
                    f"{_kind(state)}, {self._where()}",
                )
        if not _same(version, 1) or not dtype.built:
            raise Refused(
                "version 1 of an array's state, with a complete dtype",
                f"version {version!r}, {dtype.dtype} {'' if dtype.built else 'without state'}",
            )
        if fortran:
            raise Refused(
                "an array in C order (rows together)",
                "an array in Fortran order",
                "write it again from np.ascontiguousarray(array)",
            )
        if len(shape) > MAX_NDIM or not all(type(n) is int and n > 0 for n in shape):
            raise Refused(f"a shape of at most {MAX_NDIM} positive integers", _kind(shape))
        expected = math.prod(shape) * dtype.dtype.itemsize
        if p.nbytes != expected:
            raise Refused(
                f"{expected:,} bytes for shape {shape} of {dtype.dtype}",
                f"a payload of {p.nbytes:,} bytes at byte {p.offset:,}",
            )
        note.dtype, note.shape, note.payload = dtype.dtype, shape, p

    def _build_quantized(self, note: QuantizedNote, state: Any) -> None:
        if note.weight is not None:
            raise Refused(f"one state for {QUANTIZED}", f"a second one, {self._where()}")
        match state:
            case {"weight": ArrayNote() as weight, "scales": ArrayNote() as scales}:
                if len(state) == 2 and weight.payload and scales.payload:
                    note.weight, note.scales = weight, scales
                    return
        raise Refused(
            "the state {weight: array, scales: array}", f"{_kind(state)}, {self._where()}"
        )

    def _set_items(self) -> None:
        items = self._pop_to_mark()
        target = self._peek()
        keys, values = items[::2], items[1::2]
        if not isinstance(target, dict) or target or keys != ["weight", "scales"]:
            found = ", ".join(_kind(key) for key in keys[:4]) or "none"
            raise Refused("the entries 'weight' and 'scales'", f"{found}, {self._where()}")
        if len(values) != 2:
            raise Refused("a value for each entry", f"{len(values)} values, {self._where()}")
        target.update(zip(keys, values, strict=True))

    def _stop(self) -> ArrayNote | QuantizedNote:
        if self.position != self.size:
            raise Refused(
                f"the end of the file at byte {self.position:,}",
                f"{self.size - self.position:,} bytes more",
                "the file is too long, as when two downloads were joined: download it again",
            )
        if self.frame_end not in (None, self.position):
            raise Refused(f"a frame up to byte {self.frame_end:,}", f"the end {self._where()}")
        match self.stack:
            case [ArrayNote(payload=Payload()) | QuantizedNote(weight=ArrayNote()) as note]:
                if not self.marks:
                    return note
        found = ", ".join(_kind(value) for value in self.stack[:4]) or "nothing"
        raise Refused("one array or one quantised weight", found)

    def _refuse_opcode(self, opcode: bytes, start: int) -> NoReturn:
        name = _OPCODE_NAMES.get(opcode.decode("latin-1"), "unknown")
        if opcode in (b"c", b"i"):
            names = self.file.read(255).split(b"\n")[:2]
            name += " of " + ascii(b".".join(names).decode("latin-1"))
        raise Refused(
            "only the pickle instructions of an official tensor file",
            f"{name} (0x{opcode[0]:02x}) at byte {start:,}",
            f"the file may try to run a program; {DOWNLOAD_AGAIN}",
        )


def _allowed_global(module: str, name: str) -> Global:
    allowed = _ALLOWED.get(Global(module, name))
    if allowed is None:
        raise Refused(
            f"only the globals {', '.join(map(str, _ALLOWED))}",
            ascii(f"{module}.{name}"),
            f"the file may try to run a program; {DOWNLOAD_AGAIN}",
        )
    return allowed


def _same(value: int, expected: int) -> bool:
    """Equal, and a real integer: in Python `True == 1`."""
    return type(value) is int and value == expected


def _kind(value: Any, deep: bool = True) -> str:
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
            inner = ", ".join(_kind(v, deep=False) for v in value[:8])
            return f"({inner}{', ...' if len(value) > 8 else ''})"
        case tuple():
            return f"a tuple of {len(value)}"
        case dict():
            return f"a dict of {len(value)}"
        case _:
            return ascii(value)


def _push(value: Any) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(value)


def _number(nbytes: int, signed: bool) -> Callable[[_Machine], None]:
    return lambda m: m.stack.append(int.from_bytes(m._take(nbytes), "little", signed=signed))


def _tuple(n: int) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(tuple(machine._pop(n)))


_ACTIONS: dict[bytes, Callable[[_Machine], None]] = {
    b"\x95": _Machine._frame,  # FRAME
    b"\x8c": _Machine._text,  # SHORT_BINUNICODE
    b"\x94": lambda m: m.memo.append(m._peek()),  # MEMOIZE
    b"h": _Machine._get,  # BINGET
    b"\x93": _Machine._global,  # STACK_GLOBAL
    b"K": _number(1, signed=False),  # BININT1
    b"M": _number(2, signed=False),  # BININT2
    b"J": _number(4, signed=True),  # BININT
    b"N": _push(None),  # NONE
    b"\x88": _push(True),  # NEWTRUE
    b"\x89": _push(False),  # NEWFALSE
    b")": _push(()),  # EMPTY_TUPLE
    b"\x85": _tuple(1),  # TUPLE1
    b"\x86": _tuple(2),  # TUPLE2
    b"\x87": _tuple(3),  # TUPLE3
    b"(": lambda m: m.marks.append(len(m.stack)),  # MARK
    b"t": lambda m: m.stack.append(tuple(m._pop_to_mark())),  # TUPLE
    b"}": lambda m: m.stack.append({}),  # EMPTY_DICT
    b"u": _Machine._set_items,  # SETITEMS
    b"\x81": _Machine._new_object,  # NEWOBJ
    b"R": _Machine._reduce,  # REDUCE
    b"b": _Machine._build,  # BUILD
    b"C": lambda m: m._skip_payload(1),  # SHORT_BINBYTES
    b"B": lambda m: m._skip_payload(4),  # BINBYTES
    b"\x8e": lambda m: m._skip_payload(8),  # BINBYTES8
}
