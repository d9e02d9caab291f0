"""Products on a CPU as XLA sees them: a call through its foreign function interface.

The C structures are those of `xla/ffi/api/c_api.h`, which XLA keeps compatible.
"""

import atexit
import ctypes
import functools
import hashlib
import os
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float, Int, Int8
from numba.np.numpy_support import carray

from grokkit.cpu import loops, task, threads, whole_numbers
from grokkit.cpu.instructions import LANES, called_from_c, compiled, pointer, words

_TARGET = "grokkit_product"
_ONE_AT_A_TIME = threading.Lock()
_A_THREAD = 2**18
"""Entries of the matrix that are worth sharing with one thread more."""
_PIECES = 8
"""Pieces for each thread, so that none waits long for another at the end."""


def is_there() -> bool:
    """Whether this system has threads of the kind that are started here."""
    return os.name == "posix"


def grouped_product(
    x: Float[Array, "row k"],
    counts: Int[Array, " matrix"],
    weight: Int8[Array, "matrix_n k"],
    scales: BFloat16[Array, "matrix_g n"],
    place: Int[Array, ""],
    dtype: Any,
) -> Float[Array, "row n"]:
    """Each row times its matrix, of consecutive matrices of a stack.

    **Arguments:**

    - `x`: rows, in float32; the first `counts[0]` of them meet the first matrix, and so on.
    - `counts`: how many rows meet each matrix. Of a matrix that none meets nothing is read.
    - `weight`, `scales`: the stack: each matrix, and its groups' scales, in consecutive rows.
    - `place`: where in the stack the first matrix is.
    - `dtype`: float32 or bfloat16, which rows are rounded to before they are multiplied, unless
        they are few or multiplied as whole numbers. Sums are in float32.

    Under `shard_map` all must be of one type.
    """
    with _ONE_AT_A_TIME:  # XLA takes one registration, and two threads may compile at once
        _register()
    (rows, k), n = x.shape, scales.shape[1]
    groups = scales.shape[0] // (weight.shape[0] // n)
    rounded = int(jnp.dtype(dtype) == jnp.bfloat16)
    whole = whole_numbers.is_fit(k, groups)
    numbers = jnp.array([groups, _threads(rows, n * k), rounded, int(whole)], jnp.int32)
    # Of the type that shard_map wants of what is used with the weights, and of what comes of it.
    numbers = jnp.concatenate([place[None], numbers, counts.astype(jnp.int32)])
    numbers = numbers + 0 * weight[0, :1].astype(jnp.int32)
    bits = jax.lax.bitcast_convert_type(scales, jnp.uint16)
    zero = jnp.zeros((1, 1)) * x[:1, :1]
    most = _most_blocks(rows, counts.shape[0], whole, k // groups)
    if whole:
        packed = most, whole_numbers.block_words.py_func(k, groups)
    else:
        packed = most, LANES * (k // 2 if loops.is_paired.py_func(rounded, k, groups) else k)
    results = [jax.typeof(jnp.broadcast_to(zero, shape)) for shape in ((rows, n), packed)]
    call = jax.ffi.ffi_call(_TARGET, results, vmap_method="sequential")
    return call(x, weight, bits, numbers)[0]


def _most_blocks(rows: int, matrices: int, whole: bool, group: int) -> int:
    """How many blocks packed rows can take up; the last of each matrix may be part empty."""
    block = whole_numbers.BLOCK if whole else LANES
    fewest = 1 if whole or group < LANES else loops.FEW_ROWS + 1
    return (rows + min(matrices, rows // fewest) * (block - 1)) // block if rows >= fewest else 1


def _threads(rows: int, entries: int) -> int:
    """How many threads to cut a product over: the processor's, shared between devices."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else max(1, mesh.size // jax.process_count())
    return max(1, min(cores() // devices, entries * -(-rows // 4) // _A_THREAD))


def cores() -> int:
    """The processor's cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# What XLA calls. Every field of its C structures that is used here takes 8 bytes; the numbers
# below are places in them.

_FRAME_EXTENSION, _FRAME_ARGUMENTS, _FRAME_RESULTS, _FRAME_SIZE = 1, 9, 14, 22
_DATA, _SIZES, _BUFFER_SIZE = 3, 5, 6
_EXTENSION_TYPE, _EXTENSION_METADATA, _METADATA_VERSION = 1, 3, 3
_METADATA = 1
_VERSION = 3 << 32  # 0.3: the major number lies in the lower half
_NUMBERS = 5
"""How many numbers there are before the counts: place, groups, threads, whether to round, whether
to multiply whole numbers."""


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
            elif not loops.has_few(count, k, groups):
                blocks += -(-count // LANES)
            lists[0, met], lists[1, met + 1], lists[2, met + 1] = i, rows, blocks
            met += 1
    return met, blocks


@compiled
def _run(frame: Any) -> None:
    """The product of a call: pack the rows of matrices that many meet, then multiply."""
    arguments, results = words(frame[_FRAME_ARGUMENTS], 4), words(frame[_FRAME_RESULTS], 2)
    x, weight = words(arguments[0], _BUFFER_SIZE), words(arguments[1], _BUFFER_SIZE)
    scales, numbers = words(arguments[2], _BUFFER_SIZE), words(arguments[3], _BUFFER_SIZE)
    out, packed = words(results[0], _BUFFER_SIZE), words(results[1], _BUFFER_SIZE)
    k, n = words(x[_SIZES], 2)[1], words(out[_SIZES], 2)[1]
    size = words(numbers[_SIZES], 1)[0]
    facts = carray(pointer(numbers[_DATA]), (size,), np.int32)
    place, groups, n_threads = facts[0], facts[1], facts[2]
    # In one piece of memory, which is let go when its last name is: the lists lie behind the task.
    length = size - _NUMBERS + 1
    this = np.zeros(task.SIZE + 3 * length, np.int64)
    lists = this[task.SIZE :].reshape(3, length)
    met, blocks = _group(facts[_NUMBERS:], lists, k, groups, facts[4])
    if met == 0:
        return
    this[task.X], this[task.OUT], this[task.PACKED] = x[_DATA], out[_DATA], packed[_DATA]
    this[task.WEIGHT] = weight[_DATA] + place * n * k
    this[task.SCALES] = scales[_DATA] + 2 * place * groups * n
    this[task.K], this[task.GROUPS], this[task.N] = k, groups, n
    this[task.ROUNDED], this[task.WHOLE], this[task.MATRICES] = facts[3], facts[4], met
    lists_at = np.int64(this.ctypes.data) + 8 * task.SIZE
    this[task.MATRIX], this[task.ROWS] = lists_at, lists_at + 8 * length
    this[task.BLOCKS] = lists_at + 16 * length
    if blocks > 0:
        this[task.IS_PACKING], this[task.PIECES] = 1, blocks
        threads.share(this, n_threads)
    pieces = _PIECES * n_threads
    is_read_once = facts[4] or blocks == 0
    this[task.IS_PACKING] = 0
    this[task.PIECES] = met * (-(-pieces // met) if is_read_once else pieces)
    threads.share(this, n_threads)


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
def _register() -> tuple[Any, Any]:
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
    jax.ffi.register_ffi_target(_TARGET, target, platform="cpu", api_version=1)
    return piece, handler
