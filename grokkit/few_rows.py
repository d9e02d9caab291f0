"""Products of few rows with 8-bit matrices on a CPU, at the speed at which memory is read.

XLA's own products cannot read one matrix of a stack where it lies: they copy it first, which
takes as long as all the rest. So this one product is a loop of our own, compiled by Numba, which
XLA calls through its foreign function interface (the C structures of `xla/ffi/api/c_api.h`, which
XLA keeps compatible). It computes in float32, from the float32 rows as they are.
"""

import atexit
import ctypes
import functools
import inspect
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import llvmlite.binding
import numpy as np
from jaxtyping import Array, BFloat16, Float, Int, Int8
from numba import cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.numpy_support import carray

from grokkit.tiles import LANES, tile

MOST_ROWS = 16
"""Up to this many rows it is faster than XLA's products; up to four it is the speed of reading."""

_TARGET = "grokkit_few_rows"
_ONE_AT_A_TIME = threading.Lock()
_A_THREAD = 2**18
"""Entries of the matrix that are worth sharing with one thread more."""


def _compiled(function: Callable[..., Any]) -> Any:
    """The function compiled when it is first called from compiled code."""
    # Without what a checker of types may have put round it, which cannot be compiled.
    return njit(inspect.unwrap(function))


def _instruction(function: Callable[..., Any]) -> Any:
    """A function that stands for instructions of the compiler's own language."""
    return intrinsic(function)


def _called_from_c(function: Callable[..., Any]) -> Any:
    """The function, which takes an address, compiled for calls from C; takes a second or two."""
    signature, function = types.int64(types.int64), inspect.unwrap(function)
    try:
        return cfunc(signature, cache=True)(function)
    except RuntimeError:  # no folder that could be written to
        return cfunc(signature)(function)


def takes(rows: int, group: int) -> bool:
    """Whether `product` is for so many rows, and for groups of so many entries."""
    has_threads = os.name == "posix"  # of the kind that are started below
    return has_threads and rows <= MOST_ROWS and group >= LANES


def product(
    x: Float[Array, "row k"],
    weight: Int8[Array, "matrix_n k"],
    scales: BFloat16[Array, "matrix_g n"],
    place: Int[Array, ""],
) -> Float[Array, "row n"]:
    """`x @ w` for the matrix `w` at a place in a stack, on a CPU.

    **Arguments:**

    - `x`: rows, in float32.
    - `weight`, `scales`: the stack: each matrix, and its groups' scales, in consecutive rows. A
        group has at least `LANES` entries.
    - `place`: which matrix.

    Under `shard_map` all must be of one type.
    """
    with _ONE_AT_A_TIME:  # XLA takes one registration, and two threads may compile at once
        _register()
    n, k = scales.shape[1], weight.shape[1]
    groups, threads = scales.shape[0] // (weight.shape[0] // n), _threads(n * k)
    # Of the type that shard_map wants of what is used with the weights, and of what comes of it.
    numbers = jnp.stack([place, jnp.int32(groups), jnp.int32(threads)])
    numbers = numbers + 0 * weight[0, :1].astype(jnp.int32)
    bits = jax.lax.bitcast_convert_type(scales, jnp.uint16)
    result = jax.typeof(jnp.zeros((1, n)) * x[:, :1])
    call = jax.ffi.ffi_call(_TARGET, result, vmap_method="sequential")
    return call(x, weight, bits, numbers)


def _threads(entries: int) -> int:
    """How many threads to cut a product over: the processor's, shared between devices."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else max(1, mesh.size // jax.process_count())
    return max(1, min(_cores() // devices, entries // _A_THREAD))


def _cores() -> int:
    """The processor's cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# The loops


def _tiles(outputs: int) -> Any:
    """A function that computes a tile of so many outputs and up to four rows."""
    one, two, three, four = (tile(outputs, rows) for rows in (1, 2, 3, 4))

    def compute(rows: int, place: Any, how: Any) -> None:
        if rows >= 4:
            four(*place, *how)
        elif rows == 3:
            three(*place, *how)
        elif rows == 2:
            two(*place, *how)
        else:
            one(*place, *how)

    return _compiled(compute)


