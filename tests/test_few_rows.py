"""The loop that multiplies few rows, shared between threads: nothing may depend on who does what."""

import functools
import threading
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from grokkit import few_rows

N, K, MATRICES = 37, 64, 5


@pytest.fixture(scope="module")
def stack():
    random = np.random.default_rng(0)
    weight = random.integers(-128, 128, (MATRICES, N, K)).astype(np.int8)
    scales = random.uniform(0.001, 0.1, (MATRICES, 4, N)).astype(ml_dtypes.bfloat16)
    return weight, scales


def by_definition(x, weight, scales, place):
    w = weight[place].astype(np.float64).reshape(N, 4, -1)
    w = w * scales[place].astype(np.float64).T[:, :, None]
    return x.astype(np.float64) @ w.reshape(N, K).T


def each_matrix(x, stack, threads, monkeypatch):
    """The products with all the matrices, one after the other in a compiled loop."""
    monkeypatch.setattr(few_rows, "_threads", lambda entries: threads)
    weight, scales = (jnp.asarray(a).reshape(-1, a.shape[-1]) for a in stack)

    @jax.jit
    def run(x):
        return jax.lax.map(
            lambda place: few_rows.product(x, weight, scales, place), jnp.arange(MATRICES)
        )

    return lambda: np.asarray(run(jnp.asarray(x)))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 16])
def test_is_the_product(stack, rows, threads, monkeypatch):
    x = np.random.default_rng(rows).normal(size=(rows, K)).astype(np.float32)
    found = each_matrix(x, stack, threads, monkeypatch)()
    expected = np.stack([by_definition(x, *stack, place) for place in range(MATRICES)])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_row_is_the_same_whatever_rows_are_beside_it(stack, monkeypatch):
    x = np.random.default_rng(0).normal(size=(7, K)).astype(np.float32)
    together = each_matrix(x, stack, 1, monkeypatch)()
    for row in range(len(x)):
        alone = each_matrix(x[row : row + 1], stack, 1, monkeypatch)()
        np.testing.assert_array_equal(together[:, row], alone[:, 0])


@pytest.mark.parametrize("k", [16, 21, 40])
def test_entries_beyond_whole_registers_count_once(k):
    random = np.random.default_rng(k)
    weight = random.integers(-128, 128, (N, 2 * k)).astype(np.int8)
    scales = random.uniform(0.001, 0.1, (2, N)).astype(ml_dtypes.bfloat16)
    x = random.normal(size=(5, 2 * k)).astype(np.float32)
    w = weight.astype(np.float64).reshape(N, 2, k) * scales.astype(np.float64).T[:, :, None]
    found = jax.jit(few_rows.product)(x, weight, scales, jnp.int32(0))
    np.testing.assert_allclose(found, x @ w.reshape(N, -1).T, rtol=1e-5, atol=1e-5)


def test_takes_few_rows_of_groups_that_fill_a_register():
    assert few_rows.takes(1, few_rows.LANES) and few_rows.takes(few_rows.MOST_ROWS, 1024)
    assert not few_rows.takes(few_rows.MOST_ROWS + 1, 1024)
    assert not few_rows.takes(1, few_rows.LANES - 1)


def test_sharing_changes_no_bit_however_often_and_with_how_many_callers(stack, monkeypatch):
    x = np.random.default_rng(0).normal(size=(3, K)).astype(np.float32)
    expected = each_matrix(x, stack, 1, monkeypatch)()
    run = each_matrix(x, stack, 3, monkeypatch)
    run()
    wrong = []

    def often():
        wrong.extend(i for i in range(200) if not np.array_equal(run(), expected))

    callers = [threading.Thread(target=often) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_cores_are_shared_between_devices(monkeypatch):
    monkeypatch.setattr(few_rows, "_cores", lambda: 16)
    large = 2**30
    assert few_rows._threads(large) == 16
    assert few_rows._threads(few_rows._A_THREAD) == 1
    for devices, threads in ((2, 8), (8, 2)):
        with jax.set_mesh(jax.make_mesh((devices,), ("model",))):
            assert few_rows._threads(large) == threads


def test_threads_that_compile_at_once_register_it_once(stack, monkeypatch):
    run = each_matrix(np.ones((1, K), np.float32), stack, 1, monkeypatch)
    run()  # so that XLA knows the product
    calls = []

    @functools.cache
    def register():
        calls.append(threading.get_ident())
        time.sleep(0.2)

    monkeypatch.setattr(few_rows, "_register", register)
    monkeypatch.setattr(few_rows.jax.ffi, "ffi_call", lambda *_, **__: lambda *_: None)
    weight, scales = (jnp.asarray(a).reshape(-1, a.shape[-1]) for a in stack)
    arguments = (jnp.ones((1, K)), weight, scales, jnp.int32(0))
    product = getattr(few_rows.product, "__wrapped__", few_rows.product)
    threads = [threading.Thread(target=product, args=arguments) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
