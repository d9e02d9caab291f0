import jax
import jax.numpy as jnp
import numpy as np
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from grokkit.layers.rotary import rotate

turn = jax.jit(rotate, static_argnums=2)


@given(st.integers(0, 2**32 - 1), st.integers(0, 8191), st.sampled_from([10000.0, 50.0]))
@settings(max_examples=25, deadline=None)
def test_is_the_definition_at_any_position(seed, start, base):
    random = np.random.default_rng(seed)
    x = random.normal(size=(2, 3, 4, 8)).astype(np.float32)
    positions = start + random.integers(0, 5, (2, 3)).astype(np.int32)
    found = turn(jnp.asarray(x), jnp.asarray(positions), base)
    expected = reference.rotate(x.astype(np.float64), positions, base)
    # A float32 angle of 8192 radians is known to 2**-11.
    np.testing.assert_allclose(found, expected, atol=6e-8 * (start + 5) * 5 + 1e-6)


def test_position_zero_is_left_alone():
    x = jax.random.normal(jax.random.key(0), (1, 2, 3, 8))
    np.testing.assert_array_equal(rotate(x, jnp.zeros((1, 2), jnp.int32), 10000.0), x)


def test_pairs_are_a_component_of_the_first_half_with_one_of_the_second():
    x = jnp.zeros((1, 1, 1, 8)).at[..., 1].set(1.0)
    found = np.asarray(rotate(x, jnp.full((1, 1), 3, jnp.int32), 10000.0))[0, 0, 0]
    angle = 3 / 10000 ** (2 / 8)
    expected = np.zeros(8)
    expected[[1, 5]] = np.cos(angle), np.sin(angle)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_products_depend_on_the_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))

    def score(query, key):
        at = [jnp.full((1, 1), p, jnp.int32) for p in (query, key)]
        return float(jnp.sum(rotate(q, at[0], 10000.0) * rotate(k, at[1], 10000.0)))

    np.testing.assert_allclose(score(907, 900), score(7, 0), rtol=1e-3)
    assert abs(score(8, 0) - score(7, 0)) > 1e-2
