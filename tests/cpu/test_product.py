"""The products that XLA calls on a CPU: right, and nothing may depend on who does what."""

import functools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from grokkit.cpu import Strides, amx, grouped_product, product, whole_numbers
from grokkit.cpu.few_rows import FEW_ROWS
from grokkit.cpu.instructions import LANES, called_from_c

N, K, GROUPS, MATRICES = 37, 64, 4, 5
FLOAT32, BFLOAT16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)


def make(seed, matrices, n, k, groups):
    random = np.random.default_rng(seed)
    weight = random.integers(-128, 128, (matrices, n, k)).astype(np.int8)
    scales = random.uniform(0.001, 0.1, (matrices, groups, n)).astype(ml_dtypes.bfloat16)
    return weight, scales


@pytest.fixture(scope="module")
def stack():
    return make(0, MATRICES, N, K, GROUPS)


def normal(seed, rows, k=K):
    return np.random.default_rng(seed).normal(size=(rows, k)).astype(np.float32)


@functools.partial(jax.jit, static_argnames="dtype")
def run(x, counts, weight, scales, place, dtype):
    flat = weight.reshape(-1, weight.shape[-1]), scales.reshape(-1, scales.shape[-1])
    *_, n, k = weight.shape
    how = scales.shape[-2], place, dtype, Strides(False, k, n * k)
    return grouped_product(x, counts, *flat, *how)


def by_definition(x, counts, weight, scales, place, dtype):
    """In float64; and the sum of the terms' sizes, which rounding is measured against."""
    n, groups = weight.shape[1], scales.shape[1]
    w = weight.astype(np.float64).reshape(len(weight), n, groups, -1)
    w = (w * scales.astype(np.float64).swapaxes(1, 2)[..., None]).reshape(weight.shape)
    products, sizes = [], []
    for i, count in enumerate(counts):
        some = x[sum(counts[:i]) :][:count]
        is_few = count <= FEW_ROWS and x.shape[1] // groups >= LANES
        is_whole = whole_numbers.is_fit(x.shape[1], groups)
        if dtype == BFLOAT16 and not is_few and not is_whole:
            some = some.astype(ml_dtypes.bfloat16)
        products.append(some.astype(np.float64) @ w[place + i].T)
        sizes.append(np.abs(some).astype(np.float64) @ np.abs(w[place + i].T))
    return np.concatenate(products), np.concatenate(sizes)


def check(counts, stack, place=0, dtype=FLOAT32):
    x = normal(len(counts), sum(counts), stack[0].shape[2])
    found = run(x, jnp.array(counts), *map(jnp.asarray, stack), jnp.int32(place), dtype)
    expected, size = by_definition(x, counts, *stack, place, dtype)
    assert (np.abs(found - expected) <= 1e-6 * size).all()


FLOATS, WHOLE = "floats", "whole numbers"


@pytest.fixture(params=[FLOATS, WHOLE])
def numbers(request, monkeypatch):
    """What rows are written as."""
    if request.param == FLOATS:
        monkeypatch.setattr(whole_numbers, "is_fit", lambda k, groups: False)
    elif not amx.is_there():
        pytest.skip("this processor has no instructions for tiles (AMX)")
    jax.clear_caches()
    yield request.param
    jax.clear_caches()


