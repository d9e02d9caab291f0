"""What threads run: a piece of a task.

Rows are grouped by the 8-bit matrix that they meet. Where the processor multiplies tiles of whole
numbers, it does (`whole_numbers`). Elsewhere there is one way for a matrix that few rows meet
(`few_rows`; `few_columns` for one that lies as [k, n]) and one for more (`many_rows`). Matrices of
floats are multiplied with few rows only.
"""

from typing import Any

import numpy as np

from grokkit.cpu import few_columns, few_rows, float_rows, many_rows, whole_numbers
from grokkit.cpu.amx import SIDE
from grokkit.cpu.instructions import HAS_AMX, LINE, compiled, words
from grokkit.cpu.task import (
    GROUPS,
    INT8,
    K_FIRST,
    MATRICES,
    MATRIX_BYTES,
    PACKING,
    PIECES,
    PRODUCTS,
    ROW_BYTES,
    ROWS,
    SIZE,
    SUMS,
    WEIGHT,
    WHAT,
    WHOLE,
    K,
    N,
    matrix_at,
)
from grokkit.cpu.turning import first_line, turn_into_cache

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
    def multiply_turned(task: Any, i: int, first: int, last: int) -> None:
        """Outputs of a matrix that lies as [k, n], of which some after the other are turned round
        and used while they are in the caches."""
        k, source = task[K], matrix_at(task, i)
        room = np.empty(many_rows.COLUMNS * k + LINE, np.int8)
        this = task.copy()
        this[ROW_BYTES], this[MATRIX_BYTES] = k, 0
        for output in range(first, last, many_rows.COLUMNS):
            start, stop = max(0, output), min(last, output + many_rows.COLUMNS)
            # Within the loop: memory whose name is not used any more is let go.
            turned = first_line(room)
            turn_into_cache(source + start, k, stop - start, task[ROW_BYTES], turned, k)
            this[WEIGHT] = turned - start * k
            multiply_whole(this, i, start, stop)

    @compiled
    def multiply_part(task: Any, i: int, part: int, parts: int) -> None:
        """Some outputs of the i-th matrix, cut where the loops begin anew."""
        k, n, starts = task[K], task[N], words(task[ROWS], task[MATRICES] + 1)
        are_few = few_rows.has_few(starts[i + 1] - starts[i], k, task[GROUPS])
        unit, before = 1 if are_few else many_rows.PANELS, np.int64(0)
        if task[WHOLE]:
            unit = SIDE
        if task[K_FIRST]:  # a line of the caches may begin before the first output
            before = matrix_at(task, i) % LINE
            unit = few_columns.UNIT if are_few and not task[WHOLE] else many_rows.COLUMNS
        units = -(-(n + before) // unit)
        first = unit * (units * part // parts) - before
        last = min(n, unit * (units * (part + 1) // parts) - before)
        if task[WHOLE] and task[K_FIRST]:
            multiply_turned(task, i, first, last)
        elif task[WHOLE]:
            multiply_whole(task, i, first, last)
        elif not are_few:
            many_rows.multiply(task, i, first, last)
        elif task[K_FIRST]:
            few_columns.multiply(task, i, first, last)
        else:
            _multiply_few(task, i, first, last)

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
