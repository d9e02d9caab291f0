import jax.numpy as jnp
import numpy as np
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from grokkit.layers.router import route
from grokkit.taps import Tap


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 8]))
@settings(max_examples=25, deadline=None)
def test_is_the_definition(seed, n_chosen):
    random = np.random.default_rng(seed)
    x = random.normal(size=(2, 5, 16)).astype(np.float32)
    router = random.normal(size=(16, 8)).astype(np.float32)
    found = route(jnp.asarray(x), jnp.asarray(router), n_chosen, Tap())
    _, _, indices, weights = reference.route(
        x.astype(np.float64), router.astype(np.float64), n_chosen
    )
    np.testing.assert_array_equal(found.experts, indices)
    np.testing.assert_allclose(found.weights, weights, rtol=1e-4)


def test_weights_are_not_renormalised():
    x = np.zeros((1, 1, 4), np.float32)
    found = route(jnp.asarray(x), jnp.ones((4, 8)), 2, Tap())
    np.testing.assert_allclose(found.weights, 1 / 8)  # of eight equals; they do not sum to one


def test_of_equally_probable_experts_the_first_come_first():
    found = route(jnp.zeros((1, 1, 4)), jnp.ones((4, 8)), 3, Tap())
    assert found.experts.tolist() == [[[0, 1, 2]]]


def test_large_logits_do_not_overflow():
    router = jnp.zeros((1, 3)).at[0].set(jnp.array([300.0, 200.0, -300.0]))
    found = route(jnp.ones((1, 1, 1)), router, 2, Tap())
    assert found.experts.tolist() == [[[0, 1]]]
    np.testing.assert_allclose(found.weights, [[[1, 0]]], atol=1e-30)
