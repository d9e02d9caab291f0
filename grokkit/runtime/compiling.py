"""Says that something compiles while it does, so that a wait of seconds has a name."""

import contextlib
import functools
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from grokkit import compilation_cache

_DELAY = 0.5  # seconds; what is over sooner is not worth a word
_XLA = "/jax/core/compile/backend_compile_duration"  # of a compilation's begin and of its end

Show = Callable[[str], None]
"""Takes the line to show now, or `""` for none. It is called by any thread and must not wait."""

Work = tuple[str, bool | None]
"""What is done, and whether its result is kept; `None` if that is up to the compilation cache."""


@contextlib.contextmanager
def announced(show: Show | None = None) -> Iterator[None]:
    """While the block runs, say what compiles for longer than half a second, and for how long.

    **Arguments:**

    - `show`: where to say it. By default on a line of its own on stderr below the cursor, which is
        gone before the compiled program runs; nowhere if stderr is no terminal.
    """
    show = _terminal() if show is None else show
    if show is None:
        yield
        return
    _listen()
    announcer = _Announcer(show)
    _announcers.append(announcer)
    try:
        yield
    finally:
        _announcers.remove(announcer)
        announcer.close()


@contextlib.contextmanager
def notice(what: str = "compiling", kept: bool | None = None) -> Iterator[None]:
    """Around slow work that is done once: say so, where `announced` is on.

    **Arguments:**

    - `what`: the work.
    - `kept`: whether the next process finds its result; by default whether the compilation cache
        is on.
    """
    _begin((what, kept))
    try:
        yield
    finally:
        _end((what, kept))


def stop() -> None:
    """Say nothing any more: this process is about to end, or another one speaks for it."""
    for announcer in [*_announcers]:
        announcer.close()


class _Announcer:
    """Knows what is under way, and shows it from a thread of its own once that takes long."""

    def __init__(self, show: Show) -> None:
        self._show = show
        self._changed = threading.Condition()
        self._works: list[Work] = []
        self._since = 0.0
        self._seconds = 0  # as shown; 0 while nothing is
        self._closed = False
        threading.Thread(target=self._run, name="grokkit-compiling", daemon=True).start()

    def begin(self, work: Work) -> None:
        with self._changed:
            if not self._works:
                self._since = time.monotonic()
                self._changed.notify()
            self._works.append(work)

    def end(self, work: Work) -> None:
        with self._changed:
            if work in self._works:  # it may have begun before `announced`
                self._works.remove(work)
            if not self._works:
                self._hide()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._hide()
            self._changed.notify()

    def _hide(self) -> None:
        if self._seconds:
            self._seconds = 0
            self._show("")

    def _run(self) -> None:
        with self._changed:
            while not self._closed:
                if not self._works:
                    self._changed.wait()
                    continue
                left = self._since + _DELAY + self._seconds - time.monotonic()
                if left > 0:
                    self._changed.wait(left)
                    continue
                self._seconds = math.ceil(time.monotonic() - self._since)
                what, kept = self._works[-1]
                kept = compilation_cache.is_on() if kept is None else kept
                once = ", once; kept for the next time" if kept else ""
                self._show(f"{what}{once} ({self._seconds} s)")


_announcers: list[_Announcer] = []


def _begin(work: Work) -> None:
    for announcer in [*_announcers]:
        announcer.begin(work)


def _end(work: Work) -> None:
    for announcer in [*_announcers]:
        announcer.end(work)


@functools.cache
def _listen() -> None:
    """Hear of XLA's compilations from now on."""
    xla = ("compiling", None)

    def begins(event: str, *_: Any, **__: Any) -> None:
        if event == _XLA:
            _begin(xla)

    def ends(event: str, *_: Any, **__: Any) -> None:
        if event == _XLA:
            _end(xla)

    jax.monitoring.register_scalar_listener(begins)
    jax.monitoring.register_event_duration_secs_listener(ends)


def _terminal() -> Show | None:
    """Shows a line below the cursor's, which may hold text that is not finished."""
    stream = sys.stderr
    if stream is None or not stream.isatty() or os.environ.get("TERM") == "dumb":
        return None

    def show(line: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # the terminal may have gone
            if line:
                width = os.get_terminal_size(stream.fileno()).columns or 80
                # Down and up make sure that there is a line below; \x1b7 keeps the place, and
                # \x1b8 goes back there.
                line = f"\x1bD\x1b[A\x1b7\x1b[B\r\x1b[K{line[: width - 1]}\x1b8"
            # Everything below the cursor goes, wherever a pressed key has moved it to.
            stream.write(line or "\x1b[J")
            stream.flush()

    return show
