"""Parts of files read into memory: in slabs, transposed, by several threads, with O_DIRECT."""

import contextlib
import ctypes
import errno
import itertools
import os
import time

import jax
import numpy as np
import pytest

from grokkit.checkpoint import read, read_tensor, write_tensor
from grokkit.checkpoint.read import PAGE, ArraySpan, DataFile, Reader, Request, fill, pages
from grokkit.errors import CheckpointError


def random_bytes(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(-128, 128, shape).astype(np.int8)


@pytest.fixture(scope="module")
def matrices(tmp_path_factory):
    """A file of two matrices of [384, 256] bytes."""
    path = tmp_path_factory.mktemp("matrices") / "tensor"
    weight = random_bytes(2, 384, 256)
    write_tensor(path, weight, np.ones((2, 1, 256), jax.numpy.bfloat16))
    return read_tensor(path), weight


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("rows", [7, 64, 1000])
def test_quarters_of_matrices_in_slabs_of_any_size(matrices, transposed, rows, direct, monkeypatch):
    monkeypatch.setattr(read, "_SLAB", rows * 256)
    file, weight = matrices
    targets, done = [], []
    for some_rows, columns in itertools.product(
        (slice(0, 192), slice(192, 384)), (slice(0, 128), slice(128, 256))
    ):
        memory = np.zeros((2, 128, 192) if transposed else (2, 192, 128), np.int8)
        view = memory.swapaxes(-1, -2) if transposed else memory
        targets.append(((slice(0, 2), some_rows, columns), view))
    fill([Request(file, file.weight, targets)], done.append, direct)
    for index, view in targets:
        np.testing.assert_array_equal(view, weight[index])
    assert sum(done) == weight.nbytes
    # Of one quarter alone no other columns are read.
    memory = np.zeros((2, 192, 128), np.int8)
    fill([Request(file, file.weight, [(targets[3][0], memory)])], direct=direct)
    np.testing.assert_array_equal(memory, weight[targets[3][0]])


@pytest.mark.parametrize("shape", [(600, 500), (500, 16500)])
def test_large_matrices_of_any_dtype_are_transposed(tmp_path, shape):
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    write_tensor(tmp_path / "tensor", values)
    file = read_tensor(tmp_path / "tensor")
    memory = np.zeros(shape[::-1], np.float32)
    whole = tuple(slice(0, n) for n in shape)
    fill([Request(file, file.weight, [(whole, memory.T)])])
    np.testing.assert_array_equal(memory, values.T)


@pytest.mark.parametrize("direct", [False, True])
def test_a_list_is_cut_into_slabs(tmp_path, direct, monkeypatch):
    """Parts of it too, which begin anywhere."""
    values = np.random.default_rng(0).normal(size=3001).astype(np.float32)
    (tmp_path / "file").write_bytes(bytes(100) + values.tobytes())
    span = ArraySpan(np.dtype(np.float32), (3001,), 100)
    file = DataFile(tmp_path / "file", 100 + values.nbytes)
    monkeypatch.setattr(read, "_SLAB", 4096)
    done, found = [], np.zeros(3001, np.float32)
    targets = [((part,), found[part]) for part in (slice(0, 1300), slice(1300, 3001))]
    fill([Request(file, span, targets)], done.append, direct)
    np.testing.assert_array_equal(found, values)
    assert len(done) == 4 and sum(done) == values.nbytes


@pytest.mark.parametrize(("start", "is_direct"), [(PAGE, True), (PAGE + 64, False)])
def test_whole_blocks_are_read_straight_to_where_they_belong(
    start, is_direct, tmp_path, monkeypatch
):
    values = random_bytes(8, 1024)
    (tmp_path / "file").write_bytes(bytes(start) + values.tobytes())
    file = DataFile(tmp_path / "file", start + values.nbytes)
    with file.reading(direct=True) as reader:
        if reader.direct is None:
            pytest.skip("no O_DIRECT on this file system")
    through_cache, plain = [], Reader.read
    monkeypatch.setattr(Reader, "read", lambda *a: through_cache.append(len(a[1])) or plain(*a))
    memory = pages(values.nbytes)[: values.nbytes].view(np.int8).reshape(values.shape)
    span = ArraySpan(np.dtype(np.int8), values.shape, start)
    fill([Request(file, span, [((slice(0, 8), slice(0, 1024)), memory)])], direct=True)
    np.testing.assert_array_equal(memory, values)
    assert (sum(through_cache) == 0) == is_direct


def test_a_thread_that_fails_ends_the_others(matrices, monkeypatch):
    monkeypatch.setattr(read, "_SLAB", 256)
    (file, _), reads = matrices, []

    def fail_once(self, memory, n_bytes, offset):
        reads.append(offset)
        if len(reads) == 5:
            raise CheckpointError("gone")
        time.sleep(0.005)
        return memory[:n_bytes]

    monkeypatch.setattr(Reader, "read_in", fail_once)
    whole = (slice(0, 2), slice(0, 384), slice(0, 256))
    memory = np.zeros((2, 256, 384), np.int8)
    with pytest.raises(CheckpointError, match="gone"):
        fill([Request(file, file.weight, [(whole, memory.swapaxes(1, 2))])])
    assert 5 <= len(reads) < 100  # of 768


# One reader


@pytest.fixture
def three_pages(tmp_path):
    """A file of three pages and a bit, and its bytes."""
    content = np.random.default_rng(0).bytes(3 * PAGE + 165)
    (tmp_path / "file").write_bytes(content)
    return DataFile(tmp_path / "file", len(content)), content


def check_reading(file, content, direct):
    end = len(content)
    with file.reading(direct) as reader:
        for offset, n in (
            (0, 10),
            (150, PAGE),
            (PAGE, PAGE),
            (PAGE - 1, 2),
            (0, end),
            (end - 7, 7),
        ):
            assert bytes(reader.read_in(pages(n), n, offset)) == content[offset : offset + n]
            buffer = pages(n)[:n]
            reader.fill(buffer, offset)
            assert bytes(buffer) == content[offset : offset + n]
        with pytest.raises(CheckpointError, match="ended early"):
            reader.read_in(pages(8), 8, end - 7)
        with pytest.raises(CheckpointError, match="ended early"):
            reader.fill(pages(2 * PAGE)[: 2 * PAGE], 2 * PAGE)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("most", [512, PAGE, PAGE + 512, 10**9])
def test_any_part_of_a_file_from_a_system_that_gives_less_than_it_is_asked_for(
    direct, most, three_pages, monkeypatch
):
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, [buffers[0][:most]], at))
    check_reading(*three_pages, direct)


