"""The loops of a product, over rows that are grouped by the matrix that they meet.

Where the processor multiplies tiles of whole numbers, it does (`whole_numbers`). Elsewhere a matrix that few rows meet is read once, at the speed of memory (`tiles`). For more rows they are
first laid side by side, `LANES` at a time, in what is called packed here; then each block of a
matrix is turned into floats once for all of them (`wide_tiles`).
"""

from typing import Any

import numpy as np
from numba.np.numpy_support import carray

from grokkit.cpu import whole_numbers
from grokkit.cpu.amx import SIDE
from grokkit.cpu.instructions import (
    HAS_AMX,
    HAS_BFLOAT16_PAIRS,
    LANES,
    address_of,
    compiled,
    pointer,
    words,
)
from grokkit.cpu.task import (
    BLOCKS,
    GROUPS,
    IS_PACKING,
    MATRICES,
    MATRIX,
    OUT,
    PACKED,
    PIECES,
    ROUNDED,
    ROWS,
    SCALES,
    SIZE,
    WEIGHT,
    WHOLE,
    K,
    N,
    X,
)
from grokkit.cpu.tiles import tile
from grokkit.cpu.turning import turn_words
from grokkit.cpu.wide_tiles import MOST_VECTORS, OUTPUTS, converter, rounder, wide_tile

FEW_ROWS = 16
"""Up to this many rows of a matrix its entries are read once for every few of them."""


@compiled
def has_few(rows: int, k: int, groups: int) -> bool:
    """Whether rows of one matrix are few; then its groups fill a register."""
    return rows <= FEW_ROWS and k // groups >= LANES


@compiled
def is_paired(rounded: int, k: int, groups: int) -> bool:
    """Whether entries are multiplied two at a time."""
    return HAS_BFLOAT16_PAIRS and rounded != 0 and k // groups % 2 == 0


