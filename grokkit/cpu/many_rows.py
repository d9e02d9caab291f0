"""Products of many rows with 8-bit matrices.

Rows are first laid side by side, `LANES` at a time, in what is called packed here; then each block
of a matrix is turned into floats once for all of them (`wide_tiles`). Of a matrix that lies as
[k, n] a block is turned round before; meanwhile, the next one comes from memory.
"""

from typing import Any

import numpy as np
from numba.np.numpy_support import carray

from grokkit.cpu.instructions import (
    HAS_BFLOAT16_PAIRS,
    LANES,
    address_of,
    compiled,
    one_of,
    pointer,
    words,
)
from grokkit.cpu.task import (
    BLOCKS,
    GROUPS,
    K_FIRST,
    MATRICES,
    MATRIX,
    OUT,
    PACKED,
    ROUNDED,
    ROWS,
    SCALES,
    WEIGHT,
    K,
    N,
    X,
)
from grokkit.cpu.turning import LINE, first_line, turn_into_cache, turn_words
from grokkit.cpu.wide_tiles import MOST_VECTORS, OUTPUTS, converter, rounder, wide_tile

PANELS = 8 * OUTPUTS
"""Outputs whose sums are kept while the entries are gone through."""
TURNED = 4 * PANELS
"""The same, where blocks are turned round: whole lines of the caches."""
_MOST = 256 // LANES
"""Vectors of rows whose sums are kept."""
_CHUNK = 256
"""Entries that are turned into floats at once: those of a panel stay in the first cache."""
_AHEAD = 2 * OUTPUTS
"""Outputs between those that are computed and those whose entries are called for from memory."""
_TOTALS = (_MOST + 1) * LANES
"""Rows that there is room for, with some to spare: an odd distance from output to output."""


_add_entries, _add_pairs = (
    one_of([wide_tile(vectors, pairs) for vectors in range(1, MOST_VECTORS + 1)])
    for pairs in (False, HAS_BFLOAT16_PAIRS)
)
_as_floats, _as_halves = converter(False), converter(True)


@compiled
def is_paired(rounded: int, k: int, groups: int) -> bool:
    """Whether entries are multiplied two at a time."""
    return HAS_BFLOAT16_PAIRS and rounded != 0 and k // groups % 2 == 0


@compiled
def multiply(task: Any, i: int, first: int, last: int) -> None:
    """Outputs `first` to `last` of the rows of the i-th matrix, which are packed.

    `first` may be below 0, so that whole lines of the caches begin there.
    """
    k, n, starts = task[K], task[N], words(task[ROWS], task[MATRICES] + 1)
    vectors = words(task[BLOCKS], task[MATRICES] + 1)
    paired = is_paired(task[ROUNDED], k, task[GROUPS])
    vector_bytes = (2 if paired else 4) * LANES * k
    panels = TURNED if task[K_FIRST] else PANELS
    totals = np.empty((panels, _TOTALS), np.float32)
    block = np.empty((TURNED * _CHUNK if task[K_FIRST] else 0) + LINE, np.int8)
    panel = np.zeros((OUTPUTS, _CHUNK + LANES), np.float32)
    scales = np.zeros(OUTPUTS, np.float32)
    for v in range(vectors[i], vectors[i + 1], _MOST):
        some, row = min(_MOST, vectors[i + 1] - v), starts[i] + (v - vectors[i]) * LANES
        rows = min(some * LANES, starts[i + 1] - row)
        for output in range(first, last, panels):
            start = max(0, output)
            outputs = min(output + panels, last) - start
            totals[:] = 0
            x = task[PACKED] + v * vector_bytes
            _sum_up(task, i, start, outputs, some, x, totals, panel, scales, block)
            to = task[OUT] + 4 * (n * row + start)
            turn_words(address_of(totals), outputs, rows, 4 * _TOTALS, to, 4 * n)


@compiled
def _sum_up(
    task: Any, i: int, start: int, outputs: int, vectors: int, x: int, totals: Any, panel: Any,
    scales: Any, block: Any,
) -> None:  # fmt: skip
    """Add to the totals of some outputs all their products with some vectors of packed rows."""
    k, n, groups = task[K], task[N], task[GROUPS]
    paired = is_paired(task[ROUNDED], k, groups)
    matrix, group = words(task[MATRIX], task[MATRICES])[i], k // groups
    weight = task[WEIGHT] + matrix * n * k + start * (1 if task[K_FIRST] else k)
    turned = first_line(block)
    bits = carray(pointer(task[SCALES] + 2 * matrix * groups * n), (groups, n), np.uint16)
    entry_bytes = (2 if paired else 4) * LANES
    panel_at, panel_bytes = address_of(panel), 4 * panel.shape[1]
    scale_bits = scales.view(np.uint32)
    tiles = -(-vectors // MOST_VECTORS)
    for g in range(groups):
        for chunk in range(g * group, (g + 1) * group, _CHUNK):
            entries = min(_CHUNK, (g + 1) * group - chunk)
            steps = entries // 2 if paired else entries
            block_at, output_bytes, next_at = weight + chunk, k, np.int64(0)
            if task[K_FIRST]:
                turn_into_cache(weight + chunk * n, entries, outputs, n, turned, _CHUNK)
                block_at, output_bytes = turned, _CHUNK
                end = chunk + entries
                next_at = weight + (end * n if end < k else outputs)
            for j in range(0, outputs, OUTPUTS):
                for o in range(min(OUTPUTS, outputs - j)):
                    source = block_at + (j + o) * output_bytes
                    soon, line_bytes = source + _AHEAD * k, LINE
                    if task[K_FIRST]:
                        soon, line_bytes = _in_next_block(next_at, j + o, entries, n), n
                    numbers = source, panel_at + o * panel_bytes, entries
                    if paired:
                        _as_halves(*numbers, soon, line_bytes)
                    else:
                        _as_floats(*numbers, soon, line_bytes)
                    scale_bits[o] = np.uint32(bits[g, start + j + o]) << np.uint32(16)
                how = panel_at, panel_bytes, steps, address_of(scales)
                for t in range(tiles):
                    a, b = vectors * t // tiles, vectors * (t + 1) // tiles
                    to = address_of(totals) + 4 * (j * _TOTALS + a * LANES)
                    rows = x + a * k * entry_bytes + chunk * entry_bytes
                    where = rows, k * entry_bytes, *how, to, 4 * _TOTALS
                    if paired:
                        _add_pairs(b - a, where)
                    else:
                        _add_entries(b - a, where)


@compiled
def _in_next_block(address: int, output: int, entries: int, n: int) -> int:
    """Which line of the next block, [entry, output], to begin at beside an output of this one. As
    many are called for as the output's entries fill here, of entries that follow each other: so that
    all outputs together call for each line once."""
    some = -(-entries // LINE)
    return address + output // LINE * LINE + output % LINE * some * n


_STRIP = 64
"""Entries of rows, or pairs, that are packed at once: they stay in the first cache."""
_round, _round_pairs = rounder(False), rounder(True)


@compiled
def pack(task: Any, vector: int) -> None:
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