@pytest.mark.parametrize("refused", ["opening", "reading"])
def test_where_there_is_no_direct_reading_the_page_cache_is_used(refused, three_pages, monkeypatch):
    """Not every file system has it, nor every disk that has larger blocks."""
    open_, preadv, opened = os.open, os.preadv, set()

    def refuse_to_open(path, flags, *more):
        if flags & os.O_DIRECT and refused == "opening":
            raise OSError(errno.EINVAL, "no")
        found = open_(path, flags, *more)
        opened.update({found} if flags & os.O_DIRECT else ())
        return found

    def refuse_to_read(descriptor, buffers, offset):
        if descriptor in opened:
            raise OSError(errno.EINVAL, "no")
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "open", refuse_to_open)
    monkeypatch.setattr(os, "preadv", refuse_to_read)
    check_reading(*three_pages, direct=True)


def test_what_is_read_directly_is_not_in_the_page_cache(three_pages):
    file, content = three_pages

    def is_cached():  # some page of it; to read one would have others read ahead
        mapped, found = np.memmap(file.path, mode="r"), (ctypes.c_ubyte * 4)()
        address, size = ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(mapped.size)
        assert ctypes.CDLL(None).mincore(address, size, found) == 0
        return any(byte & 1 for byte in found)

    with open(file.path, "rb") as opened, contextlib.suppress(AttributeError):
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if is_cached():
        pytest.skip("this file system keeps its files in memory")
    with file.reading(direct=True) as reader:
        if reader.direct is None:
            pytest.skip("no O_DIRECT on this file system")
        reader.read_in(pages(len(content)), len(content), 0)
        reader.fill(pages(PAGE)[:PAGE], PAGE)
    assert not is_cached()
    with file.reading() as reader:
        reader.read(bytearray(100), 0)
    assert is_cached()
