"""Reads the structure of one official tensor file without unpickling it.

A pickle is a program for a small stack machine. This module runs the few instructions that an
official tensor file consists of on *descriptions*: calling a global gives an `Object` that says what
would have been called, and array bytes are skipped. Nothing is imported, no name from the file is
looked up, and every other instruction or global raises `Refused`.

The work is bounded whatever the bytes say: at most `MAX_OPCODES` instructions, none of which
reads more than 255 bytes, and every length is compared with the file's size before it is used.

Source: the instruction set is documented in CPython's `Lib/pickletools.py`; which instructions
occur was read off official files.
"""

import pickletools
from typing import Any, BinaryIO

from grokkit.checkpoint.pickle_objects import (
    DTYPE,
    GLOBALS,
    INTEGERS,
    PAYLOADS,
    QUANTIZED,
    RECONSTRUCT,
    TUPLES,
    ArrayNote,
    Global,
    Object,
    Payload,
    QuantizedNote,
    describe,
    dtype_of,
    recognised,
)
from grokkit.checkpoint.refusal import DOWNLOAD_AGAIN, Refused

MAX_OPCODES = 512
"""An official quantised file has about 150 instructions, a plain one about 70."""

_NAMES = {o.code.encode("latin-1"): o.name for o in pickletools.opcodes}
_CONSTANTS = {b"N": None, b"\x88": True, b"\x89": False, b")": ()}
_TUPLES = {opcode: n for n, opcode in TUPLES.items()}
_MARK = object()
_HOSTILE = f"the file may try to run a program; {DOWNLOAD_AGAIN}"


def walk(file: BinaryIO, size: int) -> ArrayNote | QuantizedNote:
    """The structure of an official tensor file.

    **Arguments:**

    - `file`: open for reading, at its start; a small buffer suffices.
    - `size`: bytes in the file.

    **Returns:** a plain array or a quantised pair, with the payloads' places.

    **Raises:** `Refused` for anything that is not exactly one official tensor.
    """
    return recognised(_Machine(file, size).run())