@pytest.fixture(params=[1, 2, 5])
def threads(request, monkeypatch):
    monkeypatch.setattr(product, "_threads", lambda rows, entries: request.param)
    jax.clear_caches()
    yield request.param
    jax.clear_caches()


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_rows_meet_their_own_matrix(stack, threads, dtype):
    for rows in (1, 2, 3, 4, 7, FEW_ROWS, FEW_ROWS + 1, 64, 65, 300):
        check([rows], stack, 2, dtype)
    check([3, 0, 40, FEW_ROWS + 1], stack, 1, dtype)
    check([0, 0, 1, 0, 1], stack, 0, dtype)
    check([1, 2, 1, 3, FEW_ROWS + 1], stack, 0, dtype)  # more matrices than packed blocks


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize(
    ("group", "numbers"),
    [(group, FLOATS) for group in (1, 2, 15, LANES, 21, 40, 300, 513)]
    + [(group, WHOLE) for group in (64, 65, 127, 300, 513)],
    indirect=["numbers"],
)
@pytest.mark.parametrize("n", [1, 6, 50, 97])
def test_entries_and_outputs_beyond_whole_registers_count_once(n, group, dtype, numbers):
    assert whole_numbers.is_fit(2 * group, 2) == (numbers == WHOLE)
    stack = make(group, 2, n, 2 * group, 2)
    for counts in ([5], [20], [3, 33]):
        check(counts, stack, 2 - len(counts), dtype)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("rows", [7, 300])
