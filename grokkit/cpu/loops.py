"""What threads run: a piece of a task.

Rows are grouped by the 8-bit matrix that they meet. Where the processor multiplies tiles of whole
numbers, it does (`whole_numbers`). Elsewhere there is one way for a matrix that few rows meet
(`few_rows`) and one for more (`many_rows`). Matrices of floats are multiplied with few rows only.
"""

from typing import Any

from grokkit.cpu import few_rows, float_rows, many_rows, whole_numbers
from grokkit.cpu.amx import SIDE
from grokkit.cpu.instructions import HAS_AMX, compiled, words
from grokkit.cpu.task import (
    GROUPS,
    INT8,
    MATRICES,
    PACKING,
    PIECES,
    PRODUCTS,
    ROWS,
    SIZE,
    SUMS,
    WHAT,
    WHOLE,
    K,
    N,
)

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
    def multiply(task: Any, i: int, part: int, parts: int) -> None:
        starts, n = words(task[ROWS], task[MATRICES] + 1), task[N]
        if task[WHOLE]:
            tiles = -(-n // SIDE)
            first, last = tiles * part // parts, tiles * (part + 1) // parts
            multiply_whole(task, i, SIDE * first, min(n, SIDE * last))
        elif few_rows.has_few(starts[i + 1] - starts[i], task[K], task[GROUPS]):
            _multiply_few(task, i, n * part // parts, n * (part + 1) // parts)
        else:
            panels = -(-n // many_rows.PANELS)
            first, last = panels * part // parts, panels * (part + 1) // parts
            many_rows.multiply(task, i, many_rows.PANELS * first, min(n, many_rows.PANELS * last))

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
            multiply(task, i, part, parts)
        return 0 * version

    return run_piece
