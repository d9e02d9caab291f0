"""8-bit weights: int8 values with a bfloat16 scale for each group and output column.

The groups cut the contracting axis K in equal, consecutive parts: the weight of row k and
column n is `weight[k, n] * scales[k // (K / G), n]`. This is the official checkpoint's form.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int8

from grokkit.errors import GrokkitError
from grokkit.numerics import einsum32
from grokkit.sharding import Declaration


class QuantizedArray(eqx.Module):
    """A matrix (or a stack of them) held as int8 values and grouped scales.

    In a tree of declarations both leaves are `ParamSpec`s.
    """

    weight: Int8[Array, "*lead k n"] | Declaration
    scales: BFloat16[Array, "*lead g n"] | Declaration

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix, leading axes first."""
        return self.weight.shape

    @property
    def groups(self) -> int:
        """Number of scale groups G along the contracting axis."""
        return self.scales.shape[-2]


def quantize(w: Float[Array, "*lead k n"], groups: int = 1) -> QuantizedArray:
    """Round a matrix to 8 bits, each group and column scaled by its own largest entry.

    **Arguments:**

    - `w`: the matrix, contracting axis K last but one.
    - `groups`: number of groups G along K; divides K.

    **Returns:** the nearest int8 multiples of `scale = bfloat16(max |w| / 127)`. The error of an
    entry is at most half its scale, plus what bfloat16 rounds off the scale for entries near the
    maximum.

    **Raises:** `GrokkitError` if `groups` does not divide K.
    """
    *lead, k, n = w.shape
    if groups < 1 or k % groups:
        raise GrokkitError(f"groups must divide the contracting axis of {k}, found {groups}")
    grouped = w.astype(jnp.float32).reshape(*lead, groups, k // groups, n)
    largest = jnp.max(jnp.abs(grouped), axis=-2)
    scales = (largest / 127).astype(jnp.bfloat16)
    divisor = jnp.where(scales == 0, 1, scales.astype(jnp.float32))[..., None, :]
    rounded = jnp.clip(jnp.round(grouped / divisor), -127, 127).astype(jnp.int8)
    return QuantizedArray(rounded.reshape(w.shape), scales)


def dequantize(q: QuantizedArray, dtype: jnp.dtype = jnp.float32) -> Float[Array, "*lead k n"]:
    """The matrix that `q` stands for, whole. For tests and analyses; the model never makes it."""
    *lead, k, n = q.weight.shape
    grouped = q.weight.astype(jnp.float32).reshape(*lead, q.groups, k // q.groups, n)
    scaled = grouped * q.scales.astype(jnp.float32)[..., :, None, :]
    return scaled.reshape(q.weight.shape).astype(dtype)


def matmul(
    x: Float[Array, "*rows k"], w: QuantizedArray | Float[Array, "k n"], dtype: Any
) -> Float[Array, "*rows n"]:
    """`x @ w` with the scales applied to each group's partial result.

    Scaling the result instead of the matrix keeps the products in float32 and saves a second
    matrix of floats.

    **Arguments:**

    - `x`: rows to multiply.
    - `w`: an 8-bit matrix, or one of floats.
    - `dtype`: float32 or bfloat16, in which to multiply; see `einsum32`.

    **Returns:** the product in float32.
    """
    if not isinstance(w, QuantizedArray):
        return einsum32("...k,kn->...n", x, w, dtype)
    k, n = w.weight.shape
    groups = w.groups
    scales = w.scales.astype(jnp.float32)
    if groups == 1:
        product = einsum32("...k,kn->...n", x, w.weight, dtype)
        return product * scales[0]
    grouped = x.reshape(*x.shape[:-1], groups, k // groups)
    weight = w.weight.reshape(groups, k // groups, n)
    partial = einsum32("...gk,gkn->...gn", grouped, weight, dtype)
    return jnp.sum(partial * scales, axis=-2)


def index(q: QuantizedArray | Array, i: Array | int) -> QuantizedArray | Array:
    """Entry `i` of the leading axis of a stack of matrices."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), q)
