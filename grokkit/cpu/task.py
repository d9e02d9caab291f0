"""A task as its loops see it: numbers, in 8 bytes each.

Addresses of the rows [row, k], of the matrix and scales that the first place stands for, of the
result and of the packed rows; k, the groups of scales and n; whether to round to bfloat16; whether
rows are multiplied as whole numbers; how many matrices any row meets, and addresses of three lists:
which they are, where their rows begin and where their blocks of packed rows do; what is to be done,
and into how many pieces it is cut. For matrices of floats, what their entries are, and the address
of another list: how many outputs, or rows to add, are wanted of each. Whether 8-bit matrices lie
as [k, n] and not as [n, k]; and how many bytes from one of a matrix's rows, as they lie, to the
next, and from matrix to matrix.
"""

from typing import Any

from grokkit.cpu.instructions import compiled, words

X, WEIGHT, SCALES, OUT, PACKED, K, GROUPS, N, ROUNDED, WHOLE = range(10)
MATRICES, MATRIX, ROWS, BLOCKS, WHAT, PIECES, ENTRY, REACH, K_FIRST = range(10, 19)
ROW_BYTES, MATRIX_BYTES = range(19, 21)
SIZE = 21

MULTIPLYING, PACKING, PRODUCTS, SUMS, ASKING = range(5)
"""What is done: 8-bit matrices are multiplied, or their rows packed; matrices of floats are
multiplied, or their rows added; or, by one thread at once, the system is asked for large pages."""

INT8, FLOAT32, BFLOAT16 = range(3)
"""What a matrix's entries are."""
ENTRY_BYTES = (1, 4, 2)


@compiled
def matrix_at(task: Any, i: int) -> int:
    """The address of the i-th matrix that rows meet."""
    return task[WEIGHT] + words(task[MATRIX], task[MATRICES])[i] * task[MATRIX_BYTES]
