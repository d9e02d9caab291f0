"""Memory in large pages.

XLA takes a program's working memory anew from the system each time that it runs, and gives it back.
In pages of 4 kB that costs as much as a tenth to a quarter of a long prompt's products.
"""

import sys

from numba import types

from grokkit.cpu.instructions import compiled

LEAST = 1 << 24
"""Bytes of working memory that are worth asking for: less is kept by the C library anyhow."""
_LARGE = 1 << 21  # bytes
_MADV_HUGEPAGE = 14  # Linux's number; other systems choose by themselves
_IS_LINUX = sys.platform == "linux"

_advise = types.ExternalFunction("madvise", types.int32(types.int64, types.int64, types.int32))


@compiled
def ask_for_large_pages(address: int, n_bytes: int) -> None:
    """Have the system take large pages for as much of some memory as is not there yet, if it will.

    It is a wish: where there are none, nothing is different.
    """
    if not _IS_LINUX:
        return
    first = -(-address // _LARGE) * _LARGE
    size = (address + n_bytes) // _LARGE * _LARGE - first
    if size > 0:
        _advise(first, size, _MADV_HUGEPAGE)
