"""What the system is asked to do with files' pages."""

import contextlib
import ctypes
import errno
import mmap
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from grokkit.checkpoint import pages
from grokkit.checkpoint.ahead import calling_ahead

LARGE = 1 << 21


@pytest.fixture
def large_file(tmp_path):
    """Of 8 MB and some more, on the disk and out of the page cache."""
    path = tmp_path / "large"
    path.write_bytes(np.random.default_rng(0).bytes(4 * LARGE + 100))
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    pages.forget(path, 0, 0)  # 0 bytes are all
    return path


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(pages, "_are_large", {})


@pytest.fixture
def small_pages(monkeypatch):
    monkeypatch.setattr(pages, "are_large", lambda path: False)


def is_there(path, offset):
    """Whether the page cache has that page, by mincore: reading without waiting also fails where
    the system has marked a page at which to read on."""
    size, found = path.stat().st_size, ctypes.c_ubyte()
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as memory,
    ):
        values = np.frombuffer(memory, np.uint8)
        page = ctypes.c_void_p(values.ctypes.data + offset - offset % mmap.PAGESIZE)
        assert ctypes.CDLL(None).mincore(page, ctypes.c_size_t(1), ctypes.byref(found)) == 0
        del values
    return bool(found.value & 1)


@pytest.fixture
def says_what_is_there(large_file):
    """Skips where nobody says what the page cache holds, or it keeps what it is to forget."""
    large_file.read_bytes()
    if not Path("/proc/self/smaps").exists() or not is_there(large_file, 0):
        pytest.skip("neither system nor file system say what the page cache holds")
    pages.forget(large_file, 0, 0)
    if is_there(large_file, 0):
        pytest.skip("the file system keeps files in memory")


def test_a_part_of_a_file_is_called_for_in_pieces(tmp_path, monkeypatch, small_pages):
    """Such as Linux takes notice of; a file that is gone is for who reads it to report."""
    path = tmp_path / "large"
    path.write_bytes(b"x" * 2_500_000)
    called_for, there = [], set()
    monkeypatch.setattr(os, "posix_fadvise", lambda _, *what: called_for.append(what))
    monkeypatch.setattr(
        pages,
        "missing",
        lambda _, address, n_bytes, step: [i for i in range(0, n_bytes, step) if i not in there],
    )
    pages.call_for(path, 100, 2_400_000)
    pieces = [
        (100, 1 << 20, os.POSIX_FADV_WILLNEED),
        (100 + (1 << 20), 1 << 20, os.POSIX_FADV_WILLNEED),
        (100 + (2 << 20), 2_400_000 - (2 << 20), os.POSIX_FADV_WILLNEED),
    ]
    assert called_for == pieces
    there.add(1 << 20)
    pages.call_for(path, 100, 2_400_000)
    assert called_for[3:] == [pieces[0], pieces[2]]
    path.unlink()
    pages.call_for(path, 0, 10)
    monkeypatch.delattr(os, "posix_fadvise")
    pages.call_for(path, 0, 10)
    assert len(called_for) == 5


