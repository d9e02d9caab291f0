"""Sharing a product between threads.

Starting a thread, or waking one that sleeps, takes as long as a small product: so helpers stay for
a while after their last, asking for more, and end when none comes. A product is cut into pieces,
of which whoever is free takes the next; the thread that brought the product never waits for a
helper that has not taken a piece of it.
"""

import time
from typing import Any

import llvmlite.binding
import numpy as np
from numba import types
from numba.core import cgutils

from grokkit.cpu.instructions import atomic, call, compiled, instruction, pointer, words
from grokkit.cpu.task import PIECES, SIZE

_LEFT, _DONE, _BUSY, _HELPERS, _THREAD, _PIECE, _TASK = 0, 16, 32, 48, 64, 65, 66
"""Places in the state, some apart so that threads do not wait for each other's cache lines: how
many pieces nobody has taken, how many are done, whether there is a product, how many helpers;
addresses of what a thread runs, and of what runs a piece; and the product."""
_STATE = np.zeros(_TASK + SIZE, np.int64)
_STATE_NAME = "grokkit_cpu_state"
_ASKS = 4000
"""How often a helper asks in vain before it ends: about a millisecond."""

_address, _status = types.voidptr, types.int32
_yield_core = types.ExternalFunction("sched_yield", _status())
_start_thread = types.ExternalFunction(
    "pthread_create", _status(_address, _address, _address, _address)
)
_leave_thread = types.ExternalFunction("pthread_detach", _status(types.int64))
_add, _exchange = atomic("add"), atomic("xchg")


@instruction
def _state(typing_context):
    """Where the state lies, which a stored program finds by its name."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        state = builder.module.globals.get(_STATE_NAME)
        if state is None:
            state = cgutils.add_global_variable(builder.module, cgutils.intp_t, _STATE_NAME)
        return builder.ptrtoint(state, cgutils.intp_t)

    return types.int64(), codegen


@compiled
def _run_piece(task_at: int, piece: int) -> None:
    call(words(_state() + 8 * _PIECE, 1)[0], task_at, piece)


@compiled
def _take_pieces() -> int:
    """Run pieces of the present product, if there is one, until none is left; how many."""
    state, taken = _state(), 0
    task_at = state + 8 * _TASK
    while _add(state + 8 * _LEFT, 0) > 0:
        left = _add(state + 8 * _LEFT, -1)
        if left > 0:  # and so the product cannot end before this piece does
            _run_piece(task_at, words(task_at, SIZE)[PIECES] - left)
            _add(state + 8 * _DONE, 1)
            taken += 1
    return taken


@compiled
def help_others() -> None:
    """What a helper does, until it has asked in vain for long enough."""
    asked = 0
    while asked < _ASKS:
        asked = 0 if _take_pieces() else asked + 1
        _yield_core()
    _add(_state() + 8 * _HELPERS, -1)


@compiled
def share(task: Any, threads: int) -> None:
    """Run a product with helpers, unless they are at another's."""
    state, pieces = _state(), task[PIECES]
    if threads == 1 or pieces == 1 or _exchange(state + 8 * _BUSY, 1) == 1:
        for piece in range(pieces):
            _run_piece(np.int64(task.ctypes.data), piece)
        return
    shared = words(state + 8 * _TASK, SIZE)
    for i in range(SIZE):
        shared[i] = task[i]
    _exchange(state + 8 * _DONE, 0)
    _exchange(state + 8 * _LEFT, pieces)
    function, thread = pointer(words(state + 8 * _THREAD, 1)[0]), np.empty(1, np.int64)
    where = pointer(np.int64(thread.ctypes.data))
    for _ in range(threads - 1 - _add(state + 8 * _HELPERS, 0)):
        if _start_thread(where, pointer(0), function, pointer(0)) == 0:
            _add(state + 8 * _HELPERS, 1)
            _leave_thread(thread[0])
    _take_pieces()
    while _add(state + 8 * _DONE, 0) < pieces:
        _yield_core()
    _exchange(state + 8 * _BUSY, 0)


def prepare() -> None:
    """Make the state known to compiled programs, by its name."""
    llvmlite.binding.add_symbol(_STATE_NAME, _STATE.ctypes.data)


def set_functions(thread: int, piece: int) -> None:
    """Give the addresses of what a thread runs, which is to call `help_others`, and of what runs a
    piece of a task."""
    _STATE[_THREAD], _STATE[_PIECE] = thread, piece


def await_helpers() -> None:
    """Let helpers end before what they run is taken down with the process."""
    deadline = time.monotonic() + 1
    while _STATE[_HELPERS] > 0 and time.monotonic() < deadline:
        time.sleep(0.001)
