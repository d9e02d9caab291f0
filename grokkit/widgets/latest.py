"""A background thread that works on the latest request and drops what is stale."""

import contextlib
import threading
from collections.abc import Callable, Generator
from typing import Any

# Explorers take turns with the devices: what one waits for is at most one computation of another.
_DEVICES = threading.Lock()
_NOTHING = object()


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
            with _DEVICES:
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
