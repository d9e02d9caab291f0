"""Products with matrices of floats that XLA calls on a CPU, against a definition in float64."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from grokkit.cpu import float_products, float_sums, is_fit_for_floats, product
from grokkit.cpu.few_rows import FEW_ROWS
from grokkit.cpu.instructions import LANES
from grokkit.float_matmul import (
    matmul_transposed,
    products,
    products_by_definition,
    sums,
    sums_by_definition,
)

STACK, PLACE = 5, 2
KINDS = {"products": float_products, "sums": float_sums}


def make(kind, matrices, rows, n, k, bfloat16=False, seed=0):
    """Rows, a stack of matrices, and its bits where they are what is passed on."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(matrices, rows, k)).astype(np.float32)
    shape = (STACK, n, k) if kind == "products" else (STACK, k, n)
    weight = random.normal(size=shape).astype(np.float32)
    if bfloat16:
        weight = weight.astype(ml_dtypes.bfloat16)
        return x, weight.astype(np.float32), weight.view(np.uint16)
    return x, weight, weight


def by_definition(kind, x, reach, weight):
    """In float64."""
    some = weight[PLACE : PLACE + len(x)].astype(np.float64)
    found = np.zeros((*x.shape[:2], weight.shape[1 if kind == "products" else 2]))
    for i, n in enumerate(reach):
        if kind == "products":
            found[i, :, :n] = x[i].astype(np.float64) @ some[i, :n].T
        else:
            found[i] = x[i, :, :n].astype(np.float64) @ some[i, :n]
    return found


def run(kind, x, reach, weight):
    compiled = jax.jit(KINDS[kind])
    return np.asarray(compiled(x, jnp.array(reach), jnp.asarray(weight), jnp.int32(PLACE)))


@pytest.fixture(params=[1, 3])
def threads(request, monkeypatch):
    monkeypatch.setattr(product, "_threads", lambda rows, entries: request.param)
    return request.param


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "n", "k"),
    [(1, 1, LANES), (2, 37, 96), (5, 64, 40), (6, 41, LANES + 1), (FEW_ROWS, 130, 200)],
)
def test_like_the_definition(kind, rows, n, k, bfloat16, threads):
    x, floats, weight = make(kind, 3, rows, n, k, bfloat16)
    whole = n if kind == "products" else k
    reach = [whole, whole // 3, whole - 1]
    found = run(kind, x, reach, weight)
    expected = by_definition(kind, x, reach, floats)
    size = by_definition(kind, abs(x), reach, abs(floats))  # of the terms that are rounded
    assert (np.abs(found - expected) <= 1e-6 * size).all()
    if kind == "products":
        assert not found[1, :, whole // 3 :].any()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_out_of_reach_is_not_read(kind, threads):
    x, _, weight = make(kind, 3, 2, 24, 48)
    reach = [5, 0, 16]
    for i, n in enumerate(reach):
        weight[PLACE + i, n:] = np.nan
        if kind == "sums":
            x[i, :, n:] = np.nan
    expected = by_definition(kind, np.nan_to_num(x), reach, np.nan_to_num(weight))
    np.testing.assert_allclose(run(kind, x, reach, weight), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_same_whatever_is_beside_it_and_however_far_the_matrix_goes(kind, threads):
    """So that a sequence gets the tokens that it would get alone, in a cache of any capacity."""
    x, _, weight = make(kind, 3, FEW_ROWS, 50, 64)
    reach = [30, 30, 30]
    together = run(kind, x, reach, weight)
    for i, row in ((0, 0), (1, 7), (2, 15)):
        only = np.roll(weight, -i, axis=0)
        alone = run(kind, x[i : i + 1, row : row + 1], reach[:1], only)
        np.testing.assert_array_equal(together[i, row], alone[0, 0])
    if kind == "products":
        shorter = run(kind, x, reach, weight[:, :30])
        np.testing.assert_array_equal(together[..., :30], shorter)
    else:
        shorter = run(kind, x[..., :30], reach, weight[:, :30])
        np.testing.assert_array_equal(together, shorter)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_are_the_definition_s(kind):
    loops, definition = {
        "products": (products, products_by_definition), "sums": (sums, sums_by_definition)
    }[kind]  # fmt: skip
    x, weight = map(jnp.asarray, make(kind, 3, 2, 24, 32)[:2])
    direction = tuple(map(jnp.asarray, make(kind, 3, 2, 24, 32, seed=1)[:2]))
    reach = jnp.array([24, 7, 0])

    def of(function):
        def loss(x, weight):
            return jnp.sum(jnp.sin(function(x, reach, weight, jnp.int32(PLACE))))

        forward = jax.jvp(loss, (x, weight), direction)
        return *jax.grad(loss, (0, 1))(x, weight), *forward

    for found, expected in zip(jax.jit(lambda: of(loops))(), of(definition), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert float(jnp.abs(of(loops)[1]).max()) > 0.1


def test_the_bits_of_a_cache_in_bfloat16_have_no_derivative_but_its_queries_do():
    x, floats, bits = map(jnp.asarray, make("products", 2, 2, 24, 32, bfloat16=True))
    reach, place = jnp.array([24, 7]), jnp.int32(PLACE)

    def loss(x, weight):
        return jnp.sum(jnp.sin(products(x, reach, weight, place)))

    found, expected = (jax.grad(functools.partial(loss, weight=w))(x) for w in (bits, floats))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "k"), [(1, 64), (FEW_ROWS, 64), (FEW_ROWS + 1, 64), (2, 3)])
def test_any_number_of_rows_of_any_length(rows, k):
    """Those that the loops are not made for are left to XLA."""
    assert is_fit_for_floats(rows, k) == (rows <= FEW_ROWS and k > 3)
    random = np.random.default_rng(0)
    x, weight = (jnp.asarray(random.normal(size=(*n, k)), jnp.float32) for n in ((1, rows), (70,)))
    found = jax.jit(matmul_transposed, static_argnames="dtype")(x, weight, jnp.float32)
    np.testing.assert_allclose(found, x @ weight.T, rtol=1e-4, atol=1e-4)
