"""The innermost part of products of few rows: a tile of outputs and rows, in the compiler's own
language.

A compiler left to itself reads and converts the matrix again for each row. Here all that is loaded
is used for the whole tile while it lies in the processor's registers.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from grokkit.cpu.instructions import (
    LANES,
    instruction,
    load,
    multiply_add,
    on,
    prefetch,
    splat,
    widened,
)
from grokkit.cpu.task import ENTRY_BYTES, FLOAT32, INT8

_AHEAD = 2
"""Tiles between the one that is computed and the one whose matrix is called for from memory."""
_I8, _I16, _I32, _I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
_F32 = ir.FloatType()
_VECTOR = ir.VectorType(_F32, LANES)
_ZEROS = ir.Constant(_VECTOR, [0.0] * LANES)
_ARGUMENTS = (types.int64,) * 9


def tile(outputs: int, rows: int, entry: int) -> Any:
    """A function for compiled code that computes so many outputs of so many rows.

    The matrix's entries are `INT8`, with scales, or else `FLOAT32` or `BFLOAT16`, without.

    Each sum is kept in lanes until its end, in an order that does not depend on the tile's size.
    The function's arguments are integers:

    - `x`, `weight`, `scales`, `out`: addresses of the first row (float32 [row, group, size]), of
      the first output's entries ([output, group, size]), of its first scale (bfloat16 [group, n])
      and of its first result (float32 [row, n]).
    - `groups`, `size`: how many groups of scales, and entries of each, at least `LANES`.
    - `n`: how many outputs there are.
    - `row_bytes`: how far one row of `x` lies from the next.
    - `weight_bytes`: how far one output's entries lie from the next one's.
    """

    def compute(typing_context, x, weight, scales, out, groups, size, n, row_bytes, weight_bytes):
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _Tile(builder, arguments, outputs, rows, entry).compute()
            return context.get_dummy_value()

        return types.void(*_ARGUMENTS), codegen

    return instruction(compute)


def _power_of_two(n: int) -> int:
    """The least that is not below n."""
    return 1 << (n - 1).bit_length()


class _Tile:
    """One tile's instructions, written at the builder's place."""

    def __init__(self, builder: Any, arguments: Any, outputs: int, rows: int, entry: int) -> None:
        self.builder, self.entry = builder, entry
        self.x, self.weight, self.scales, self.out, *arguments = arguments
        self.groups, self.size, self.n, self.row_bytes, self.weight_bytes = arguments
        self.each = [(j, r) for j in range(outputs) for r in range(rows)]
        self.outputs, self.rows = range(outputs), range(rows)

    def compute(self) -> None:
        """Sum each group's products, scale the sums, and add groups and then lanes up."""
        builder, lanes = self.builder, _I64(LANES)
        totals, sums = self._room(), self._room()
        with cgutils.for_range(builder, self.groups) as groups:
            group = groups.index
            for place in sums.values():
                builder.store(_ZEROS, place)
            first = builder.mul(group, self.size)
            with cgutils.for_range(builder, builder.sdiv(self.size, lanes)) as steps:
                entry = builder.add(first, builder.mul(steps.index, lanes))
                self._add_products(sums, entry)
            rest = builder.srem(self.size, lanes)
            with builder.if_then(builder.icmp_signed("!=", rest, _I64(0))):
                # The last lanes of the group, of which the first have been added already.
                lane = ir.Constant(ir.VectorType(_I64, LANES), list(range(LANES)))
                since = splat(builder, builder.sub(lanes, rest), LANES)
                keep = builder.icmp_signed(">=", lane, since)
                entry = builder.sub(builder.add(first, self.size), lanes)
                self._add_products(sums, entry, keep)
            self._add_up(sums, totals, group)
        first, last = self._sums([builder.load(totals[at]) for at in self.each])
        for r in self.rows:
            places = [self.each.index((j, r)) for j in self.outputs]
            pointer = self._at(self.out, (r, builder.mul(self.n, _I64(4))))
            kind = ir.VectorType(_F32, len(places)).as_pointer()
            builder.store(self._pick(first, last, places), builder.inttoptr(pointer, kind), 4)

    def _room(self) -> dict[tuple[int, int], Any]:
        """A place for each sum, which the compiler turns into registers."""
        return {at: cgutils.alloca_once_value(self.builder, _ZEROS) for at in self.each}

    def _add_products(self, sums: Any, entry: Any, keep: Any = None) -> None:
        """Add the products of the lanes from an entry on, or of those of them that are to keep."""
        builder, weight_bytes = self.builder, self.weight_bytes
        rows = [load(builder, self._at(self.x, (entry, 4), (r, self.row_bytes)), _VECTOR, 1)
                for r in self.rows]  # fmt: skip
        for j in self.outputs:
            address = self._at(self.weight, (entry, ENTRY_BYTES[self.entry]), (j, weight_bytes))
            floats = self._floats(address)
            prefetch(builder, self._at(address, (_AHEAD * len(self.outputs), weight_bytes)))
            if keep is not None:
                floats = builder.select(keep, floats, _ZEROS)
            for r in self.rows:
                found = multiply_add(builder, floats, rows[r], builder.load(sums[j, r]))
                builder.store(found, sums[j, r])

    def _floats(self, address: Any) -> Any:
        """The matrix's entries at an address, as floats."""
        builder = self.builder
        if self.entry == FLOAT32:
            return load(builder, address, _VECTOR, 4)
        if self.entry == INT8:
            return builder.sitofp(load(builder, address, ir.VectorType(_I8, LANES), 1), _VECTOR)
        return widened(builder, load(builder, address, ir.VectorType(_I16, LANES), 2))

    def _add_up(self, sums: Any, totals: Any, group: Any) -> None:
        """Add a group's sums, times its scales if it has any, to the totals."""
        builder = self.builder
        for j in self.outputs:
            scale = self._scale(group, j) if self.entry == INT8 else None
            for r in self.rows:
                part, total = builder.load(sums[j, r]), builder.load(totals[j, r])
                if scale is None:
                    part = builder.fadd(part, total)
                else:
                    part = multiply_add(builder, part, scale, total)
                builder.store(part, totals[j, r])

    def _scale(self, group: Any, output: int) -> Any:
        """A scale in every lane."""
        builder = self.builder
        place = builder.add(builder.mul(group, self.n), _I64(output))
        bits = load(builder, self._at(self.scales, (place, 2)), _I16, 1)
        return splat(builder, widened(builder, bits), LANES)

    def _at(self, address: Any, *steps: tuple[Any, Any]) -> Any:
        """An address so many times so many bytes on."""
        for count, width in steps:
            address = on(self.builder, address, count, width)
        return address

    def _pick(self, a: Any, b: Any, places: list[int]) -> Any:
        """Lanes of two vectors, counted on from the first to the second."""
        return self.builder.shuffle_vector(
            a, b, ir.Constant(ir.VectorType(_I32, len(places)), places)
        )

    def _sums(self, vectors: list[Any]) -> tuple[Any, Any]:
        """The sum over the lanes of each vector, as the lanes of one or of two, counted on.

        Neighbouring lanes are added, those of two vectors at once, until each vector has one left.
        """
        vectors = vectors + vectors[:1] * (-len(vectors) % _power_of_two(len(vectors)))
        evens, odds = list(range(0, 2 * LANES, 2)), list(range(1, 2 * LANES, 2))
        lanes = LANES
        while lanes > 1:
            if len(vectors) == 1:
                evens, odds = evens[: len(evens) // 2], odds[: len(odds) // 2]
                pairs = [(vectors[0], vectors[0])]
            else:
                pairs = list(zip(vectors[::2], vectors[1::2], strict=True))
            vectors = [self.builder.fadd(self._pick(a, b, evens), self._pick(a, b, odds))
                       for a, b in pairs]  # fmt: skip
            lanes //= 2
        assert len(vectors) <= 2
        return vectors[0], vectors[-1]
