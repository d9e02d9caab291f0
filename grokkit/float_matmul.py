"""Products of few rows with matrices of floats, by kernels on a CPU.

XLA's copy a matrix out of the stack that it is in, and read it for 3 to 16 rows at a third of the
memory's speed. `products_by_definition` and `sums_by_definition` say what is computed; their
derivatives are those of the kernels.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt16

from grokkit.kernels.cpu import kernels
from grokkit.numerics import einsum32, of_bits

_Stack = Float[Array, "*stack n k"] | UInt16[Array, "*stack n k"]


def matmul_transposed(
    x: Float[Array, "*rows k"], weight: Float[Array, "n k"], dtype: Any
) -> Float[Array, "*rows n"]:
    """`x @ weight.T`, in `dtype` or better and with a sum in float32; see `einsum32`."""
    (n, k), rows = weight.shape, x.size // x.shape[-1]
    fast = kernels(n * k)
    if weight.dtype != jnp.float32 or fast is None or not fast.is_fit_for_products(rows, n, k):
        return einsum32("...k,nk->...n", x, weight, dtype)
    flat = x.reshape(1, rows, k).astype(jnp.float32)
    return products(flat, jnp.full(1, n), weight, jnp.int32(0)).reshape(*x.shape[:-1], n)


def products_by_definition(
    x: Float[Array, "matrix row k"], reach: Int[Array, " matrix"], weight: _Stack, place: Array
) -> Float[Array, "matrix row n"]:
    """What `products` computes."""
    some = _some(weight, place, len(x))
    found = einsum32("mrk,mnk->mrn", x, some, jnp.float32)
    return jnp.where(jnp.arange(some.shape[1]) < reach[:, None, None], found, 0)


def sums_by_definition(
    x: Float[Array, "matrix row k"], reach: Int[Array, " matrix"], weight: _Stack, place: Array
) -> Float[Array, "matrix row n"]:
    """What `sums` computes."""
    some = _some(weight, place, len(x))
    x = jnp.where(jnp.arange(some.shape[1]) < reach[:, None, None], x, 0)
    return einsum32("mrk,mkn->mrn", x, some, jnp.float32)


def _some(weight: _Stack, place: Array, n: int) -> Float[Array, "matrix n k"]:
    stack = weight.reshape(-1, *weight.shape[-2:])
    return of_bits(jax.lax.dynamic_slice_in_dim(stack, place, n))


def _with_derivative(name: str, definition: Callable[..., Array]) -> Any:
    @jax.custom_jvp
    def computed(x: Array, reach: Array, weight: Array, place: Array) -> Array:
        from grokkit.kernels.cpu import product

        return getattr(product, name)(x, reach, weight, place)

    @computed.defjvp
    def derivative(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
        return computed(*primals), jax.jvp(definition, primals, tangents)[1]

    return computed


products = _with_derivative("float_products", products_by_definition)
"""Of consecutive matrices of a stack; see `grokkit.kernels.cpu.product.float_products`."""
sums = _with_derivative("float_sums", sums_by_definition)
"""The same of matrices [k, n]; see `grokkit.kernels.cpu.product.float_sums`."""