@pytest.mark.usefixtures("says_what_is_there")
def test_what_the_page_cache_does_not_hold(large_file, monkeypatch):
    with (
        open(large_file, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory,
    ):
        values = np.frombuffer(memory, np.uint8)
        memory.madvise(mmap.MADV_RANDOM)  # what is touched, and nothing beside it
        where = values.ctypes.data + 5, 3 * LARGE, LARGE
        for _ in range(2):  # to ask calls for nothing
            assert pages.missing(large_file, *where) == [0, LARGE, 2 * LARGE]
        values[LARGE + 5]
        assert pages.missing(large_file, *where) == [0, 2 * LARGE]
        # Of a file that it may not write, a process is told that all is there.
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        assert pages.missing(large_file, *where) == [0, LARGE, 2 * LARGE]
        del values


@pytest.mark.usefixtures("says_what_is_there")
def test_what_is_called_for_is_there_and_what_is_forgotten_is_not(large_file):
    if not pages.are_large(large_file):
        pytest.skip("files are not kept in large pages here")
    pages.call_for(large_file, LARGE + 5, 10**9)  # to the file's end
    assert all(is_there(large_file, i * LARGE) for i in (1, 2, 3, 4))
    pages.forget(large_file, 0, 2 * LARGE)
    assert not is_there(large_file, 0) and not is_there(large_file, LARGE)
    assert is_there(large_file, 2 * LARGE)


@pytest.mark.usefixtures("says_what_is_there")
def test_large_pages_are_seen_where_they_are(large_file, monkeypatch):
    """By the system's own count, of a map of the test's own."""
    found, size = pages.are_large(large_file), 2 * LARGE
    with (
        open(large_file, "rb") as file,
        mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as memory,
    ):
        values = np.frombuffer(memory, np.uint8)
        values.sum()
        listed = Path("/proc/self/smaps").read_text().split(str(large_file))[1]
        counted = int(listed.split("FilePmdMapped:")[1].split()[0])
        del values
    assert found == (counted > 0)
    # It is asked once for a file system.
    monkeypatch.setattr(pages, "have_in_memory", None)
    assert pages.are_large(large_file) == found


@pytest.mark.parametrize("why", ["small", "gone", "unknown advice", "no count"])
def test_pages_are_small_where_nobody_says_otherwise(large_file, monkeypatch, why):
    if why == "small":
        os.truncate(large_file, 2 * LARGE - 1)
    elif why == "gone":
        large_file.unlink()
    elif why == "unknown advice":
        monkeypatch.setattr(pages, "_advise", lambda *what: errno.EINVAL)
    else:
        monkeypatch.setattr(pages, "_is_large", lambda address: False)
    assert not pages.are_large(large_file)


def test_pages_that_cannot_be_read(monkeypatch):
    monkeypatch.setattr(pages, "_advise", lambda *what: errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        pages.have_in_memory(0, 1)


class Told:
    """Notes what is called for; with `gate`, each waits for it."""

    def __init__(self, monkeypatch, gate=None):
        self.pieces, self.gate = [], gate
        monkeypatch.setattr(pages, "call_for", self)
        monkeypatch.setattr(pages, "are_large", lambda path: False)

    def __call__(self, path, offset, n_bytes):
        if self.gate:
            self.gate.wait(10)
        self.pieces.append((path, offset, n_bytes))


def finished():
    for thread in threading.enumerate():
        if thread.name.startswith("calling-ahead"):
            thread.join(10)


def test_ahead_joins_what_lies_together_and_keeps_its_distance(monkeypatch):
    told, a, b = Told(monkeypatch), Path("a"), Path("b")
    size = 1 << 22
    pieces = [(a, size * i, size) for i in range(100)] + [(b, 7, 5), (b, 20, 5)]
    with calling_ahead(pieces) as ahead:
        ahead.call_for(1)  # one more than 270 MB: a piece more
        ahead.call_for(1)
    finished()
    most = pages.AT_ONCE
    assert told.pieces == [(a, most * i, most) for i in range(5)]
    told.pieces.clear()
    with calling_ahead(pieces) as ahead:
        ahead.call_for(10**9)
    finished()
    assert told.pieces[-3:] == [(a, most * 6, 100 * size - most * 6), (b, 7, 5), (b, 20, 5)]
    assert sum(n for _, _, n in told.pieces) == 100 * size + 10


def test_an_error_ends_what_was_called_for(monkeypatch):
    gate = threading.Event()
    told = Told(monkeypatch, gate)
    with (
        contextlib.suppress(KeyboardInterrupt),
        calling_ahead([(Path("a"), 0, 9), (Path("b"), 0, 9)]),
    ):
        raise KeyboardInterrupt
    gate.set()
    finished()
    assert len(told.pieces) <= 1  # what had begun
