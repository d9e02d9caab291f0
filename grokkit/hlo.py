"""Reading a compiled program's text: which exchanges between devices it makes, and how often."""

import re
from typing import NamedTuple

import jax.numpy as jnp

_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_RESULT = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][a-z0-9\-]*)\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_NAMES = {"pred": "bool", "s": "int", "u": "uint", "f": "float", "bf16": "bfloat16"}


class Collective(NamedTuple):
    """One kind of exchange between devices."""

    kind: str
    count: int
    nbytes: int
    """Bytes of the results on one device, all of them together."""


def collectives(text: str) -> tuple[Collective, ...]:
    """Exchanges in one run of a program, loops counted as often as they turn.

    **Arguments:**

    - `text`: the compiled program, as `jax.stages.Compiled.as_text()` gives it.

    **Returns:** the kinds that occur. A loop whose turns are not known when it is compiled, and
    each branch of a condition, counts once.
    """
    bodies, entry = _computations(text)
    found: dict[str, list[int]] = {}

    def visit(name: str, times: int) -> None:
        for line in bodies.get(name, ()):
            result = _RESULT.match(line)
            if result is None:
                continue
            shape, operation = result.groups()
            kind = operation.removesuffix("-start")
            if kind in _KINDS:
                count = found.setdefault(kind, [0, 0])
                count[0] += times
                count[1] += times * _nbytes(shape)
                continue
            trips = _TRIPS.search(line) if operation == "while" else None
            turns = times * int(trips[1]) if trips else times
            called = _CALLED.findall(line)
            for branches in _BRANCHES.findall(line):
                called += [b.strip().lstrip("%") for b in branches.split(",")]
            for other in called:
                visit(other, turns)

    visit(entry, 1)
    return tuple(Collective(kind, *found[kind]) for kind in _KINDS if kind in found)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the name of the first to run."""
    bodies: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        start = _COMPUTATION.match(line)
        if start:
            current = bodies.setdefault(start[2], [])
            entry = start[2] if start[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            current.append(line)
    return bodies, entry


def _nbytes(shape: str) -> int:
    """Bytes of a result, `f32[1,6144]{1,0}` or a tuple of such."""
    total = 0
    for name, sizes in _ARRAY.findall(shape):
        prefix = name.rstrip("0123456789")
        dtype = _NAMES.get(name) or _NAMES.get(prefix, prefix) + name[len(prefix) :]
        count = 1
        for size in filter(None, sizes.split(",")):
            count *= int(size)
        total += count * jnp.dtype(dtype).itemsize
    return total