_OUTPUTS = 4
_some_outputs, _one_output = _tiles(_OUTPUTS), _tiles(1)
_BYTES = 2**18
"""Of the matrix, which stay in the processor's second cache while four rows after another meet
them, those in the first."""


@_compiled
def _multiply(task: Any, first: int, last: int) -> None:
    """Outputs `first` to `last` of a product: where its arrays begin; rows, k, groups and n."""
    x, weight, scales, out = task[0], task[1], task[2], task[3]
    rows, k, groups, n = task[4], task[5], task[6], task[7]
    at_once = max(1, _BYTES // (k * _OUTPUTS)) * _OUTPUTS if rows > 4 else last - first
    how = (groups, k // groups, n, 4 * k)
    for start in range(first, last, at_once):
        end = min(start + at_once, last)
        for r in range(0, rows, 4):
            j = start
            while j < end:
                place = (x + 4 * k * r, weight + k * j, scales + 2 * j, out + 4 * (n * r + j))
                if end - j >= _OUTPUTS:
                    _some_outputs(rows - r, place, how)
                    j += _OUTPUTS
                else:
                    _one_output(rows - r, place, how)
                    j += 1


# Sharing a product between threads. Starting a thread, or waking one that sleeps, takes as long
# as a small product: so helpers stay for a while after their last, asking for more, and end when
# none comes. A product is cut into pieces, of which whoever is free takes the next; the thread
# that brought the product never waits for a helper that has not taken a piece of it.

_NEXT, _DONE, _BUSY, _HELPERS, _PIECES, _HELP, _TASK = 0, 16, 32, 48, 64, 65, 66
"""Places in the state, some apart so that threads do not wait for each other's cache lines: the
next piece, how many are done, whether there is a product, how many helpers; into how many pieces a
product is cut, and the helpers' function; and the product."""
_TASK_SIZE = 8
_STATE = np.zeros(_TASK + _TASK_SIZE, np.int64)
_STATE_NAME = "grokkit_few_rows_state"
_ASKS = 4000
"""How often a helper asks in vain before it ends: about a millisecond."""

_address, _status = types.voidptr, types.int32
_yield_core = types.ExternalFunction("sched_yield", _status())
_start_thread = types.ExternalFunction(
    "pthread_create", _status(_address, _address, _address, _address)
)
_leave_thread = types.ExternalFunction("pthread_detach", _status(types.int64))


@_instruction
def _state(typing_context):
    """Where the state lies, which a stored program finds by its name."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        state = builder.module.globals.get(_STATE_NAME)
        if state is None:
            state = cgutils.add_global_variable(builder.module, cgutils.intp_t, _STATE_NAME)
        return builder.ptrtoint(state, cgutils.intp_t)

    return types.int64(), codegen


def _atomic(operation: str) -> Any:
    """A function that changes the number at an address in one step, and returns the former one."""

    @_instruction
    def change(typing_context, address, value):
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            place = builder.inttoptr(arguments[0], cgutils.intp_t.as_pointer())
            return builder.atomic_rmw(operation, place, arguments[1], "seq_cst")

        return types.int64(types.int64, types.int64), codegen

    return change


_add, _exchange = _atomic("add"), _atomic("xchg")


@_compiled
def _piece(task: Any, piece: int, pieces: int) -> None:
    """One piece of a product."""
    n = task[7]
    _multiply(task, n * piece // pieces, n * (piece + 1) // pieces)


@_compiled
def _take_pieces() -> int:
    """Run pieces of the present product, if there is one, until none is left; how many."""
    state = _state()
    pieces, taken = _words(state + 8 * _PIECES, 1)[0], 0
    while _add(state + 8 * _NEXT, 0) < pieces:
        piece = _add(state + 8 * _NEXT, 1)
        if piece < pieces:
            _piece(_words(state + 8 * _TASK, _TASK_SIZE), piece, pieces)
            _add(state + 8 * _DONE, 1)
            taken += 1
    return taken


def _help(_: int) -> int:
    """What a helper does, until it has asked in vain for long enough."""
    asked = 0
    while asked < _ASKS:
        asked = 0 if _take_pieces() else asked + 1
        _yield_core()
    _add(_state() + 8 * _HELPERS, -1)
    return 0


@_compiled
def _share(task: Any, threads: int) -> None:
    """Run a product with helpers, unless they are at another's."""
    state = _state()
    if threads == 1 or _exchange(state + 8 * _BUSY, 1) == 1:
        _piece(task, 0, 1)
        return
    shared = _words(state + 8 * _TASK, _TASK_SIZE)
    for i in range(_TASK_SIZE):
        shared[i] = task[i]
    _exchange(state + 8 * _DONE, 0)
    _exchange(state + 8 * _NEXT, 0)
    function, thread = _pointer(_words(state + 8 * _HELP, 1)[0]), np.empty(1, np.int64)
    where = _pointer(np.int64(thread.ctypes.data))
    for _ in range(threads - 1 - _add(state + 8 * _HELPERS, 0)):
        if _start_thread(where, _pointer(0), function, _pointer(0)) == 0:
            _add(state + 8 * _HELPERS, 1)
            _leave_thread(thread[0])
    _take_pieces()
    while _add(state + 8 * _DONE, 0) < _words(state + 8 * _PIECES, 1)[0]:
        _yield_core()
    _exchange(state + 8 * _BUSY, 0)


# What XLA calls. Every field of its C structures that is used here takes 8 bytes; the numbers
# below are places in them.

_FRAME_EXTENSION, _FRAME_ARGUMENTS, _FRAME_RESULTS, _FRAME_SIZE = 1, 9, 14, 22
_DATA, _SIZES, _BUFFER_SIZE = 3, 5, 6
_EXTENSION_TYPE, _EXTENSION_METADATA, _METADATA_VERSION = 1, 3, 3
_METADATA = 1
_VERSION = 3 << 32  # 0.3: the major number lies in the lower half


@_instruction
def _pointer(typing_context, address):
    """An integer as a pointer."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


@_compiled
def _words(address: int, n: int) -> Any:
    return carray(_pointer(address), (n,), dtype=np.int64)


def _handle(frame_at: int) -> int:
    """Answer XLA: it asks which version this is, or for a product."""
    frame = _words(frame_at, _FRAME_SIZE)
    if frame[_FRAME_EXTENSION] != 0:
        extension = _words(frame[_FRAME_EXTENSION], 4)
        if np.int32(extension[_EXTENSION_TYPE]) == _METADATA:
            _words(extension[_EXTENSION_METADATA], 4)[_METADATA_VERSION] = _VERSION
            return 0
    arguments, results = _words(frame[_FRAME_ARGUMENTS], 4), _words(frame[_FRAME_RESULTS], 1)
    x, weight = _words(arguments[0], _BUFFER_SIZE), _words(arguments[1], _BUFFER_SIZE)
    scales, numbers = _words(arguments[2], _BUFFER_SIZE), _words(arguments[3], _BUFFER_SIZE)
    out = _words(results[0], _BUFFER_SIZE)
    (rows, k), n = _words(x[_SIZES], 2), _words(out[_SIZES], 2)[1]
    place, groups, threads = carray(_pointer(numbers[_DATA]), (3,), dtype=np.int32)
    task = np.empty(_TASK_SIZE, np.int64)
    task[0], task[3] = x[_DATA], out[_DATA]
    task[1], task[2] = weight[_DATA] + place * n * k, scales[_DATA] + 2 * place * n * groups
    task[4], task[5], task[6], task[7] = rows, k, groups, n
    _share(task, threads)
    return 0


def _await_helpers() -> None:
    """Let helpers end before what they run is taken down with the process."""
    deadline = time.monotonic() + 1
    while _STATE[_HELPERS] > 0 and time.monotonic() < deadline:
        time.sleep(0.001)


@functools.cache
def _register() -> tuple[Any, Any]:
    """Make the product known to XLA; returns what must live as long as XLA may call it."""
    llvmlite.binding.add_symbol(_STATE_NAME, _STATE.ctypes.data)
    _STATE[_PIECES] = _STATE[_NEXT] = 8 * _cores()
    helper, handler = _called_from_c(_help), _called_from_c(_handle)
    _STATE[_HELP] = helper.address
    atexit.register(_await_helpers)
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype = ctypes.py_object
    capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    target = capsule(handler.address, b"xla._CUSTOM_CALL_TARGET", None)
    jax.ffi.register_ffi_target(_TARGET, target, platform="cpu", api_version=1)
    return helper, handler
