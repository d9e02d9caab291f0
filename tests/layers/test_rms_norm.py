import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from grokkit.layers.rms_norm import RMSNorm


@given(st.integers(0, 2**32 - 1), st.floats(-18, 18), st.sampled_from([1e-5, 0.1]))
@settings(max_examples=25, deadline=None)
def test_is_the_definition(seed, exponent, eps):
    random = np.random.default_rng(seed)
    x = (random.normal(size=(2, 3, 16)) * 10**exponent).astype(np.float32)
    scale = random.normal(size=16).astype(np.float32)
    found = RMSNorm(jnp.asarray(scale), eps)(jnp.asarray(x))
    np.testing.assert_allclose(
        found, reference.rms_norm(x.astype(np.float64), scale, eps), rtol=2e-6, atol=1e-30
    )


def test_row_of_zeros_stays_zeros():
    assert (np.asarray(RMSNorm(jnp.ones(4), 1e-5)(jnp.zeros((2, 4)))) == 0).all()


def test_bfloat16_rows_are_normalised_in_float32():
    x = jnp.linspace(-3, 5, 64).astype(jnp.bfloat16)[None]
    found = RMSNorm(jnp.full(64, 1.7), 1e-5)(x)
    assert found.dtype == jnp.float32
    expected = reference.rms_norm(np.asarray(x, np.float64), 1.7, 1e-5)
    np.testing.assert_allclose(found, expected, rtol=2e-6)


def test_the_mean_is_not_taken_away():
    found = RMSNorm(jnp.ones(8), 0.0)(jnp.full((1, 8), 5.0))
    assert np.asarray(found) == pytest.approx(1)
