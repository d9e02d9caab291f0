"""Products of few rows with matrices of floats, of which only the first outputs, or entries, may be
wanted: the logits of the next tokens, and attention to the keys and values of those before."""

from typing import Any

import numpy as np
from numba.np.numpy_support import carray

from grokkit.cpu.few_rows import multiplier
from grokkit.cpu.instructions import compiled, float_of, pointer, words
from grokkit.cpu.task import (
    BFLOAT16,
    ENTRY,
    FLOAT32,
    MATRICES,
    OUT,
    REACH,
    ROWS,
    WEIGHT,
    K,
    N,
    X,
)

_multiply_float32, _multiply_bfloat16 = multiplier(FLOAT32), multiplier(BFLOAT16)


@compiled
def multiply(task: Any, i: int, part: int, parts: int) -> None:
    """A part of the outputs of the rows of the i-th matrix; those out of reach are 0."""
    n, starts = task[N], words(task[ROWS], task[MATRICES] + 1)
    first, last = n * part // parts, n * (part + 1) // parts
    reach = max(first, min(last, words(task[REACH], task[MATRICES])[i]))
    if task[ENTRY] == FLOAT32:
        _multiply_float32(task, i, first, reach)
    else:
        _multiply_bfloat16(task, i, first, reach)
    for row in range(starts[i], starts[i + 1]):
        out = carray(pointer(task[OUT] + 4 * (n * row + reach)), last - reach, np.float32)
        out[:] = 0


@compiled
def add(task: Any, i: int) -> None:
    """For each row of the i-th matrix the sum of that matrix's rows in reach, times its entries."""
    k, n, starts = task[K], task[N], words(task[ROWS], task[MATRICES] + 1)
    reach = min(k, words(task[REACH], task[MATRICES])[i])
    rows = starts[i + 1] - starts[i]
    x = carray(pointer(task[X] + 4 * k * starts[i]), (rows, k), np.float32)
    out = carray(pointer(task[OUT] + 4 * n * starts[i]), (rows, n), np.float32)
    out[:] = 0
    if task[ENTRY] == FLOAT32:
        values = carray(pointer(task[WEIGHT] + 4 * i * k * n), (k, n), np.float32)
        for key in range(reach):
            for row in range(rows):
                for j in range(n):
                    out[row, j] += x[row, key] * values[key, j]
    else:
        bits = carray(pointer(task[WEIGHT] + 2 * i * k * n), (k, n), np.uint16)
        for key in range(reach):
            for row in range(rows):
                for j in range(n):
                    out[row, j] += x[row, key] * float_of(np.int64(bits[key, j]) << 16)
