"""Products whose rows are written as whole numbers, where the processor multiplies tiles of those.

Each group of a row is rounded to 24 bits, counted from its largest entry's first, and cut into
three digits of 8 bits, which stand in columns of a tile beside those of other rows. Their products
with the matrix's entries are summed without rounding; so a row's results do not depend on the rows
beside it. To read the matrix from memory takes longer than the arithmetic, up to some ten rows.
"""

from typing import Any

import numpy as np
from numba.np.numpy_support import carray

from grokkit.cpu import amx
from grokkit.cpu.amx import CHUNK, MOST_TILES, SIDE, TILE_BYTES, product_adder
from grokkit.cpu.digits import DIGITS, LARGEST, largest_bits, write_digits
from grokkit.cpu.instructions import address_of, compiled, float_of, pointer, words
from grokkit.cpu.task import (
    BLOCKS,
    GROUPS,
    MATRICES,
    MATRIX,
    OUT,
    PACKED,
    ROW_BYTES,
    ROWS,
    SCALES,
    K,
    N,
    X,
    matrix_at,
)
from grokkit.cpu.turning import turn_words

BLOCK = SIDE // DIGITS
"""Rows whose digits share a tile."""
MOST_ENTRIES = 2**17 - 1
"""Of a group: a sum of so many products of two digits of 8 bits fits in 32."""
_ONE, _INFINITY = 0x3F800000, 0x7F800000
"""Bits of float32 numbers."""

_BLOCKS_AT_ONCE = 2 * MOST_TILES
_OUTPUTS_AT_ONCE = 16 * SIDE
"""Whose sums are kept while groups are gone through, where all groups of the rows' digits do not
fit in `_CACHED` bytes, a share of the processor's second cache."""
_CACHED = 2**20

_SHORT = 4096
"""Rows of a matrix that are no longer end before the processor has noticed that it reads on, and
so do groups by themselves. There the next outputs' entries are called for, elsewhere those that are
_NEAR bytes on."""
_NEAR = 4 * CHUNK


def is_fit(k: int, groups: int) -> bool:
    """Whether the processor and the groups' sizes allow such products."""
    return amx.is_there() and CHUNK <= k // groups <= MOST_ENTRIES


