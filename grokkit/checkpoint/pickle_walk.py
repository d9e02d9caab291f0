"""Reads the structure of one official tensor file without unpickling it.

A pickle is a program for a small stack machine. This module runs the few instructions that an
official tensor file consists of on *descriptions* (`grokkit.checkpoint.pickle_objects`): calling
a global builds a note of what would have been called, and array bytes are skipped and remembered
as an offset and a length. Nothing is imported, no name from the file is looked up, and every
other instruction, global or argument raises `Refused`.

The work is bounded whatever the bytes say: at most `MAX_OPCODES` instructions, none of which
reads more than 255 bytes, and every length is compared with the file's size before it is used.

Source: the instruction set is documented in CPython's `Lib/pickletools.py`; which instructions
occur was read off official files.
"""

import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO

from grokkit.checkpoint.pickle_objects import (
    ArrayNote,
    Payload,
    QuantizedNote,
    allowed_global,
    call,
    describe,
    new_object,
    set_state,
)
from grokkit.checkpoint.refusal import DOWNLOAD_AGAIN, Refused

MAX_OPCODES = 512
"""An official quantised file has about 150 instructions, a plain one about 70."""


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
        if self.take(2) != b"\x80\x04":
            raise Refused("a pickle of protocol 4", "other bytes at the start of the file")
        for _ in range(MAX_OPCODES):
            start = self.position
            try:
                if self.step():
                    return self.result()
            except Refused as e:
                raise Refused(e.expected, f"{e.found} (at byte {start:,})", e.remedy) from None
        raise Refused(
            f"one tensor, in at most {MAX_OPCODES} pickle instructions", "more instructions"
        )

    def step(self) -> bool:
        """Run one instruction; whether it was the last."""
        if self.position == self.frame_end:
            self.frame_end = None
        opcode = self.take(1)
        if opcode == b".":
            return True
        action = _ACTIONS.get(opcode)
        if action is None:
            raise Refused(
                "only the pickle instructions of an official tensor file",
                f"the instruction {self.name(opcode)}",
                f"the file may try to run a program; {DOWNLOAD_AGAIN}",
            )
        action(self)
        return False

    def result(self) -> ArrayNote | QuantizedNote:
        if self.position != self.size:
            raise Refused(
                f"a file of {self.position:,} bytes, where its pickle ends",
                f"{self.size - self.position:,} bytes more",
                "the file is too long, as when two downloads were joined: download it again",
            )
        if self.frame_end not in (None, self.position):
            raise Refused(f"a pickle frame up to byte {self.frame_end:,}", "the end of the pickle")
        match self.stack:
            case [ArrayNote(payload=Payload()) | QuantizedNote(weight=ArrayNote()) as note]:
                if not self.marks:
                    return note
        found = ", ".join(map(describe, self.stack[:4])) or "nothing"
        raise Refused("one array or one quantised weight", found)

    def name(self, opcode: bytes) -> str:
        """An instruction for an error message, with the global if it names one."""
        name = _OPCODE_NAMES.get(opcode, "unknown")
        if name in ("GLOBAL", "INST"):
            lines = self.file.read(255).split(b"\n")[:2]
            name += f" {b'.'.join(lines).decode('latin-1')!a}"
        return f"{name} (0x{opcode[0]:02x})"

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

    def unsigned(self, nbytes: int) -> int:
        return int.from_bytes(self.take(nbytes), "little")

    # The stack

    def pop(self, n: int) -> list[Any]:
        floor = self.marks[-1] if self.marks else 0
        if len(self.stack) - floor < n:
            raise Refused("a well-formed pickle", "an instruction without its operands")
        items = self.stack[len(self.stack) - n :]
        del self.stack[len(self.stack) - n :]
        return items

    def pop_to_mark(self) -> list[Any]:
        if not self.marks:
            raise Refused("a well-formed pickle", "the end of a group that never began")
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def peek(self) -> Any:
        (top,) = self.pop(1)
        self.stack.append(top)
        return top

    # Instructions

    def frame(self) -> None:
        length = self.unsigned(8)
        if self.frame_end is not None:
            raise Refused("pickle frames one after another", "a frame inside another")
        self.check_available(length, "a pickle frame")
        self.frame_end = self.position + length

    def skip_payload(self, length_bytes: int) -> None:
        nbytes = self.unsigned(length_bytes)
        self.check_available(nbytes, "an array payload")
        only_byte = self.file.read(1) if nbytes == 1 else None
        self.stack.append(Payload(self.position, nbytes, only_byte))
        self.position += nbytes
        self.file.seek(self.position)

    def text(self) -> None:
        raw = self.take(self.unsigned(1))
        try:
            self.stack.append(raw.decode("utf-8"))
        except UnicodeDecodeError:
            raise Refused("UTF-8 text", f"the bytes {raw[:40]!r}") from None

    def recall(self) -> None:
        index = self.unsigned(1)
        if index >= len(self.memo):
            raise Refused(f"one of {len(self.memo)} remembered values", f"number {index}")
        self.stack.append(self.memo[index])

    def build(self) -> None:
        target, state = self.pop(2)
        set_state(target, state)
        self.stack.append(target)

    def set_items(self) -> None:
        items = self.pop_to_mark()
        target = self.peek()
        keys, values = items[::2], items[1::2]
        if not isinstance(target, dict) or target or keys != ["weight", "scales"]:
            found = ", ".join(map(describe, keys[:4])) or "none"
            raise Refused("the entries 'weight' and 'scales'", found)
        if len(values) != 2:
            raise Refused("a value for each entry", f"{len(values)} values")
        target.update(zip(keys, values, strict=True))


def _push(value: Any) -> Callable[[_Machine], None]:
    return lambda m: m.stack.append(value)


def _number(nbytes: int, signed: bool) -> Callable[[_Machine], None]:
    return lambda m: m.stack.append(int.from_bytes(m.take(nbytes), "little", signed=signed))


def _tuple(n: int) -> Callable[[_Machine], None]:
    return lambda m: m.stack.append(tuple(m.pop(n)))


_OPCODE_NAMES = {o.code.encode("latin-1"): o.name for o in pickletools.opcodes}

_ACTIONS: dict[bytes, Callable[[_Machine], None]] = {
    b"\x95": _Machine.frame,  # FRAME
    b"\x8c": _Machine.text,  # SHORT_BINUNICODE
    b"\x94": lambda m: m.memo.append(m.peek()),  # MEMOIZE
    b"h": _Machine.recall,  # BINGET
    b"\x93": lambda m: m.stack.append(allowed_global(*m.pop(2))),  # STACK_GLOBAL
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
    b"t": lambda m: m.stack.append(tuple(m.pop_to_mark())),  # TUPLE
    b"}": lambda m: m.stack.append({}),  # EMPTY_DICT
    b"u": _Machine.set_items,  # SETITEMS
    b"\x81": lambda m: m.stack.append(new_object(*m.pop(2))),  # NEWOBJ
    b"R": lambda m: m.stack.append(call(*m.pop(2))),  # REDUCE
    b"b": _Machine.build,  # BUILD
    b"C": lambda m: m.skip_payload(1),  # SHORT_BINBYTES
    b"B": lambda m: m.skip_payload(4),  # BINBYTES
    b"\x8e": lambda m: m.skip_payload(8),  # BINBYTES8
}
