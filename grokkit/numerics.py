"""Matrix products in a stated precision, summed in float32, on any platform."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def einsum32(spec: str, a: Array, b: Array, dtype: Any) -> Array:
    """`jnp.einsum(spec, a, b)` with the operands in `dtype` or better and a float32 sum.

    XLA's CPU backend has no bfloat16 product with a float32 sum for every shape, and widens
    bfloat16 operands where it has one. So on a CPU the operands are used as float32 throughout:
    that is as fast there, and nothing is rounded away. Elsewhere a float32 matrix is not rounded
    before the product either, which would write a copy of it: the hardware rounds what it reads,
    to bfloat16 or finer.

    **Arguments:**

    - `a`, `b`: the operands, of any dtypes.
    - `dtype`: float32 or bfloat16.
    """

    def widened(a: Array, b: Array) -> Array:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return jnp.einsum(spec, a, b, precision=jax.lax.Precision.HIGHEST)

    def direct(a: Array, b: Array) -> Array:
        if b.dtype == jnp.float32:
            return jnp.einsum(spec, a.astype(jnp.float32), b)
        a, b = a.astype(dtype), b.astype(dtype)
        return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)

    if jnp.dtype(dtype) == jnp.float32:
        return widened(a, b)
    return jax.lax.platform_dependent(a, b, cpu=widened, default=direct)


def of_bits(array: Array) -> Array:
    """Numbers in bfloat16 where an array holds their bits as integers; any other as it is."""
    if array.dtype != jnp.uint16:
        return array
    return jax.lax.bitcast_convert_type(array, jnp.bfloat16)
