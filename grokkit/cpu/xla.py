"""What XLA calls through its foreign function interface.

The C structures are those of `xla/ffi/api/c_api.h`, which XLA keeps compatible.
"""

import atexit
import ctypes
import functools
import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numba.np.numpy_support import carray

from grokkit.cpu import few_rows, loops, task, threads, whole_numbers
from grokkit.cpu.instructions import LANES, called_from_c, compiled, pointer, words
from grokkit.cpu.large_pages import ask_for_large_pages

TARGET = "grokkit_product"

_PIECES = 8
"""Pieces for each thread, so that none waits long for another at the end."""

# Every field of XLA's structures that is used here takes 8 bytes; these are places in them.
_FRAME_EXTENSION, _FRAME_ARGUMENTS, _FRAME_RESULTS, _FRAME_SIZE = 1, 9, 14, 22
_DATA, _SIZES, _BUFFER_SIZE = 3, 5, 6
_EXTENSION_TYPE, _EXTENSION_METADATA, _METADATA_VERSION = 1, 3, 3
_METADATA = 1
_VERSION = 3 << 32  # 0.3: the major number lies in the lower half

# The first argument of a call is int32 numbers: what to do, as in `task`; where in the stack the
# first matrix is; how many threads; and, of 8-bit matrices, how many groups, whether to round,
# whether to multiply whole numbers, whether they lie as [k, n], how many bytes are before them, from
# row to row and from matrix to matrix, and how many rows meet each; or, of floats, what the entries
# are, and how many outputs are wanted of each.
_WHAT, _PLACE, _THREADS = 0, 1, 2
_GROUPS, _ROUNDED, _WHOLE, _K_FIRST, _BEFORE, _ROW_BYTES, _MATRIX_BYTES, _COUNTS = range(3, 11)
_ENTRY, _REACH = 3, 4


