"""Rotary position embeddings (Su et al., arXiv 2104.09864), on split halves."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotate(
    x: Float[Array, "batch position head d_head"],
    positions: Int[Array, "batch position"],
    base: float,
) -> Float[Array, "batch position head d_head"]:
    """Turn component i of a vector's first half against component i of its second half.

    **Arguments:**

    - `x`: queries or keys.
    - `positions`: absolute position of each, in tokens.
    - `base`: pair i turns by `position * base**(-2 i / d_head)` radians.

    **Returns:** the turned vectors.
    """
    half = x.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
