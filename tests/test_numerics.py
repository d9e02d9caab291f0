import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from grokkit.numerics import einsum32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("b_dtype", [np.float32, ml_dtypes.bfloat16, np.int8])
def test_sums_in_float32_whatever_the_operands(dtype, b_dtype):
    random = np.random.default_rng(0)
    a = random.normal(size=(3, 4096)).astype(np.float32)
    b = (random.normal(size=(4096, 2)) * 50).astype(b_dtype)
    found = jax.jit(einsum32, static_argnums=(0, 3))(
        "ij,jk->ik", jnp.asarray(a), jnp.asarray(b), jnp.dtype(dtype)
    )
    assert found.dtype == jnp.float32
    expected = a.astype(np.float64) @ b.astype(np.float64)
    size = np.abs(a).astype(np.float64) @ np.abs(b.astype(np.float64))
    # Only a CPU leaves the operands of a bfloat16 product as they are.
    rounded = dtype == "bfloat16" and jax.default_backend() != "cpu"
    error = 2**-8 if rounded else 1e-6
    assert (np.abs(np.asarray(found) - expected) <= error * size).all()