@compiled
def _group(counts: Any, lists: Any, k: int, groups: int, whole: int) -> Any:
    """List the matrices that rows meet, where their rows begin and where their packed blocks do.

    How many matrices there are, and how many blocks.
    """
    met = rows = blocks = 0
    lists[1, 0] = lists[2, 0] = 0
    for i in range(counts.shape[0]):
        count = np.int64(counts[i])
        if count > 0:
            rows += count
            if whole:
                blocks += -(-count // whole_numbers.BLOCK)
            elif not few_rows.has_few(count, k, groups):
                blocks += -(-count // LANES)
            lists[0, met], lists[1, met + 1], lists[2, met + 1] = i, rows, blocks
            met += 1
    return met, blocks


@compiled
def _new_task(facts: Any, matrices: int, x: int, out: int, k: int, n: int) -> Any:
    """A task, and lists for so many matrices.

    All in one piece of memory, which is let go when its last name is: the lists lie behind the task.
    """
    length = matrices + 1
    this = np.zeros(task.SIZE + 3 * length, np.int64)
    lists_at = np.int64(this.ctypes.data) + 8 * task.SIZE
    this[task.WHAT], this[task.X], this[task.OUT] = facts[_WHAT], x, out
    this[task.K], this[task.N], this[task.GROUPS], this[task.MATRICES] = k, n, 1, matrices
    this[task.MATRIX], this[task.ROWS] = lists_at, lists_at + 8 * length
    this[task.BLOCKS] = this[task.REACH] = lists_at + 16 * length
    return this, this[task.SIZE :].reshape(3, length)


@compiled
def _multiply(facts: Any, arguments: Any, results: Any) -> None:
    """Rows with 8-bit matrices: pack those of matrices that many meet, then multiply."""
    x, weight = words(arguments[1], _BUFFER_SIZE), words(arguments[2], _BUFFER_SIZE)
    scales, out = words(arguments[3], _BUFFER_SIZE), words(results[0], _BUFFER_SIZE)
    k, n = words(x[_SIZES], 2)[1], words(out[_SIZES], 2)[1]
    place, groups, counts = facts[_PLACE], np.int64(facts[_GROUPS]), facts[_COUNTS:]
    this, lists = _new_task(facts, counts.shape[0], x[_DATA], out[_DATA], k, n)
    met, blocks = _group(counts, lists, k, groups, facts[_WHOLE])
    if met == 0:
        return
    this[task.PACKED] = words(results[1], _BUFFER_SIZE)[_DATA]
    matrix_bytes = np.int64(facts[_MATRIX_BYTES])
    this[task.K_FIRST], this[task.ROW_BYTES] = facts[_K_FIRST], facts[_ROW_BYTES]
    this[task.MATRIX_BYTES] = matrix_bytes
    this[task.WEIGHT] = weight[_DATA] + facts[_BEFORE] + place * matrix_bytes
    this[task.SCALES] = scales[_DATA] + 2 * place * groups * n
    this[task.GROUPS], this[task.MATRICES] = groups, met
    this[task.ROUNDED], this[task.WHOLE] = facts[_ROUNDED], facts[_WHOLE]
    n_threads = facts[_THREADS]
    if blocks > 0:
        this[task.WHAT], this[task.PIECES] = task.PACKING, blocks
        threads.share(this, n_threads)
    pieces = _PIECES * n_threads
    is_read_once = facts[_WHOLE] or blocks == 0
    this[task.WHAT] = task.MULTIPLYING
    this[task.PIECES] = met * (-(-pieces // met) if is_read_once else pieces)
    threads.share(this, n_threads)


@compiled
def _multiply_floats(facts: Any, arguments: Any, results: Any) -> None:
    """Rows with matrices of floats, or their sums."""
    x, weight = words(arguments[1], _BUFFER_SIZE), words(arguments[2], _BUFFER_SIZE)
    out = words(results[0], _BUFFER_SIZE)
    (matrices, rows, k), n = words(x[_SIZES], 3), words(out[_SIZES], 3)[2]
    this, lists = _new_task(facts, matrices, x[_DATA], out[_DATA], k, n)
    for i in range(matrices):
        lists[0, i], lists[1, i + 1], lists[2, i] = i, rows * (i + 1), facts[_REACH + i]
    entry_bytes = task.ENTRY_BYTES[facts[_ENTRY]]
    this[task.ROW_BYTES], this[task.MATRIX_BYTES] = entry_bytes * k, entry_bytes * n * k
    this[task.WEIGHT] = weight[_DATA] + facts[_PLACE] * this[task.MATRIX_BYTES]
    this[task.ENTRY], n_threads = facts[_ENTRY], facts[_THREADS]
    is_cut = facts[_WHAT] == task.PRODUCTS
    this[task.PIECES] = matrices * (-(-_PIECES * n_threads // matrices) if is_cut else 1)
    threads.share(this, n_threads)


@compiled
def _run(frame: Any) -> None:
    arguments, results = words(frame[_FRAME_ARGUMENTS], 4), words(frame[_FRAME_RESULTS], 2)
    numbers = words(arguments[0], _BUFFER_SIZE)
    size = words(numbers[_SIZES], 1)[0]
    facts = carray(pointer(numbers[_DATA]), (size,), np.int32)
    if facts[_WHAT] == task.MULTIPLYING:
        _multiply(facts, arguments, results)
    elif facts[_WHAT] == task.ASKING:
        room = words(results[1], _BUFFER_SIZE)
        ask_for_large_pages(room[_DATA], 4 * words(room[_SIZES], 1)[0])
    else:
        _multiply_floats(facts, arguments, results)


def _handler(version: int) -> Any:
    """What XLA calls, and threads begin with."""

    def handle(address: int) -> int:
        """Answer XLA, which asks which version this is or for a product; at no address, help."""
        if address == 0:
            threads.help_others()
            return 0 * version
        frame = words(address, _FRAME_SIZE)
        if frame[_FRAME_EXTENSION] != 0:
            extension = words(frame[_FRAME_EXTENSION], 4)
            if np.int32(extension[_EXTENSION_TYPE]) == _METADATA:
                words(extension[_EXTENSION_METADATA], 4)[_METADATA_VERSION] = _VERSION
                return 0
        _run(frame)
        return 0

    return handle


def _version() -> int:
    """A number that changes with any of the files of which the compiled code is made.

    Functions are made for a version, so that what is kept on disk is of the same.
    """
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources))
    return int.from_bytes(digest.digest()[:4])


@functools.cache
def register() -> tuple[Any, Any]:
    """Make the product known to XLA; returns what must live as long as XLA may call it."""
    threads.prepare()
    version = _version()
    piece, handler = called_from_c(loops.piece_runner(version)), called_from_c(_handler(version))
    threads.set_functions(handler.address, piece.address)
    atexit.register(threads.await_helpers)
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype = ctypes.py_object
    capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    target = capsule(handler.address, b"xla._CUSTOM_CALL_TARGET", None)
    jax.ffi.register_ffi_target(TARGET, target, platform="cpu", api_version=1)
    return piece, handler
