"""A product as its loops see it: numbers, in 8 bytes each.

Addresses of the rows [row, k], of the matrix and scales that the first place stands for, of the
result and of the packed rows; k, the groups of scales and n; whether to round to bfloat16; whether
rows are multiplied as whole numbers; how many matrices any row meets, and addresses of three lists:
which they are, where their rows begin and where their blocks of packed rows do; what is to be done,
and into how many pieces it is cut.
"""

X, WEIGHT, SCALES, OUT, PACKED, K, GROUPS, N, ROUNDED, WHOLE = range(10)
MATRICES, MATRIX, ROWS, BLOCKS, IS_PACKING, PIECES = range(10, 16)
SIZE = 16