def piece_runner(version: int) -> Any:
    """What runs a piece of a product, or of the packing before it.

    A whole of its own: what it is made of is compiled again with each caller.
    """

    # What a processor has no instructions for cannot be compiled either; it is not called there.
    pack_whole, multiply_whole = _pack, _multiply_few
    if HAS_AMX:
        pack_whole, multiply_whole = whole_numbers.pack, whole_numbers.multiply

    def run_piece(task_at: int, piece: int) -> int:
        task = words(task_at, SIZE)
        if task[IS_PACKING]:
            if task[WHOLE]:
                pack_whole(task, piece)
            else:
                _pack(task, piece)
            return 0
        pieces = task[PIECES] // task[MATRICES]
        i, part = piece // pieces, piece % pieces
        starts, n = words(task[ROWS], task[MATRICES] + 1), task[N]
        if task[WHOLE]:
            tiles = -(-n // SIDE)
            first, last = tiles * part // pieces, tiles * (part + 1) // pieces
            multiply_whole(task, i, SIDE * first, min(n, SIDE * last))
        elif has_few(starts[i + 1] - starts[i], task[K], task[GROUPS]):
            _multiply_few(task, i, n * part // pieces, n * (part + 1) // pieces)
        else:
            panels = -(-n // _PANELS)
            first, last = panels * part // pieces, panels * (part + 1) // pieces
            _multiply_many(task, i, _PANELS * first, min(n, _PANELS * last))
        return 0 * version

    return run_piece


# Few rows


_AT_ONCE = 5 if LANES == 16 else 4
"""Rows of a tile: as many as its sums leave registers for."""


def _tiles(outputs: int) -> Any:
    """A function that computes a tile of so many outputs and some rows."""
    one, two, three, four, five = (tile(outputs, min(n, _AT_ONCE)) for n in range(1, 6))

    def compute(rows: int, place: Any, how: Any) -> None:
        if rows == 5:
            five(*place, *how)
        elif rows == 4:
            four(*place, *how)
        elif rows == 3:
            three(*place, *how)
        elif rows == 2:
            two(*place, *how)
        else:
            one(*place, *how)

    return compiled(compute)


_SOME = 4
_some_outputs, _one_output = _tiles(_SOME), _tiles(1)
_BYTES = 2**18
"""Of the matrix, which stay in the processor's second cache while one tile's rows after another's
meet them."""


@compiled
def _multiply_few(task: Any, i: int, first: int, last: int) -> None:
    """Outputs `first` to `last` of the rows of the i-th matrix."""
    k, groups, n, starts = task[K], task[GROUPS], task[N], words(task[ROWS], task[MATRICES] + 1)
    matrix, rows = words(task[MATRIX], task[MATRICES])[i], starts[i + 1] - starts[i]
    x, out = task[X] + 4 * k * starts[i], task[OUT] + 4 * n * starts[i]
    weight, scales = task[WEIGHT] + matrix * n * k, task[SCALES] + 2 * matrix * groups * n
    tiles = -(-rows // _AT_ONCE)
    at_once = max(1, _BYTES // (k * _SOME)) * _SOME if tiles > 1 else n
    how = (groups, k // groups, n, 4 * k)
    for start in range(first, last, at_once):
        end = min(start + at_once, last)
        for t in range(tiles):
            r, j = rows * t // tiles, start
            some = rows * (t + 1) // tiles - r
            while j < end:
                place = (x + 4 * k * r, weight + k * j, scales + 2 * j, out + 4 * (n * r + j))
                if end - j >= _SOME:
                    _some_outputs(some, place, how)
                    j += _SOME
                else:
                    _one_output(some, place, how)
                    j += 1


# Many rows


_PANELS = 8 * OUTPUTS
"""Outputs whose sums are kept while the entries are gone through."""
_MOST = 256 // LANES
"""Vectors of rows whose sums are kept."""
_CHUNK = 256
"""Entries that are turned into floats at once: those of a panel stay in the first cache."""
_AHEAD = 2 * OUTPUTS
"""Outputs between those that are computed and those whose entries are called for from memory."""
_TOTALS = (_MOST + 1) * LANES
"""Rows that there is room for, with some to spare: an odd distance from output to output."""


def _wide_tiles(pairs: bool) -> Any:
    """A function that adds the products of some vectors of rows."""
    one, two, three, four = (wide_tile(min(n, MOST_VECTORS), pairs) for n in (1, 2, 3, 4))

    def compute(vectors: int, x: int, x_bytes: int, how: Any, totals: int) -> None:
        if vectors == 4:
            four(x, x_bytes, *how, totals, 4 * _TOTALS)
        elif vectors == 3:
            three(x, x_bytes, *how, totals, 4 * _TOTALS)
        elif vectors == 2:
            two(x, x_bytes, *how, totals, 4 * _TOTALS)
        else:
            one(x, x_bytes, *how, totals, 4 * _TOTALS)

    return compiled(compute)


_add_entries, _add_pairs = _wide_tiles(False), _wide_tiles(HAS_BFLOAT16_PAIRS)
_as_floats, _as_halves = converter(False), converter(True)


@compiled
def _multiply_many(task: Any, i: int, first: int, last: int) -> None:
    """Outputs `first` to `last` of the rows of the i-th matrix, which are packed."""
    k, n, starts = task[K], task[N], words(task[ROWS], task[MATRICES] + 1)
    vectors = words(task[BLOCKS], task[MATRICES] + 1)
    paired = is_paired(task[ROUNDED], k, task[GROUPS])
    vector_bytes = (2 if paired else 4) * LANES * k
    totals = np.empty((_PANELS, _TOTALS), np.float32)
    panel = np.zeros((OUTPUTS, _CHUNK + LANES), np.float32)
    scales = np.zeros(OUTPUTS, np.float32)
    for v in range(vectors[i], vectors[i + 1], _MOST):
        some, row = min(_MOST, vectors[i + 1] - v), starts[i] + (v - vectors[i]) * LANES
        rows = min(some * LANES, starts[i + 1] - row)
        for start in range(first, last, _PANELS):
            outputs = min(_PANELS, last - start)
            totals[:] = 0
            x = task[PACKED] + v * vector_bytes
            _sum_up(task, i, start, outputs, some, x, totals, panel, scales)
            to = task[OUT] + 4 * (n * row + start)
            turn_words(address_of(totals), outputs, rows, 4 * _TOTALS, to, 4 * n)


@compiled
def _sum_up(
    task: Any, i: int, start: int, outputs: int, vectors: int, x: int, totals: Any, panel: Any,
    scales: Any,
) -> None:  # fmt: skip
    """Add to the totals of some outputs all their products with some vectors of packed rows."""
    k, n, groups = task[K], task[N], task[GROUPS]
    paired = is_paired(task[ROUNDED], k, groups)
    matrix, group = words(task[MATRIX], task[MATRICES])[i], k // groups
    weight = task[WEIGHT] + (matrix * n + start) * k
    bits = carray(pointer(task[SCALES] + 2 * matrix * groups * n), (groups, n), np.uint16)
    entry_bytes = (2 if paired else 4) * LANES
    panel_at, panel_bytes = address_of(panel), 4 * panel.shape[1]
    scale_bits = scales.view(np.uint32)
    tiles = -(-vectors // MOST_VECTORS)
    for g in range(groups):
        for chunk in range(g * group, (g + 1) * group, _CHUNK):
            entries = min(_CHUNK, (g + 1) * group - chunk)
            steps = entries // 2 if paired else entries
            for j in range(0, outputs, OUTPUTS):
                for o in range(min(OUTPUTS, outputs - j)):
                    source, target = weight + (j + o) * k + chunk, panel_at + o * panel_bytes
                    if paired:
                        _as_halves(source, target, entries, source + _AHEAD * k)
                    else:
                        _as_floats(source, target, entries, source + _AHEAD * k)
                    scale_bits[o] = np.uint32(bits[g, start + j + o]) << np.uint32(16)
                how = (panel_at, panel_bytes, steps, address_of(scales))
                for t in range(tiles):
                    a, b = vectors * t // tiles, vectors * (t + 1) // tiles
                    to = address_of(totals) + 4 * (j * _TOTALS + a * LANES)
                    at = x + a * k * entry_bytes + chunk * entry_bytes
                    if paired:
                        _add_pairs(b - a, at, k * entry_bytes, how, to)
                    else:
                        _add_entries(b - a, at, k * entry_bytes, how, to)


_STRIP = 64
"""Entries of rows, or pairs, that are packed at once: they stay in the first cache."""
_round, _round_pairs = rounder(False), rounder(True)


@compiled
def _pack(task: Any, vector: int) -> None:
    """Lay the rows of one vector side by side: [entry, lane], or [pair, lane, 2]."""
    k, starts = task[K], words(task[ROWS], task[MATRICES] + 1)
    vectors, i = words(task[BLOCKS], task[MATRICES] + 1), 0
    while vectors[i + 1] <= vector:
        i += 1
    row = starts[i] + (vector - vectors[i]) * LANES
    rows = min(LANES, starts[i + 1] - row)
    paired = is_paired(task[ROUNDED], k, task[GROUPS])
    x, height = task[X] + 4 * k * row, k // 2 if paired else k
    packed = task[PACKED] + 4 * LANES * height * vector
    strip = np.zeros((LANES, _STRIP), np.uint32)
    for first in range(0, height, _STRIP):
        n = min(_STRIP, height - first)
        for lane in range(rows):
            to = address_of(strip) + 4 * _STRIP * lane
            if paired:
                _round_pairs(x + 4 * (k * lane + 2 * first), to, n)
            elif task[ROUNDED]:
                _round(x + 4 * (k * lane + first), to, n)
            else:
                source = carray(pointer(x + 4 * (k * lane + first)), n, np.uint32)
                for e in range(n):
                    strip[lane, e] = source[e]
        turn_words(address_of(strip), LANES, n, 4 * _STRIP, packed + 4 * LANES * first, 4 * LANES)
