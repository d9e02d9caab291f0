"""Products of many rows with 8-bit matrices.

Rows are first laid side by side, `LANES` at a time, in what is called packed here; then each block
of a matrix is turned into floats once for all of them (`wide_tiles`).
"""

from typing import Any

import numpy as np
from numba.np.numpy_support import carray

from grokkit.cpu.instructions import (
    HAS_BFLOAT16_PAIRS,
    LANES,
    LINE,
    address_of,
    compiled,
    copy_rows,
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
    ROW_BYTES,
    ROWS,
    SCALES,
    K,
    N,
    X,
    matrix_at,
)
from grokkit.cpu.turning import turn_words
from grokkit.cpu.wide_tiles import (
    LINES,
    MOST_VECTORS,
    OUTPUTS,
    call_for,
    column_converter,
    converter,
    rounder,
    wide_tile,
)

PANELS = 8 * OUTPUTS
"""Outputs whose sums are kept while the entries are gone through."""
COLUMNS = LINES * LINE
"""The same, where a matrix lies as [k, n]."""
_MOST = 256 // LANES
"""Vectors of rows whose sums are kept."""
_CHUNK = 256
"""Entries that are turned into floats at once: those of some outputs stay in the first caches."""
_AHEAD = 2 * OUTPUTS
"""Outputs between those that are computed and those whose entries are called for from memory."""
_TOTALS = (_MOST + 1) * LANES
"""Rows that there is room for, with some to spare: an odd distance from output to output."""

_add_entries, _add_pairs = (
    one_of([wide_tile(vectors, pairs) for vectors in range(1, MOST_VECTORS + 1)])
    for pairs in (False, HAS_BFLOAT16_PAIRS)
)
_as_floats, _as_halves = converter(False), converter(True)
_columns_as_floats, _columns_as_halves = (
    column_converter(PANELS, pairs) for pairs in (False, True)
)


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
    panels = COLUMNS if task[K_FIRST] else PANELS
    totals = np.empty((panels, _TOTALS), np.float32)
    panel = np.zeros((PANELS if task[K_FIRST] else OUTPUTS) * (_CHUNK + LANES), np.float32)
    rest = np.zeros((_CHUNK if task[K_FIRST] else 0, PANELS), np.int8)
    scales = np.zeros(panels, np.float32)
    for v in range(vectors[i], vectors[i + 1], _MOST):
        some, row = min(_MOST, vectors[i + 1] - v), starts[i] + (v - vectors[i]) * LANES
        rows = min(some * LANES, starts[i + 1] - row)
        for output in range(first, last, panels):
            start = max(0, output)
            outputs = min(output + panels, last) - start
            totals[:] = 0
            x = task[PACKED] + v * vector_bytes
            if task[K_FIRST]:
                _sum_up_columns(task, i, start, outputs, some, x, totals, panel, scales, rest)
            else:
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
    row_bytes = task[ROW_BYTES]
    weight = matrix_at(task, i) + start * row_bytes
    bits = carray(pointer(task[SCALES] + 2 * matrix * groups * n), (groups, n), np.uint16)
    panel_at, output_bytes = address_of(panel), 4 * (_CHUNK + LANES)
    scale_bits = scales.view(np.uint32)
    for g in range(groups):
        for chunk in range(g * group, (g + 1) * group, _CHUNK):
            entries = min(_CHUNK, (g + 1) * group - chunk)
            for j in range(0, outputs, OUTPUTS):
                for o in range(min(OUTPUTS, outputs - j)):
                    source = weight + chunk + (j + o) * row_bytes
                    soon = source + _AHEAD * row_bytes
                    numbers = source, panel_at + o * output_bytes, entries, soon
                    if paired:
                        _as_halves(*numbers)
                    else:
                        _as_floats(*numbers)
                    scale_bits[o] = np.uint32(bits[g, start + j + o]) << np.uint32(16)
                how = panel_at, output_bytes, np.int64(4), address_of(scales)
                _add(x, k, chunk, entries, paired, vectors, how, address_of(totals[j]))


@compiled
def _sum_up_columns(
    task: Any, i: int, start: int, outputs: int, vectors: int, x: int, totals: Any, panel: Any,
    scales: Any, rest: Any,
) -> None:  # fmt: skip
    """The same, of a matrix that lies as [k, n]."""
    k, n, groups = task[K], task[N], task[GROUPS]
    paired = is_paired(task[ROUNDED], k, groups)
    matrix, group = words(task[MATRIX], task[MATRICES])[i], k // groups
    weight, row_bytes = matrix_at(task, i) + start, task[ROW_BYTES]
    bits = carray(pointer(task[SCALES] + 2 * matrix * groups * n), (groups, n), np.uint16)
    scale_bits = scales.view(np.uint32)
    for g in range(groups):
        for output in range(outputs):
            scale_bits[output] = np.uint32(bits[g, start + output]) << np.uint32(16)
        for chunk in range(g * group, (g + 1) * group, _CHUNK):
            entries = min(_CHUNK, (g + 1) * group - chunk)
            end = chunk + entries
            soon = weight + (end * row_bytes if end < k else outputs)
            for first in range(0, outputs, PANELS):
                source, distance = weight + chunk * row_bytes + first, row_bytes
                some = min(PANELS, outputs - first)
                if some < PANELS:  # beside them there may be no memory
                    copy_rows(source, row_bytes, address_of(rest), PANELS, entries, some)
                    source, distance = address_of(rest), np.int64(PANELS)
                numbers = source, distance, address_of(panel), entries
                if paired:
                    _columns_as_halves(*numbers)
                else:
                    _columns_as_floats(*numbers)
                for j in range(0, some, OUTPUTS):
                    a = entries * (first + j) // outputs
                    b = entries * min(first + j + OUTPUTS, outputs) // outputs
                    call_for(soon + a * row_bytes, row_bytes, b - a)
                    scales_at = address_of(scales) + 4 * (first + j)
                    how = address_of(panel) + 4 * j, np.int64(4), np.int64(4 * PANELS), scales_at
                    _add(x, k, chunk, entries, paired, vectors, how, address_of(totals[first + j]))


@compiled
def _add(
    x: int, k: int, chunk: int, entries: int, paired: int, vectors: int, how: Any, totals: int
) -> None:
    """Add to the totals of a panel's outputs their products with some entries."""
    panel, output_bytes, step_bytes, scales = how
    steps, entry_bytes = (entries // 2, 2 * LANES) if paired else (entries, 4 * LANES)
    tiles = -(-vectors // MOST_VECTORS)
    for t in range(tiles):
        a, b = vectors * t // tiles, vectors * (t + 1) // tiles
        rows, to = x + (a * k + chunk) * entry_bytes, totals + 4 * a * LANES
        where = rows, k * entry_bytes, panel, output_bytes, step_bytes, steps, scales, to
        if paired:
            _add_pairs(b - a, (*where, 4 * _TOTALS))
        else:
            _add_entries(b - a, (*where, 4 * _TOTALS))


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