class _Machine:
    def __init__(self, file: BinaryIO, size: int):
        self.file = file
        self.size = size
        self.position = 0
        self.frame_end: int | None = None
        self.stack: list[Any] = []
        self.memo: list[Any] = []

    def run(self) -> Any:
        """The value that the file holds."""
        if self.take(2) != b"\x80\x04":
            raise Refused("a pickle of protocol 4", "other bytes at the start of the file")
        for _ in range(MAX_OPCODES):
            start = self.position
            if start == self.frame_end:
                self.frame_end = None
            try:
                opcode = self.take(1)
                if opcode == b".":
                    return self.result()
                self.step(opcode)
            except Refused as e:
                raise Refused(e.expected, f"{e.found} (at byte {start:,})", e.remedy) from None
        expected = f"one tensor, in at most {MAX_OPCODES} pickle instructions"
        raise Refused(expected, "more instructions")

    def result(self) -> Any:
        if self.position != self.size:
            raise Refused(
                f"a file of {self.position:,} bytes, where its pickle ends",
                f"{self.size - self.position:,} bytes more",
                "the file is too long, as when two downloads were joined: download it again",
            )
        if self.frame_end not in (None, self.position):
            raise Refused(f"a pickle frame up to byte {self.frame_end:,}", "the end of the pickle")
        if len(self.stack) != 1:
            found = ", ".join(describe(value, deep=False) for value in self.stack[:4]) or "nothing"
            raise Refused("one array or one quantised weight", found)
        return self.stack[0]

    def step(self, opcode: bytes) -> None:
        """Run one instruction."""
        push = self.stack.append
        match opcode:
            case b"\x95":  # FRAME
                length = self.number(8)
                if self.frame_end is not None:
                    raise Refused("pickle frames one after another", "a frame inside another")
                self.check_available(length, "a pickle frame")
                self.frame_end = self.position + length
            case b"\x94":  # MEMOIZE
                self.memo += self.pop(1)
                push(self.memo[-1])
            case b"h":  # BINGET
                index = self.number(1)
                if index >= len(self.memo):
                    raise Refused(f"one of {len(self.memo)} remembered values", f"number {index}")
                push(self.memo[index])
            case b"N" | b"\x88" | b"\x89" | b")":  # NONE, NEWTRUE, NEWFALSE, EMPTY_TUPLE
                push(_CONSTANTS[opcode])
            case b"K" | b"M":  # BININT1, BININT2
                push(self.number(INTEGERS[opcode]))
            case b"J":  # BININT
                push(self.number(4, signed=True))
            case b"\x8c":  # SHORT_BINUNICODE
                raw = self.take(self.number(1))
                try:
                    push(raw.decode("utf-8"))
                except UnicodeDecodeError:
                    raise Refused("UTF-8 text", f"the bytes {raw[:40]!r}") from None
            case b"C" | b"B" | b"\x8e":  # SHORT_BINBYTES, BINBYTES, BINBYTES8
                push(self.skip_payload(self.number(PAYLOADS[opcode])))
            case b"(":  # MARK
                push(_MARK)
            case b"t":  # TUPLE
                push(tuple(self.pop_to_mark()))
            case b"\x85" | b"\x86" | b"\x87":  # TUPLE1, TUPLE2, TUPLE3
                push(tuple(self.pop(_TUPLES[opcode])))
            case b"}":  # EMPTY_DICT
                push({})
            case b"u":  # SETITEMS
                items = self.pop_to_mark()
                push(_with_items(self.pop(1)[0], items))
            case b"\x93":  # STACK_GLOBAL
                push(_global(*self.pop(2)))
            case b"\x81":  # NEWOBJ
                push(_new(*self.pop(2)))
            case b"R":  # REDUCE
                push(_call(*self.pop(2)))
            case b"b":  # BUILD
                target, state = self.pop(2)
                if not isinstance(target, Object) or target.state is not None:
                    raise Refused("an object without a state", f"the state of {describe(target)}")
                target.state = state
                push(target)
            case _:
                name = _NAMES.get(opcode, "unknown")
                if name in ("GLOBAL", "INST"):
                    lines = self.file.read(255).split(b"\n")[:2]
                    name += f" {b'.'.join(lines).decode('latin-1')!a}"
                expected = "only the pickle instructions of an official tensor file"
                raise Refused(expected, f"the instruction {name} (0x{opcode[0]:02x})", _HOSTILE)

    # Reading

    def check_available(self, n: int, what: str) -> None:
        end = self.position + n
        if end > self.size:
            raise Refused(
                f"{what} of {n:,} bytes, in a file of at least {end:,} bytes",
                f"a file of {self.size:,} bytes",
                "the file is cut short, as by an unfinished download: download it again",
            )
        if self.frame_end is not None and end > self.frame_end:
            raise Refused(
                f"{what} of {n:,} bytes inside its pickle frame",
                f"a frame that ends at byte {self.frame_end:,}",
            )

    def take(self, n: int) -> bytes:
        self.check_available(n, "an instruction")
        taken = self.file.read(n)
        if len(taken) != n:
            raise Refused(f"a file of {self.size:,} bytes", "a file that shrank while it was read")
        self.position += n
        return taken

    def number(self, nbytes: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(nbytes), "little", signed=signed)

    def skip_payload(self, nbytes: int) -> Payload:
        self.check_available(nbytes, "an array payload")
        found = Payload(nbytes, self.position, self.file.read(1) if nbytes == 1 else None)
        self.position += nbytes
        self.file.seek(self.position)
        return found

    # The stack

    def pop(self, n: int) -> list[Any]:
        items = self.stack[-n:]
        if len(items) < n or any(item is _MARK for item in items):
            raise Refused("a well-formed pickle", "an instruction without its operands")
        del self.stack[-n:]
        return items

    def pop_to_mark(self) -> list[Any]:
        marks = [i for i, item in enumerate(self.stack) if item is _MARK]
        if not marks:
            raise Refused("a well-formed pickle", "the end of a group that never began")
        items = self.stack[marks[-1] + 1 :]
        del self.stack[marks[-1] :]
        return items


def _global(module: Any, name: Any) -> Global:
    """The global of this name, if it is one of the five."""
    if not (isinstance(module, str) and isinstance(name, str)):
        raise Refused("a global's module and name", f"{describe(module)} and {describe(name)}")
    allowed = GLOBALS.get(Global(module, name))
    if allowed is None:
        expected = f"only the globals {', '.join(map(str, GLOBALS))}"
        raise Refused(expected, f"the global {f'{module}.{name}'!a}", _HOSTILE)
    return allowed


def _new(cls: Any, arguments: Any) -> Object:
    """What `cls.__new__(cls, *arguments)` would make."""
    if cls is not QUANTIZED or arguments != ():
        found = f"a new {describe(cls)} with {describe(arguments)}"
        raise Refused(f"a new {QUANTIZED} without arguments", found)
    return Object(cls, arguments)


def _call(function: Any, arguments: Any) -> Object:
    """What `function(*arguments)` would make."""
    if function is not RECONSTRUCT and function is not DTYPE:
        raise Refused(f"a call of {RECONSTRUCT} or {DTYPE}", f"a call of {describe(function)}")
    if function is DTYPE:
        dtype_of(arguments)
    return Object(function, arguments)


def _with_items(empty: Any, items: list[Any]) -> dict[str, Any]:
    """A new dict: the one that may be remembered stays empty, and so is no object's state."""
    match empty, items:
        case dict(), ["weight", weight, "scales", scales] if not empty:
            return {"weight": weight, "scales": scales}
    found = ", ".join(describe(value, deep=False) for value in items[:4]) or "none"
    raise Refused("the entries 'weight' and 'scales', of a dict", found)
