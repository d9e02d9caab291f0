"""A line on the terminal while something compiles, and nothing of it left behind."""

import contextlib
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import threading

import jax
import numpy as np
import pytest
from tqdm import tqdm

from grokkit.runtime import compiling

PATIENCE = 60.0  # seconds: only a hang takes longer
COMPILATION = "/jax/core/compile/backend_compile_duration"


class Terminal:
    """A small one, and what is to be seen on it."""

    def __init__(self, rows=4, columns=60):
        self.rows, self.columns = rows, columns
        self.master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (rows, columns))
        self.file = open(slave, "w")  # noqa: SIM115
        self.output = ""

    @contextlib.contextmanager
    def announced(self):
        """Standard output and error go here, and what compiles is said."""
        streams = contextlib.redirect_stdout(self.file), contextlib.redirect_stderr(self.file)
        with streams[0], streams[1], compiling.announced():
            yield

    def until(self, pattern):
        """Read on until this has come."""
        start = len(self.output)
        while not (found := re.compile(pattern).search(self.output, start)):
            assert select.select([self.master], [], [], PATIENCE)[0], self.output
            self.output += os.read(self.master, 1 << 16).decode()
        return found

    def screen(self):
        """Its lines, and the cursor's row and column, as a terminal acts on the output."""
        lines = [""]
        row = column = 0
        kept = (0, 0)
        for code in re.findall(r"\x1b\[\d*.|\x1b.|.", self.output, re.DOTALL):
            if code == "\r":
                column = 0
            elif code in ("\n", "\x1bD"):  # the driver puts \r before \n
                row += 1
                lines += [""] * (row + 1 - len(lines))
                kept = (kept[0] - (row >= self.rows), kept[1])  # it keeps a place on the glass
            elif code == "\x1b7":
                kept = (row - max(len(lines) - self.rows, 0), column)
            elif code == "\x1b8":
                row, column = kept[0] + max(len(lines) - self.rows, 0), kept[1]
            elif code == "\x1b[A":
                row = max(row - 1, len(lines) - self.rows, 0)
            elif code == "\x1b[B":
                row = min(row + 1, len(lines) - 1)
            elif code in ("\x1b[K", "\x1b[J"):
                lines[row] = lines[row][:column]
                if code == "\x1b[J":
                    lines[row + 1 :] = [""] * (len(lines) - row - 1)
            else:
                assert code.isprintable() and column < self.columns, code
                lines[row] = lines[row].ljust(column)[:column] + code + lines[row][column + 1 :]
                column += 1
        return "\n".join(lines).rstrip(), (row, column)


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    made = Terminal()
    yield made
    made.file.close()
    os.close(made.master)


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(compiling, "_DELAY", 0.0)


@contextlib.contextmanager
def slow_compilation(wait):
    """XLA's next compilation goes on until `wait` returns."""

    def hold(event, *_, **__):
        if event == COMPILATION:
            wait()

    jax.monitoring.register_scalar_listener(hold)
    try:
        yield
    finally:
        jax.monitoring.unregister_scalar_listener(hold)


def test_a_compilation_is_announced_below_a_text_and_leaves_nothing(terminal, at_once):
    seen = []

    def wait():
        terminal.until(r"compiling \(2 s\)\x1b8")
        seen.append(terminal.screen())

    before = "\n" * 6  # to the bottom, where a line below has to be made
    with terminal.announced():
        print(f"{before}The duty", end="", flush=True)
        with slow_compilation(wait):
            jax.jit(lambda x: x + 1)(np.ones(3, np.float32))
        print(" of the Congress\nis", end="", flush=True)
    terminal.until("Congress\r\nis")
    assert seen[-1] == (f"{before}The duty\ncompiling (2 s)", (6, 8))
    assert terminal.screen() == (f"{before}The duty of the Congress\nis", (7, 2))
    assert terminal.output.endswith("\x1b[J of the Congress\r\nis")


