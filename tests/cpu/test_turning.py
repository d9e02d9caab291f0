"""Matrices of bytes turned round, against numpy; and read from files by several threads."""

import itertools
import time

import jax
import numpy as np
import pytest

from grokkit.checkpoint import slabs, write_tensor
from grokkit.checkpoint.loading import HostPart
from grokkit.checkpoint.tensor_file import (
    PAGE,
    ArraySpan,
    DirectReader,
    TensorFile,
    read_tensor,
)
from grokkit.cpu import is_there, turn
from grokkit.errors import CheckpointError

pytestmark = pytest.mark.skipif(not is_there(), reason="no loops of our own here")


def entries(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(-128, 128, shape).astype(np.int8)


def framed(height: int, width: int, pitch: int, start: int) -> tuple[np.ndarray, np.ndarray]:
    """A matrix in the midst of sevens, and the bytes all round it."""
    raw = np.full(pitch * height + 256, 7, np.int8)
    first = -raw.ctypes.data % 64 + 64 + start
    whole = raw[first - start - 64 :]
    return raw[first : first + pitch * height].reshape(height, pitch)[:, :width], whole


@pytest.mark.parametrize(
    ("n_rows", "n_columns"), [(64, 16), (128, 48), (200, 100), (63, 15), (1, 5), (5, 1)]
)
@pytest.mark.parametrize(("more", "start"), [(0, 0), (64, 0), (3, 0), (64, 1)])
def test_turned_round(n_rows, n_columns, more, start):
    """Where rows of the target lie at multiples of 64 bytes and where not; nothing beside them."""
    rows = entries(n_rows, n_columns + 7)[:, 3 : 3 + n_columns]
    pitch = -(-max(n_rows, 1) // 64) * 64 + more
    to, whole = framed(n_columns, n_rows, pitch, start)
    turn(rows, [(0, to)])
    assert np.array_equal(to, rows.T)
    to[:] = 7
    assert (whole == 7).all()


@pytest.fixture(scope="module")
def matrices(tmp_path_factory):
    """A file of two matrices of [384, 256] bytes."""
    path = tmp_path_factory.mktemp("turning") / "tensor"
    weight = entries(2, 384, 256)
    write_tensor(path, weight, np.ones((2, 1, 256), jax.numpy.bfloat16))
    return path, weight


@pytest.mark.parametrize("past_cache", [False, True])
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("rows", [7, 64, 1000])
def test_slabs_of_any_size_by_several_threads(matrices, turned, rows, past_cache, monkeypatch):
    path, weight = matrices
    monkeypatch.setattr(slabs, "_SLAB", rows * 256)
    monkeypatch.setattr("grokkit.cpu.cores", lambda: 4)
    file, places = read_tensor(path), []
    for some_rows, columns in itertools.product(
        (slice(0, 192), slice(192, 384)), (slice(0, 128), slice(128, 256))
    ):
        index = (slice(0, 2), some_rows, columns)
        memory = np.zeros((2, 128, 192) if turned else (2, 192, 128), np.int8)
        places.append(slabs.Place(index, memory, jax.devices()[0]))
    slabs.fill([slabs.Wanted(file, file.weight, turned, places)], past_cache=past_cache)
    for place in places:
        part = weight[place.index]
        assert np.array_equal(place.memory, part.swapaxes(-1, -2) if turned else part)


@pytest.mark.parametrize("past_cache", [False, True])
def test_a_list_is_cut_into_slabs(tmp_path, past_cache, monkeypatch):
    """Parts of it too, which begin anywhere."""
    values = np.random.default_rng(0).normal(size=3001).astype(np.float32)
    (tmp_path / "file").write_bytes(bytes(100) + values.tobytes())
    span = ArraySpan(np.dtype(np.float32), (3001,), 100)
    file = TensorFile(tmp_path / "file", 100 + values.nbytes, span)
    monkeypatch.setattr(slabs, "_SLAB", 4096)
    device, done = jax.devices()[0], []
    places = [
        slabs.Place((slice(first, last),), np.zeros(last - first, np.float32), device)
        for first, last in ((0, 1300), (1300, 3001))
    ]
    wanted = slabs.Wanted(file, span, False, places)
    slabs.fill([wanted], done.append, past_cache=past_cache)
    assert np.array_equal(np.concatenate([place.memory for place in places]), values)
    assert len(done) == 4 and sum(done) == values.nbytes


@pytest.mark.parametrize("shape", [(8, 1024), (8192,)])
@pytest.mark.parametrize(("start", "is_direct"), [(PAGE, True), (PAGE + 64, False)])
def test_past_the_page_cache_whole_blocks_go_straight_to_where_they_belong(
    start, is_direct, shape, tmp_path, monkeypatch
):
    values, offset = entries(*shape), start
    (tmp_path / "file").write_bytes(bytes(offset) + values.tobytes())
    span = ArraySpan(np.dtype(np.int8), shape, offset)
    file = TensorFile(tmp_path / "file", offset + values.nbytes, span)
    with file.reading_past_cache() as reader:
        if reader.descriptor is None:
            pytest.skip("this system, or this file system, has no reading past the page cache")
    detours, read = [], DirectReader.read
    monkeypatch.setattr(DirectReader, "read", lambda *a: detours.append(1) or read(*a))
    memory = HostPart(jax.devices()[0], shape, np.dtype(np.int8)).memory
    place = slabs.Place(tuple(slice(0, n) for n in shape), memory, jax.devices()[0])
    slabs.fill([slabs.Wanted(file, span, False, [place])], past_cache=True)
    assert np.array_equal(memory, values)
    assert (not detours) == is_direct


def test_a_thread_that_fails_ends_the_others(matrices, monkeypatch):
    path, _ = matrices
    monkeypatch.setattr(slabs, "_SLAB", 256)
    monkeypatch.setattr("grokkit.cpu.cores", lambda: 4)
    file, reads = read_tensor(path), []

    def fail_once(self, read, buffer, slab):
        reads.append(slab)
        if len(reads) == 5:
            raise CheckpointError("gone")
        time.sleep(0.005)
        return buffer.rows[: slab.n, :256].view(np.int8)

    monkeypatch.setattr(slabs._Layout, "read", fail_once)
    whole = (slice(0, 2), slice(0, 384), slice(0, 256))
    place = slabs.Place(whole, np.zeros((2, 256, 384), np.int8), jax.devices()[0])
    with pytest.raises(CheckpointError, match="gone"):
        slabs.fill([slabs.Wanted(file, file.weight, True, [place])])
    assert 5 <= len(reads) < 100  # of 768
