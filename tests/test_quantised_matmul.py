"""Products with 8-bit matrices against their definition in float64: every form, one test."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import float64
from hypothesis import given, settings
from hypothesis import strategies as st

from grokkit import quantised_matmul
from grokkit.kernels.cpu import product
from grokkit.quant import QuantizedArray, index
from grokkit.quantised_matmul import block_rows, matmul, on_cpu, plain

FEW = settings(max_examples=15, deadline=None)
FLOAT32, BFLOAT16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)


FORMS = {
    "matmul": matmul,
    "plain": plain,
    "on_cpu": lambda x, w, dtype: on_cpu(product, x, w, dtype),
}
ROWS = [1, 5, 20, 130]
"""On either side of where the arithmetic changes."""


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """So that small matrices take several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantised_matmul, "_BLOCK", 64)
        yield


def make(seed, *shape, groups=1):
    random = np.random.default_rng(seed)
    *lead, k, n = shape
    weight = random.integers(-128, 128, (*lead, n, k)).astype(np.int8)
    scales = random.uniform(0.001, 0.1, (*lead, groups, n)).astype(ml_dtypes.bfloat16)
    return QuantizedArray(jnp.asarray(weight), jnp.asarray(scales))


JITTED = {name: jax.jit(form, static_argnums=2) for name, form in FORMS.items()}


def run(form, x, w, dtype):
    return JITTED[form](jnp.asarray(x), w, dtype)


def products(x, q):
    """x @ w in float64, and how large the terms summed are: what rounding is measured against."""
    return x.astype(np.float64) @ float64(q), np.abs(x).astype(np.float64) @ np.abs(float64(q))


@pytest.mark.parametrize("form", FORMS)
@given(
    seed=st.integers(0, 2**32 - 1), groups=st.sampled_from([1, 2, 8]), n_rows=st.sampled_from(ROWS)
)
@FEW
def test_is_the_product_with_the_dequantised_matrix(form, seed, groups, n_rows):
    q = make(seed, 128, 6, groups=groups)
    x = np.random.default_rng(seed).normal(size=(n_rows, 128)).astype(np.float32)
    expected, size = products(x, q)
    found = run(form, x, q, FLOAT32)
    assert found.dtype == jnp.float32 and found.shape == (n_rows, 6)
    assert (np.abs(np.asarray(found, np.float64) - expected) <= 1e-6 * size).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n_rows", ROWS)
@pytest.mark.parametrize("groups", [1, 8])
def test_bfloat16_sums_in_float32(form, n_rows, groups):
    q = make(0, 4096, 6, groups=groups)
    x = np.random.default_rng(0).normal(size=(n_rows, 4096)).astype(ml_dtypes.bfloat16)
    expected, size = products(x, q)
    found = run(form, x.astype(np.float32), q, BFLOAT16)
    assert found.dtype == jnp.float32
    # A sum in bfloat16 would be off by more than 2**-9 of its terms' size after a few of them.
    assert (np.abs(np.asarray(found, np.float64) - expected) <= 3e-5 * size).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("n_rows", ROWS)
def test_one_matrix_of_a_stack_is_the_same_as_that_matrix(form, dtype, n_rows):
    q = make(1, 3, 2, 64, 12, groups=2)
    x = np.random.default_rng(1).normal(size=(n_rows, 64)).astype(np.float32)
    for i, j in np.ndindex(3, 2):
        alone = QuantizedArray(q.weight[i, j], q.scales[i, j])
        found = run(form, x, index(index(q, i), j), dtype)
        np.testing.assert_array_equal(found, run(form, x, alone, dtype))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("n_rows", [1, 130])
def test_gradient_is_the_product_with_the_transpose(form, dtype, n_rows):
    q = make(2, 3, 64, 12, groups=2)
    x, dy = (np.random.default_rng(2).normal(size=(n_rows, s)).astype(np.float32) for s in (64, 12))

    def weighted(x, q):
        return jnp.sum(FORMS[form](x, index(q, 1), dtype) * dy)

    found = jax.jit(jax.grad(weighted))(jnp.asarray(x), q)
    expected = dy @ float64(q)[1].T
    rounding = 1e-5 if dtype == FLOAT32 else 2e-2
    np.testing.assert_allclose(found, expected, atol=rounding * np.abs(expected).max())


def test_a_matrix_of_floats_will_do():
    random = np.random.default_rng(0)
    x, w = random.normal(size=(3, 4)), random.normal(size=(4, 5))
    found = run("matmul", x.astype(np.float32), jnp.asarray(w, jnp.float32), FLOAT32)
    np.testing.assert_allclose(found, x @ w, rtol=1e-5, atol=1e-6)


def test_leading_axes_are_kept():
    q = make(0, 16, 5)
    x = np.random.default_rng(0).normal(size=(2, 3, 16)).astype(np.float32)
    found = matmul(jnp.asarray(x), q, FLOAT32)
    np.testing.assert_array_equal(
        found.reshape(6, 5), matmul(jnp.asarray(x.reshape(6, 16)), q, FLOAT32)
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_a_number_stays_so_in_its_row(form, dtype, bad):
    q = make(0, 64, 5)
    x = np.ones((2, 64), np.float32)
    x[1, 3] = bad
    found = np.asarray(run(form, x, q, dtype))
    assert np.isfinite(found[0]).all() and not np.isfinite(found[1]).any()


@pytest.mark.parametrize("form", FORMS)
def test_curvature_along_a_direction(form):
    """Forwards over backwards, and backwards twice, against finite differences of the gradient."""
    q = make(4, 64, 12, groups=2)
    x, v = (np.random.default_rng(i).normal(size=(3, 64)).astype(np.float32) for i in (5, 6))

    def gradient(x):
        return jax.grad(lambda x: jnp.sum(jnp.sin(FORMS[form](x, q, FLOAT32))))(x)

    w = float64(q)
    expected = -(np.sin(x.astype(np.float64) @ w) * (v.astype(np.float64) @ w)) @ w.T
    forwards = jax.jit(lambda x, v: jax.jvp(gradient, (x,), (v,))[1])(x, v)
    backwards = jax.jit(lambda x, v: jax.grad(lambda x: jnp.vdot(gradient(x), v))(x))(x, v)
    for found in (forwards, backwards):
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@given(st.integers(1, 5000), st.integers(1, 100))
@FEW
def test_blocks_divide_the_matrix(n, k):
    rows = block_rows(n, k)
    assert n % rows == 0 and (rows * k <= 64 or rows == 1)
