"""A background thread that works on the latest request and drops what is stale."""

import contextlib
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any

_NOTHING = object()


class _Turns:
    """Explorers and a notebook's cells take turns with the devices.

    Two programs that exchange data between devices must not be started at the same time: with one
    program first on some devices and the other first on others, both would wait for ever. What one
    waits for is at most one computation of an explorer, or the cell.
    """

    def __init__(self) -> None:
        self._devices = threading.Lock()
        self._cell: int | None = None  # the thread of the cell whose turn it is
        self._depth = 0  # a cell may run another
        self._shell: Any = None

    @contextlib.contextmanager
    def explorer(self) -> Iterator[None]:
        """An explorer's turn."""
        with self._devices:
            yield

    @contextlib.contextmanager
    def given_up(self) -> Iterator[None]:
        """While a cell waits for an explorer, it is not the cell's turn."""
        if self._cell != threading.get_ident():
            yield
            return
        depth, self._cell = self._depth, None
        self._devices.release()
        try:
            yield
        finally:
            self._devices.acquire()
            self._cell, self._depth = threading.get_ident(), depth

    def watch_cells(self) -> None:
        """Know of the cells of the notebook that this runs in, if it does."""
        ipython = sys.modules.get("IPython")
        shell = ipython.get_ipython() if ipython else None
        if shell is None or shell is self._shell:
            return
        self._shell = shell
        shell.events.register("pre_run_cell", self._begin)
        shell.events.register("post_run_cell", self._end)
        frame = sys._getframe()
        while frame is not None and frame.f_code is not type(shell).run_code.__code__:
            frame = frame.f_back
        if frame is not None:  # called from a cell, which has begun already
            self._begin()

    def _begin(self, *_: Any) -> None:
        if self._cell != threading.get_ident():
            self._devices.acquire()
            self._cell, self._depth = threading.get_ident(), 0
        self._depth += 1

    def _end(self, *_: Any) -> None:
        if self._cell == threading.get_ident():
            self._depth -= 1
            if self._depth == 0:
                self._cell = None
                self._devices.release()


_TURNS = _Turns()


class Latest:
    """Computes requests in a background thread; a newer one supersedes those before it.

    Every callback runs under one lock, so that no result of a superseded request is delivered
    after `submit` has returned.
    """

    def __init__(
        self,
        compute: Callable[[Any], Generator[Any, None, None]],
        deliver: Callable[[Any], None],
        fail: Callable[[Exception], None],
        change: Callable[[bool], None],
    ) -> None:
        """No thread is started before it is needed, and none waits for work.

        **Arguments:**

        - `compute`: yields the results of a request, each more complete than the one before. It
            runs outside the lock, and is closed at a `yield` once it is superseded.
        - `deliver`: takes each result that is still wanted.
        - `fail`: takes what `compute` or `deliver` raised for a request that is still wanted.
        - `change`: told whether there is work, whenever that changes.
        """
        self._compute, self._deliver, self._fail, self._change = compute, deliver, fail, change
        self.lock = threading.RLock()
        """Held during every callback; take it to change what they change."""
        self._idle = threading.Event()
        self._idle.set()
        _TURNS.watch_cells()
        self._waiting: Any = _NOTHING

    def submit(self, request: Any) -> None:
        """Ask for a request's results, instead of those of any request before it."""
        with self.lock:
            self._waiting = request
            if self._idle.is_set():
                self._idle.clear()
                self._change(True)
                threading.Thread(target=self._work, name="grokkit-explorer", daemon=True).start()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing is left to do; false if that takes more than `timeout` seconds."""
        with _TURNS.given_up():
            return self._idle.wait(timeout)

    @property
    def _superseded(self) -> bool:
        return self._waiting is not _NOTHING

    def _work(self) -> None:
        while True:
            with self.lock:
                if not self._superseded:
                    self._change(False)
                    self._idle.set()
                    return
            with _TURNS.explorer():
                with self.lock:  # the latest once it is this explorer's turn
                    request, self._waiting = self._waiting, _NOTHING
                self._answer(request)

    def _answer(self, request: Any) -> None:
        try:
            with contextlib.closing(self._compute(request)) as results:
                for result in results:
                    with self.lock:
                        if self._superseded:
                            return
                        self._deliver(result)
        except Exception as error:  # noqa: BLE001 - whatever it is, the reader is told
            with self.lock:
                if not self._superseded:
                    self._fail(error)