def test_a_row_is_the_same_whatever_rows_are_beside_it(stack, rows, dtype):
    fewest = 1 if rows <= FEW_ROWS else FEW_ROWS + 1
    x, arrays = normal(0, rows), [*map(jnp.asarray, stack)]
    together = run(x, jnp.array([rows]), *arrays, jnp.int32(1), dtype)
    for first in (0, rows // 2, rows - fewest):
        some = slice(first, first + fewest)
        alone = run(x[some], jnp.array([fewest]), *arrays, jnp.int32(1), dtype)
        np.testing.assert_array_equal(together[some], alone)


@pytest.mark.parametrize("rows", [1, 23, 300])
def test_matrices_larger_than_a_cache(rows, numbers):
    """Also those of which not all groups are gone through at once."""
    check([rows], make(rows, 1, 530, 6144, 8))


@pytest.mark.parametrize("numbers", [WHOLE], indirect=True)
@pytest.mark.parametrize("k", [130, 6144])
def test_a_row_is_the_same_beside_any_number_of_others(k, numbers, threads):
    """Where floats add the sums of few rows and of many in another order."""
    stack = [*map(jnp.asarray, make(0, 2, 41, k, 2))]
    x = normal(0, 301, k)
    together = run(x, jnp.array([34, 267]), *stack, jnp.int32(0), FLOAT32)
    for first, n, matrix in ((0, 1, 0), (31, 3, 0), (34, 6, 1), (199, 102, 1)):
        alone = run(x[first : first + n], jnp.array([n]), *stack, jnp.int32(matrix), FLOAT32)
        np.testing.assert_array_equal(together[first : first + n], alone)


def test_rows_of_any_size(numbers):
    """Each is as exact for its size; nothing and what is no number stay in their own rows.

    Whole numbers are rounded where their largest neighbour is, though an output may not meet it.
    """
    stack = make(0, 1, 40, 256, 2)
    x = normal(1, 12, 256)
    x[1], x[2], x[3] = 1e30 * x[1], 1e-30 * x[2], 0
    x[4, 17], x[5, 200] = 3e4, -3e4
    x[6, 3], x[7, 255] = np.nan, np.inf
    found = np.array(run(x, jnp.array([12]), *map(jnp.asarray, stack), jnp.int32(0), FLOAT32))
    assert not np.isfinite(found[6:8]).any()
    finite = [i for i in range(12) if i not in (6, 7)]
    expected, size = by_definition(x[finite], [10], *stack, 0, FLOAT32)
    if numbers == WHOLE:
        largest = np.broadcast_to(np.abs(x[finite]).max(axis=1, keepdims=True), (10, 256))
        size += 0.05 * by_definition(largest.astype(np.float32), [10], *stack, 0, FLOAT32)[1]
    assert (np.abs(found[finite] - expected) <= 1e-6 * size).all()
    assert not found[3].any()


def test_many_rows_are_rounded_to_the_nearest_bfloat16():
    """Of two equally near to the even one; seen by a matrix that gives each entry back."""
    bits = np.random.default_rng(0).integers(0, 2**32, 40 * 32, dtype=np.uint32)
    bits[::3] = bits[::3] & 0xFFFF0000 | 0x8000  # between two
    x = bits.view(np.float32).reshape(40, 32)
    x[~(np.abs(x) < 1e37)] = -1.0
    x[np.abs(x) < 1e-30] = 1.0  # sums drop what is nearly nothing
    x[0, 0], x[1, 1], x[2, 2] = np.nan, np.inf, -np.inf
    weight, scales = np.eye(32, dtype=np.int8)[None], np.ones((1, 1, 32), ml_dtypes.bfloat16)
    found = np.array(run(x, jnp.array([40]), weight, scales, jnp.int32(0), BFLOAT16))
    assert np.isnan(found[0]).all()
    for row in (1, 2):  # infinity times nothing is not a number
        assert found[row, row] == x[row, row] and np.isnan(np.delete(found[row], row)).all()
    np.testing.assert_array_equal(found[3:], x[3:].astype(ml_dtypes.bfloat16).astype(np.float32))


def test_a_matrix_that_no_row_meets_is_not_read(stack):
    weight, scales = stack[0], stack[1].copy()
    scales[2] = np.nan
    found = run(normal(0, 41), jnp.array([40, 0, 1]), weight, scales, jnp.int32(1), FLOAT32)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("counts", [[3], [40, 0, 2]])
def test_sharing_changes_no_bit_however_often_and_with_how_many_callers(stack, counts, monkeypatch):
    arrays = normal(0, sum(counts)), jnp.array(counts), *map(jnp.asarray, stack), jnp.int32(0)
    found = {}
    for threads in (1, 3):
        monkeypatch.setattr(product, "_threads", lambda rows, entries, n=threads: n)
        found[threads] = jax.jit(run.__wrapped__, static_argnames="dtype").lower(
            *arrays, FLOAT32
        ).compile()  # fmt: skip
    expected, wrong = np.asarray(found[1](*arrays)), []

    def often():
        for i in range(200):
            if not np.array_equal(found[3](*arrays), expected):
                wrong.append(i)

    callers = [threading.Thread(target=often) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_cores_are_shared_between_devices(monkeypatch):
    monkeypatch.setattr(product, "cores", lambda: 16)
    large = 2**30
    assert product._threads(1, large) == 16
    assert product._threads(4, product._A_THREAD) == 1
    assert product._threads(40, product._A_THREAD) == 10
    for devices, threads in ((2, 8), (8, 2)):
        with jax.set_mesh(jax.make_mesh((devices,), ("model",))):
            assert product._threads(1, large) == threads


def test_threads_that_compile_at_once_register_it_once(stack, monkeypatch):
    calls = []

    @functools.cache
    def register():
        calls.append(threading.get_ident())
        time.sleep(0.2)

    monkeypatch.setattr(product.xla, "register", register)
    monkeypatch.setattr(product.jax.ffi, "ffi_call", lambda *_, **__: lambda *_: [jnp.ones((1, N))])
    weight, scales = (jnp.asarray(a).reshape(-1, a.shape[-1]) for a in stack)
    arguments = (jnp.ones((1, K)), jnp.array([1]), weight, scales, GROUPS)
    arguments += (jnp.int32(0), FLOAT32, Strides(False, K, N * K))
    unchecked = getattr(grouped_product, "__wrapped__", grouped_product)
    threads = [threading.Thread(target=unchecked, args=arguments) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def test_compiled_code_of_another_version_is_not_taken_from_disk():
    def returning(version):
        def function(_):
            return version

        return function

    assert [called_from_c(returning(i)).ctypes(0) for i in (1, 2, 1)] == [1, 2, 1]


@pytest.mark.slow
def test_a_processor_with_shorter_registers_gives_the_same():
    """These tests once more, compiled for one of 2013."""
    lesser = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+avx,+fma,+f16c,+sse4.2"}
    chosen = "rows_meet or beyond_whole or nearest or beside_it or like_the_definition"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        chosen,
        str(Path(__file__).parent),
    ]
    done = subprocess.run(
        command, check=False, env=os.environ | lesser, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