@compiled
def _chunks(k: int, groups: int) -> int:
    return groups * -(-(k // groups) // CHUNK)


@compiled
def block_words(k: int, groups: int) -> int:
    """Words of 4 bytes that a block of packed rows takes up: digits, and the columns' scales."""
    return (_chunks(k, groups) * TILE_BYTES + groups * CHUNK) // 4


@compiled
def pack(task: Any, block: int) -> None:
    """Write a block's rows: digits, [group, chunk, entry // 4, column, entry % 4], and scales,
    [group, column]. A column is a row's digit, [digit, row]."""
    k, groups, i = task[K], task[GROUPS], 0
    starts = words(task[ROWS], task[MATRICES] + 1)
    blocks = words(task[BLOCKS], task[MATRICES] + 1)
    while blocks[i + 1] <= block:
        i += 1
    first, size = starts[i] + BLOCK * (block - blocks[i]), k // groups
    rows, chunks = min(BLOCK, starts[i + 1] - first), _chunks(k, groups) // groups
    to = task[PACKED] + 4 * block_words(k, groups) * block
    scales = carray(pointer(to + groups * chunks * TILE_BYTES), (groups, SIDE), np.float32)
    scales[:] = 0
    row_bytes = CHUNK * chunks
    digits = np.zeros((SIDE, row_bytes), np.int8)
    for g in range(groups):
        for row in range(rows):
            entries = task[X] + 4 * (k * (first + row) + g * size)
            at = address_of(digits) + row * row_bytes
            scale = _write_row(entries, size, at, BLOCK * row_bytes)
            for d in range(DIGITS):
                scales[g, d * BLOCK + row] = scale * np.float32(256**d)
        group = to + g * chunks * TILE_BYTES
        turn_words(address_of(digits), SIDE, SIDE * chunks, row_bytes, group, CHUNK)


@compiled
def _write_row(entries: int, size: int, digits: int, digit_bytes: int) -> np.float32:
    """Write a group's entries, divided by a scale, as digits; returns the scale. Of addresses.

    The entries of the last chunk go to its end; what is before them is left alone. If something is
    not finite, the scale is not a number.
    """
    most = largest_bits(entries, size)
    if most >= _INFINITY:
        return np.float32(np.nan)
    if most == 0:  # so is each entry, and so will be each digit
        most = np.int64(_ONE)
    largest = np.float64(float_of(most))
    whole = (-(-size // CHUNK) - 1) * CHUNK
    overlap = -size % CHUNK
    write_digits(entries, whole, LARGEST / largest, digits, digit_bytes)
    last = digits + whole + overlap
    write_digits(entries + 4 * whole, size - whole, LARGEST / largest, last, digit_bytes)
    return np.float32(largest / LARGEST)


_one, _two, _three, _four, _five, _six = (product_adder(n) for n in range(1, MOST_TILES + 1))


@compiled
def _add_products(tiles: int, these: Any, place: Any) -> None:
    if tiles == 6:
        _six(*these, *place)
    elif tiles == 5:
        _five(*these, *place)
    elif tiles == 4:
        _four(*these, *place)
    elif tiles == 3:
        _three(*these, *place)
    elif tiles == 2:
        _two(*these, *place)
    else:
        _one(*these, *place)


@compiled
def multiply(task: Any, i: int, first: int, last: int) -> None:
    """Outputs `first` to `last` of the rows of the i-th matrix, which are packed."""
    k, n, groups = task[K], task[N], task[GROUPS]
    starts = words(task[ROWS], task[MATRICES] + 1)
    blocks = words(task[BLOCKS], task[MATRICES] + 1)
    matrix, size = words(task[MATRIX], task[MATRICES])[i], k // groups
    group_bytes, row_bytes = _chunks(k, groups) // groups * TILE_BYTES, task[ROW_BYTES]
    block_bytes = 4 * block_words(k, groups)
    some = min(blocks[i + 1] - blocks[i], _BLOCKS_AT_ONCE)
    # Either a few outputs with all groups, or many with one after another.
    is_cached = some * block_bytes <= _CACHED
    outputs, some_groups = (SIDE, groups) if is_cached else (_OUTPUTS_AT_ONCE, 1)
    totals, turned = _aligned(some * outputs * SIDE), _aligned(SIDE * SIDE)
    totals_bytes, configured = 4 * SIDE * outputs, 0
    ahead = SIDE * row_bytes if k <= _SHORT or not is_cached else _NEAR
    for block in range(blocks[i], blocks[i + 1], some):
        end = min(block + some, blocks[i + 1])
        for start in range(first, last, outputs):
            stop = min(start + outputs, last)
            totals[:] = 0
            for g in range(0, groups, some_groups):
                for j in range(start, stop, SIDE):
                    high = min(SIDE, stop - j)
                    if high != configured:
                        amx.configure(high)
                        configured = high
                    scales = task[SCALES] + 2 * ((matrix * groups + g) * n + j)
                    weight = matrix_at(task, i) + j * row_bytes + g * size
                    these = weight, row_bytes, some_groups, size, scales, 2 * n, high
                    for b in range(block, end, MOST_TILES):
                        columns = task[PACKED] + b * block_bytes
                        by_column = columns + groups * group_bytes + g * CHUNK
                        columns += g * group_bytes
                        to = (
                            address_of(totals) + totals_bytes * (b - block) + 4 * SIDE * (j - start)
                        )
                        place = columns, by_column, to, block_bytes, totals_bytes, ahead
                        _add_products(min(MOST_TILES, end - b), these, place)
            for b in range(block, end):
                row = starts[i] + (b - blocks[i]) * BLOCK
                rows, out = min(BLOCK, starts[i + 1] - row), task[OUT] + 4 * (n * row + start)
                source = address_of(totals) + totals_bytes * (b - block)
                _write(source, stop - start, rows, out, n, turned.reshape(SIDE, SIDE))
    amx.release()


@compiled
def _aligned(n: int) -> Any:
    """Room for floats, from the beginning of a line of the caches."""
    memory = np.empty(n + CHUNK // 4, np.float32)
    off = -address_of(memory) % CHUNK // 4
    return memory[off : off + n]


@compiled
def _write(totals: int, outputs: int, rows: int, out: int, n: int, turned: Any) -> None:
    """Write a block's results, the sums of its rows' digits. Of addresses."""
    for start in range(0, outputs, SIDE):
        turn_words(totals + 4 * SIDE * start, SIDE, SIDE, 4 * SIDE, address_of(turned), 4 * SIDE)
        some = min(SIDE, outputs - start)
        for row in range(rows):
            to = carray(pointer(out + 4 * (n * row + start)), SIDE, np.float32)
            if some == SIDE:  # as the compiler can do all at once
                for j in range(SIDE):
                    to[j] = turned[2 * BLOCK + row, j] + (turned[BLOCK + row, j] + turned[row, j])
            else:
                for j in range(some):
                    to[j] = turned[2 * BLOCK + row, j] + (turned[BLOCK + row, j] + turned[row, j])
