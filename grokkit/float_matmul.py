"""Products of few rows with matrices of floats, in loops of our own on a CPU.

XLA's copy a matrix out of the stack that it is in, and of 3 to 16 rows read it at a third of the
memory's speed. `products_by_definition` and `sums_by_definition` say what is computed; their
derivatives are those of the loops.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt16

from grokkit import cpu
from grokkit.numerics import einsum32, of_bits

_Stack = Float[Array, "*stack n k"] | UInt16[Array, "*stack n k"]


def matmul_transposed(
    x: Float[Array, "*rows k"], weight: Float[Array, "n k"], dtype: Any
) -> Float[Array, "*rows n"]:
    """`x @ weight.T`, in `dtype` or better and with a sum in float32; see `einsum32`."""
    *lead, k = x.shape
    n_rows = x.size // k

    def loops(x: Array, weight: Array) -> Array:
        rows = x.reshape(1, n_rows, k).astype(jnp.float32)
        reach = jnp.full(1, weight.shape[0])
        return products(rows, reach, weight, jnp.int32(0)).reshape(*lead, -1)

    def direct(x: Array, weight: Array) -> Array:
        return einsum32("...k,nk->...n", x, weight, dtype)

    if weight.dtype != jnp.float32 or not cpu.is_fit_for_floats(n_rows, k):
        return direct(x, weight)
    return jax.lax.platform_dependent(x, weight, cpu=loops, default=direct)


def products_by_definition(
    x: Float[Array, "matrix row k"], reach: Int[Array, " matrix"], weight: _Stack, place: Array
) -> Float[Array, "matrix row n"]:
    """What `products` computes."""
    some = _some(weight, place, len(x))
    products = einsum32("mrk,mnk->mrn", x, some, jnp.float32)
    return jnp.where(jnp.arange(some.shape[1]) < reach[:, None, None], products, 0)


def sums_by_definition(
    x: Float[Array, "matrix row n"], reach: Int[Array, " matrix"], weight: _Stack, place: Array
) -> Float[Array, "matrix row k"]:
    """What `sums` computes."""
    some = _some(weight, place, len(x))
    x = jnp.where(jnp.arange(some.shape[1]) < reach[:, None, None], x, 0)
    return einsum32("mrn,mnk->mrk", x, some, jnp.float32)


def _some(weight: _Stack, place: Array, n: int) -> Float[Array, "matrix n k"]:
    stack = weight.reshape(-1, *weight.shape[-2:])
    return of_bits(jax.lax.dynamic_slice_in_dim(stack, place, n))


def _with_derivative(loops: Callable[..., Array], definition: Callable[..., Array]) -> Any:
    @jax.custom_jvp
    def computed(x: Array, reach: Array, weight: Array, place: Array) -> Array:
        return loops(x, reach, weight, place)

    @computed.defjvp
    def derivative(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
        return computed(*primals), jax.jvp(definition, primals, tangents)[1]

    return computed


products = _with_derivative(cpu.float_products, products_by_definition)
"""Of consecutive matrices of a stack; see `grokkit.cpu.float_products`. On a CPU only."""
sums = _with_derivative(cpu.float_sums, sums_by_definition)
"""The same of matrices that lie the other way round; see `grokkit.cpu.float_sums`."""
