"""Products of few rows: a matrix is read once for every few of them, at the speed of memory."""

from typing import Any

from grokkit.cpu.instructions import LANES, compiled, one_of, words
from grokkit.cpu.task import (
    ENTRY_BYTES,
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
from grokkit.cpu.tiles import tile

FEW_ROWS = 16
"""The most rows of a matrix that are called few."""
_AT_ONCE = 5 if LANES == 16 else 4
"""Rows of a tile: as many as its sums leave registers for."""
_SOME = 4
"""Outputs of a tile, but for the last ones."""
_BYTES = 2**18
"""Of the matrix, which stay in the processor's second cache while one tile's rows after another's
meet them."""


@compiled
def has_few(rows: int, k: int, groups: int) -> bool:
    """Whether rows of one matrix are few; then its groups fill a register."""
    return rows <= FEW_ROWS and k // groups >= LANES


def multiplier(entry: int) -> Any:
    """A function that computes outputs `first` to `last` of the rows of a task's i-th matrix, whose
    entries are as in `tile`."""
    some_outputs, one_output = (
        one_of([tile(outputs, rows, entry) for rows in range(1, _AT_ONCE + 1)])
        for outputs in (_SOME, 1)
    )
    width = ENTRY_BYTES[entry]

    def multiply(task: Any, i: int, first: int, last: int) -> None:
        k, groups, n, starts = task[K], task[GROUPS], task[N], words(task[ROWS], task[MATRICES] + 1)
        matrix, rows = words(task[MATRIX], task[MATRICES])[i], starts[i + 1] - starts[i]
        x, out = task[X] + 4 * k * starts[i], task[OUT] + 4 * n * starts[i]
        weight, row_bytes = matrix_at(task, i), task[ROW_BYTES]
        scales = task[SCALES] + 2 * matrix * groups * n
        tiles = -(-rows // _AT_ONCE)
        at_once = max(1, _BYTES // (width * k * _SOME)) * _SOME if tiles > 1 else n
        how = (groups, k // groups, n, 4 * k, row_bytes)
        for start in range(first, last, at_once):
            end = min(start + at_once, last)
            for t in range(tiles):
                r, j = rows * t // tiles, start
                some = rows * (t + 1) // tiles - r
                while j < end:
                    weight_at, to = weight + row_bytes * j, out + 4 * (n * r + j)
                    where = (x + 4 * k * r, weight_at, scales + 2 * j, to, *how)
                    if end - j >= _SOME:
                        some_outputs(some, where)
                        j += _SOME
                    else:
                        one_output(some, where)
                        j += 1

    return compiled(multiply)