def test_what_is_kept(terminal, at_once, monkeypatch):
    with terminal.announced():
        with compiling.notice("compiling kernels", kept=True):
            assert terminal.until(r"compiling kernels, once; kept for the next time \(1 s\)\x1b8")
        monkeypatch.setattr("grokkit.compilation_cache.is_on", lambda: True)
        with compiling.notice():
            terminal.until(r"\[Kcompiling, once; kept for the next time \(1 s\)\x1b8")
    terminal.file.write("end")
    terminal.file.flush()
    terminal.until("end")
    assert terminal.screen() == ("end", (0, 3))


def test_a_narrow_terminal_is_not_filled(terminal, at_once):
    termios.tcsetwinsize(terminal.file.fileno(), (4, 10))
    with terminal.announced(), compiling.notice():
        terminal.until(r"\x1b\[Kcompiling\x1b8")


def test_a_progress_bar_stays(terminal, at_once):
    with terminal.announced():
        bar = tqdm(total=2, file=terminal.file, mininterval=0, bar_format="{n_fmt} of 2", ncols=20)
        with compiling.notice():
            terminal.until(r"compiling \(1 s\)\x1b8")
            bar.update()
            terminal.until("1 of 2")
            assert terminal.screen()[0] == "1 of 2\ncompiling (1 s)"
        bar.update()
        bar.close()
    terminal.until("2 of 2.*\n")
    assert terminal.screen() == ("2 of 2", (1, 0))


def test_an_interrupt_leaves_nothing(terminal, at_once):
    with pytest.raises(KeyboardInterrupt), terminal.announced(), compiling.notice():
        terminal.until(r"compiling \(1 s\)\x1b8")
        raise KeyboardInterrupt
    terminal.until(r"\[J")
    assert terminal.screen() == ("", (0, 0))


INTERRUPTED = """
import sys, time
from grokkit import cli
from grokkit.runtime import compiling

def run():
    print("The duty", end="", flush=True)
    with compiling.notice():
        time.sleep(600)

sys.exit(cli.guarded("grokkit", run, is_program=True))
"""


def test_an_interrupt_of_a_command_leaves_nothing(terminal):
    script = [sys.executable, "-c", INTERRUPTED]
    with subprocess.Popen(script, stdout=terminal.file, stderr=terminal.file) as process:
        terminal.until(r"compiling \(\d+ s\)\x1b8")
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130
    terminal.until(r"\[J\r\n")
    assert terminal.screen() == ("The duty", (1, 0))


@pytest.mark.parametrize("where", ["a pipe", "a dumb terminal"])
def test_nothing_is_said_to_what_is_no_terminal(where, terminal, at_once, monkeypatch):
    stream = io.StringIO() if where == "a pipe" else terminal.file
    monkeypatch.setenv("TERM", "xterm" if where == "a pipe" else "dumb")
    threads = threading.active_count()
    with contextlib.redirect_stderr(stream), compiling.announced(), compiling.notice():
        assert threading.active_count() == threads  # nobody who could speak
    if stream is not terminal.file:
        assert stream.getvalue() == ""
    terminal.file.write("end")
    terminal.file.flush()
    terminal.until("end")
    assert terminal.output == "end"


def test_nothing_is_said_of_what_is_quick(monkeypatch):
    monkeypatch.setattr(compiling, "_DELAY", 2 * PATIENCE)
    said = []
    with compiling.announced(said.append):
        jax.jit(lambda x: x + 2)(np.ones(3, np.float32))
        with compiling.notice():
            pass
    assert said == []


def test_works_of_several_threads_end_together(at_once):
    said, shown, go_on = [], threading.Event(), threading.Event()

    def show(line):
        said.append(line)
        shown.set()

    def work():
        with compiling.notice("theirs"):
            assert go_on.wait(PATIENCE)

    with compiling.announced(show):
        other = threading.Thread(target=work)
        other.start()
        with compiling.notice("ours"):
            assert shown.wait(PATIENCE)
        assert "" not in said  # theirs goes on
        go_on.set()
        other.join()
        assert said[-1] == ""
        compiling.stop()
        with compiling.notice("after"):
            pass
    assert said.count("") == 1


def test_off_it_does_nothing():
    threads = threading.active_count()
    with compiling.notice():
        assert threading.active_count() == threads
