"""The sorted forms of the experts against running each row's own."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference
from helpers import float64, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from grokkit.kernels.cpu import machine, product
from grokkit.layers.experts import expert_outputs, grouped, plain
from grokkit.quant import QuantizedArray

D_MODEL, D_FF, N_EXPERTS = 64, 128, 5
FLOAT32, BFLOAT16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)


def matrix(random, k, n, groups):
    weight = random.integers(-127, 128, (N_EXPERTS, n, k)).astype(np.int8)
    scales = random.uniform(0.5, 1.5, (N_EXPERTS, groups, n)) / 127
    return QuantizedArray(jnp.asarray(weight), jnp.asarray(scales.astype(ml_dtypes.bfloat16)))


@pytest.fixture(scope="module")
def matrices():
    random = np.random.default_rng(0)
    return (
        matrix(random, D_MODEL, D_FF, 1),
        matrix(random, D_MODEL, D_FF, 1),
        matrix(random, D_FF, D_MODEL, 4),
    )


FORMS = {
    "expert_outputs": expert_outputs,
    "plain": lambda x, chosen, g, v, o, dtype: plain(x, chosen, (g, v, o), dtype),
    "grouped": lambda x, chosen, g, v, o, dtype: grouped(product, x, chosen, (g, v, o), dtype),
}
JITTED = {name: jax.jit(form, static_argnums=5) for name, form in FORMS.items()}


@pytest.fixture(params=FORMS, scope="module")
def run(request):
    return JITTED[request.param]


def check(run, matrices, chosen, seed=0):
    x = np.random.default_rng(seed).normal(size=(len(chosen), D_MODEL)).astype(np.float32)
    found = run(jnp.asarray(x), jnp.asarray(chosen, jnp.int32), *matrices, FLOAT32)
    expected = reference.expert_outputs(
        x.astype(np.float64), np.asarray(chosen), *(float64(m) for m in matrices)
    )
    assert relative_error(found, expected) < 3e-6  # of float32, where terms may cancel


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from([(1, 1), (1, 2), (3, 2), (33, 2), (130, 3)]),
    skew=st.floats(0.05, 10),
)
@settings(max_examples=20, deadline=None)
def test_any_routing_gives_each_row_its_own_experts(run, seed, shape, skew, matrices):
    random = np.random.default_rng(seed)
    probs = random.dirichlet([skew] * N_EXPERTS) + 1e-9
    rows = [
        random.choice(N_EXPERTS, shape[1], replace=False, p=probs / probs.sum())
        for _ in range(shape[0])
    ]
    check(run, matrices, np.array(rows), seed)


@pytest.mark.parametrize("n_rows", [1, 2, 33, 700])
@pytest.mark.parametrize("expert", [0, N_EXPERTS - 1])
def test_all_rows_to_one_expert(run, n_rows, expert, matrices):
    check(run, matrices, np.full((n_rows, 1), expert))


@pytest.mark.parametrize("n_rows", [60, 61, 200])
@pytest.mark.parametrize("skew", [0.2, 5])
def test_many_rows_in_bfloat16_are_packed_by_expert(n_rows, skew, matrices):
    """As exact as rows and hidden units rounded to bfloat16 can be."""
    assert product.is_fit_for_packing(2 * n_rows, 64, 1, 5, BFLOAT16) == machine.target().has_pairs
    random = np.random.default_rng(n_rows)
    x = random.normal(size=(n_rows, D_MODEL)).astype(ml_dtypes.bfloat16).astype(np.float32)
    probs = random.dirichlet([skew] * N_EXPERTS)
    chosen = random.choice(N_EXPERTS, (n_rows, 2), p=probs)
    found = JITTED["grouped"](x, chosen.astype(np.int32), *matrices, BFLOAT16)
    expected = reference.expert_outputs(x.astype(np.float64), chosen, *map(float64, matrices))
    assert relative_error(found, expected) < 2**-8


def test_a_row_may_choose_one_expert_twice(run, matrices):
    check(run, matrices, np.array([[2, 2], [2, 0], [0, 0]]))


def test_choices_keep_their_order(run, matrices):
    x = jnp.ones((2, D_MODEL))
    one, other = (run(x, jnp.array(c), *matrices, FLOAT32) for c in ([[1, 3]] * 2, [[3, 1]] * 2))
    np.testing.assert_allclose(one, np.asarray(other)[:, ::-1], rtol=1e-6)
    assert not np.allclose(one[:, 0], one[:, 1])


@pytest.mark.parametrize("form", ["expert_outputs", "plain"])
def test_float_matrices_do_as_well(form, matrices):
    run = JITTED[form]
    floats = tuple(jnp.asarray(float64(m), jnp.float32) for m in matrices)
    check(run, matrices, np.array([[0, 1], [4, 2]]))
    x, chosen = jnp.ones((2, D_MODEL)), jnp.array([[0, 1], [4, 2]])
    found = run(x, chosen, *floats, FLOAT32)
    assert relative_error(found, run(x, chosen, *matrices, FLOAT32)) < 1e-6


def test_an_expert_that_none_chose_is_not_read(run, matrices):
    """Its weights could be anything."""
    poisoned = tuple(QuantizedArray(m.weight, m.scales.at[3].set(jnp.nan)) for m in matrices)
    found = run(jnp.ones((4, D_MODEL)), jnp.array([[0, 1]] * 4), *poisoned, FLOAT32)
    assert np.isfinite(found).all()


def test_gradient_reaches_every_row(run, matrices):
    """Against finite differences of the definition."""
    random = np.random.default_rng(3)
    x, direction = random.normal(size=(2, 9, D_MODEL))
    chosen = random.integers(0, N_EXPERTS, (9, 2))
    weights = random.normal(size=(9, 2, D_MODEL))
    floats = [float64(m) for m in matrices]

    def expected(x):
        return np.sum(reference.expert_outputs(x, chosen, *floats) * weights)

    slope = (expected(x + 1e-5 * direction) - expected(x - 1e-5 * direction)) / 2e-5
    gradient = jax.grad(lambda x: jnp.sum(run(x, chosen, *matrices, FLOAT32) * weights))
    with jax.numpy_dtype_promotion("standard"):
        found = gradient(jnp.asarray(x, jnp.float32))
    assert np.sum(np.asarray(found) * direction) == pytest.approx(slope, rel=1e-4)
