"""Products of few rows with a matrix that lies as [k, n], which is read once, as it lies."""

from typing import Any

import numpy as np
from numba.np.numpy_support import carray

from grokkit.cpu import column_tiles
from grokkit.cpu.column_tiles import OUTPUTS, WIDE_ROWS, column_tile
from grokkit.cpu.instructions import LINE, address_of, compiled, copy_rows, one_of, pointer, words
from grokkit.cpu.task import (
    GROUPS,
    MATRICES,
    MATRIX,
    OUT,
    ROW_BYTES,
    ROWS,
    SCALES,
    K,
    N,
    X,
    matrix_at,
)

_LINES = 16
"""Lines beside each other that are gone through together, or half as many more: memory does not
give one after the other of entries that lie far apart at its full speed."""
_COLUMNS = LINE * (_LINES + _LINES // 2)
UNIT = 4 * LINE
"""Outputs to cut a matrix at: narrower parts would be read more slowly."""
_ENTRIES = 128
"""Of each output that are summed at once: they, and the next ones, stay in the second cache."""
_tile = one_of([column_tile(n, OUTPUTS) for n in range(1, column_tiles.ROWS + 1)])
_wide_tile = one_of([column_tile(n, 2 * OUTPUTS) for n in range(1, WIDE_ROWS + 1)])


@compiled
def multiply(task: Any, i: int, first: int, last: int) -> None:
    """Outputs `first` to `last` of the rows of the i-th matrix.

    `first` may be below 0, so that whole lines of the caches begin there.
    """
    n, matrices, starts = task[N], task[MATRICES], words(task[ROWS], task[MATRICES] + 1)
    rows = starts[i + 1] - starts[i]
    totals = np.empty((rows, _COLUMNS), np.float32)
    scales = np.empty(_COLUMNS, np.float32)
    rest = np.zeros((_ENTRIES, OUTPUTS), np.int8)
    out = carray(pointer(task[OUT] + 4 * n * starts[i]), (rows, n), np.float32)
    lines = -(-(last - first) // LINE)
    strips = min(lines, max(1, (lines + _LINES // 2) // _LINES))
    for strip in range(strips):
        start = first + LINE * (lines * strip // strips)
        stop = min(first + LINE * (lines * (strip + 1) // strips), last)
        skipped = max(0, -start)
        totals[:] = 0
        then = matrix_at(task, i) + stop
        if strip == strips - 1:  # this thread may go on with the same outputs of the next matrix
            then = matrix_at(task, i + 1) + first if i + 1 < matrices else np.int64(0)
        _sum_up(task, i, start, stop, then, totals, scales, rest)
        for r in range(rows):
            out[r, start + skipped : stop] = totals[r, skipped : stop - start]


@compiled
def _sum_up(
    task: Any, i: int, start: int, stop: int, then: int, totals: Any, scales: Any, rest: Any
) -> None:
    """Add all products of some outputs to their totals. What lies before the first output is added
    as if it were of the matrix, times 0: its line is read in any case.

    `then` is the address of what will be gone through afterwards, or 0.
    """
    k, n, groups, outputs = task[K], task[N], task[GROUPS], stop - start
    matrix, size = words(task[MATRIX], task[MATRICES])[i], k // groups
    some = -(-size // -(-size // _ENTRIES))
    weight, distance = matrix_at(task, i) + start, task[ROW_BYTES]
    x = task[X] + 4 * k * words(task[ROWS], task[MATRICES] + 1)[i]
    bits = carray(pointer(task[SCALES] + 2 * matrix * groups * n), (groups, n), np.uint16)
    scale_bits = scales.view(np.uint32)
    scale_bits[:] = 0
    for g in range(groups):
        for output in range(max(0, start), stop):
            scale_bits[output - start] = np.uint32(bits[g, output]) << np.uint32(16)
        end = (g + 1) * size
        for entry in range(g * size, end, some):
            steps, source = min(some, end - entry), weight + entry * distance
            soon = source + steps * distance
            if entry + steps == k:
                soon = then if then else source  # which is at hand: nothing is called for
            where = x + 4 * entry, 4 * k, source, distance, steps, soon
            _add(*where, outputs, scales, totals, rest)


@compiled
def _add(
    x: int, row_bytes: int, source: int, source_bytes: int, steps: int, soon: int, outputs: int,
    scales: Any, totals: Any, rest: Any,
) -> None:  # fmt: skip
    """Add to some outputs' totals their products with some entries."""
    rows, lines = totals.shape[0], -(-outputs // LINE)
    tiles = -(-rows // column_tiles.ROWS)
    are_wide = -(-rows // tiles) <= WIDE_ROWS
    j = 0
    while j < outputs:
        entries, distance, width = source + j, source_bytes, OUTPUTS
        if outputs - j < OUTPUTS and distance % LINE:  # beside them there may be no memory
            copy_rows(entries, distance, address_of(rest), OUTPUTS, steps, outputs - j)
            entries, distance = address_of(rest), np.int64(OUTPUTS)
        elif are_wide and outputs - j >= 2 * OUTPUTS:
            width = 2 * OUTPUTS
        for t in range(tiles):
            a, b = rows * t // tiles, rows * (t + 1) // tiles
            scales_at, to = address_of(scales) + 4 * j, address_of(totals) + 4 * (_COLUMNS * a + j)
            where = x + row_bytes * a, row_bytes, entries, distance, steps
            more = scales_at, to, 4 * _COLUMNS, soon, source_bytes, lines, j // LINE * steps
            if width > OUTPUTS:
                _wide_tile(b - a, (*where, *more))
            else:
                _tile(b - a, (*where, *more))
        j += width
