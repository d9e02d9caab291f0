"""What threads run: a piece of a task.

Rows are grouped by the 8-bit matrix that they meet. Where the processor multiplies tiles of whole
numbers, it does (`whole_numbers`). Elsewhere there is one way for a matrix that few rows meet
(`few_rows`) and one for more (`many_rows`). Matrices of floats are multiplied with few rows only.
"""

from typing import Any

import numpy as np

from grokkit.cpu import few_rows, float_rows, many_rows, whole_numbers
from grokkit.cpu.amx import SIDE
from grokkit.cpu.instructions import HAS_AMX, compiled, words
from grokkit.cpu.task import (
    GROUPS,
    INT8,
    K_FIRST,
    MATRICES,
    MATRIX,
    PACKING,
    PIECES,
    PRODUCTS,
    ROWS,
    SIZE,
    SUMS,
    WEIGHT,
    WHAT,
    WHOLE,
    K,
    N,
)
from grokkit.cpu.turning import LINE, first_line, turn_into_cache

_multiply_few = few_rows.multiplier(INT8)


def piece_runner(version: int) -> Any:
    """What runs a piece of a task.

    A whole of its own: what it is made of is compiled again with each caller.
    """

    # What a processor has no instructions for cannot be compiled either; it is not called there.
    pack_whole, multiply_whole = many_rows.pack, _multiply_few
    if HAS_AMX:
        pack_whole, multiply_whole = whole_numbers.pack, whole_numbers.multiply

    @compiled
    def has_few(task: Any, i: int) -> bool:
        starts = words(task[ROWS], task[MATRICES] + 1)
        return few_rows.has_few(starts[i + 1] - starts[i], task[K], task[GROUPS])

    @compiled
    def multiply(task: Any, i: int, first: int, last: int) -> None:
        if task[WHOLE]:
            multiply_whole(task, i, first, last)
        elif has_few(task, i):
            _multiply_few(task, i, first, last)
        else:
            many_rows.multiply(task, i, first, last)

    @compiled
    def multiply_turned(task: Any, i: int, part: int, parts: int) -> None:
        """Some outputs of a matrix that lies as [k, n]: a few columns after the other are turned
        round, and used while they are in the caches."""
        k, n, matrix = task[K], task[N], words(task[MATRIX], task[MATRICES])[i]
        source, columns = task[WEIGHT] + matrix * n * k, many_rows.TURNED
        before = source % LINE  # columns begin at lines; the first of them may be the file's header
        units = -(-(n + before) // columns)
        by_block = task[WHOLE] == 0 and not has_few(task, i)  # turned round by who multiplies
        room = np.empty(LINE if by_block else columns * k + LINE, np.int8)
        this = task.copy()
        for unit in range(units * part // parts, units * (part + 1) // parts):
            start = unit * columns - before
            stop = min(n, start + columns)
            if not by_block:
                # Within the loop: memory whose name is not used any more is let go.
                turned = first_line(room)
                turn_into_cache(source + start, k, stop - start, n, turned, k)
                this[WEIGHT] = turned - (matrix * n + start) * k
            multiply(this, i, max(0, start), stop)

    @compiled
    def multiply_part(task: Any, i: int, part: int, parts: int) -> None:
        """Some of a matrix's outputs, cut where the loops begin anew."""
        if task[K_FIRST]:
            return multiply_turned(task, i, part, parts)
        if task[WHOLE]:
            unit = SIDE
        else:
            unit = 1 if has_few(task, i) else many_rows.PANELS
        units = -(-task[N] // unit)
        first, last = units * part // parts, units * (part + 1) // parts
        multiply(task, i, unit * first, min(task[N], unit * last))

    def run_piece(task_at: int, piece: int) -> int:
        task = words(task_at, SIZE)
        if task[WHAT] == PACKING:  # pieces are blocks
            if task[WHOLE]:
                pack_whole(task, piece)
            else:
                many_rows.pack(task, piece)
            return 0
        parts = task[PIECES] // task[MATRICES]
        i, part = piece // parts, piece % parts
        if task[WHAT] == PRODUCTS:
            float_rows.multiply(task, i, part, parts)
        elif task[WHAT] == SUMS:
            float_rows.add(task, i)
        else:
            multiply_part(task, i, part, parts)
        return 0 * version

    return run_piece
