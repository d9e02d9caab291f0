"""Products with 8-bit matrices: `x @ w` without the matrix of floats that `w` stands for.

`plain` says what is computed, and is what accelerators run: there the conversion fuses into the
product. On a CPU `blocked` gives the same, converting one block of the matrix at a time so that
its floats stay in the processor's cache. docs/fast-products.md explains why it looks as it does.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int8, Num

from grokkit.numerics import einsum32
from grokkit.quant import QuantizedArray, Slot

_BLOCK = 2**21
"""Entries of the matrix converted at a time: their floats fit in a cache of a few megabytes, and
the cost of starting a step is small beside them."""
_FEW_ROWS = 4
"""Up to this many rows a product takes as long as reading the matrix, so that it pays to leave
the matrix in 8 bits; beyond, arithmetic counts."""


def matmul(
    x: Float[Array, "*rows k"], w: QuantizedArray | Slot | Float[Array, "k n"], dtype: Any
) -> Float[Array, "*rows n"]:
    """`x @ w`, with the scales applied to each group's partial result.

    **Arguments:**

    - `x`: rows to multiply.
    - `w`: an 8-bit matrix, one of a stack, or a matrix of floats.
    - `dtype`: float32 or bfloat16, in which to multiply; see `einsum32`.

    **Returns:** the product in float32.
    """
    if not isinstance(w, QuantizedArray | Slot):
        return einsum32("...k,kn->...n", x, w, dtype)
    rows = x.reshape(-1, x.shape[-1])
    y = jax.lax.platform_dependent(
        rows,
        w,
        cpu=lambda x, w: blocked(x.T, w, dtype).T,
        default=lambda x, w: plain(x, w, dtype),
    )
    return y.reshape(*x.shape[:-1], y.shape[-1])


def columns(
    x: Float[Array, "k row"], w: QuantizedArray | Slot | Float[Array, "k n"], dtype: Any
) -> Float[Array, "n row"]:
    """`(x.T @ w).T` on a CPU: rows lie as columns, as the fast products there want them."""
    if not isinstance(w, QuantizedArray | Slot):
        return einsum32("kt,kn->nt", x, w, dtype)
    return blocked(x, w, dtype)


def plain(x: Float[Array, "row k"], w: QuantizedArray | Slot, dtype: Any) -> Float[Array, "row n"]:
    """The definition: each group's product, times its scales, summed."""
    q = w.read() if isinstance(w, Slot) else w
    k, n = q.shape
    x = x.reshape(-1, q.groups, k // q.groups)
    weight = q.weight.reshape(n, q.groups, k // q.groups)
    partial = einsum32("tgk,ngk->tgn", x, weight, dtype)
    return jnp.sum(partial * q.scales.astype(jnp.float32), axis=1)


def blocked(
    x: Float[Array, "k row"], w: QuantizedArray | Slot, dtype: Any
) -> Float[Array, "n row"]:
    """The same for a CPU, with rows as columns: `(x.T @ w).T`, block by block.

    Differentiable in `x`.
    """
    stack, at = (w.stack, w.at) if isinstance(w, Slot) else (w, ())
    # The blocks of one matrix are consecutive rows of one long matrix: a plain copy to read.
    n, k = stack.weight.shape[-2:]
    flat = _Flat(stack.weight.reshape(-1, k), stack.scales.reshape(-1, n))
    place = jnp.int32(0)
    for i, size in zip(at, stack.weight.shape, strict=False):
        place = place * size + i
    # Where the matrix differs between devices, so does the gradient of what it multiplies: under
    # shard_map `x` must be of the type that says so.
    x = x + 0 * flat.weight[0, 0].astype(x.dtype)
    return _blocked(x, flat, place, (n, stack.groups), jnp.dtype(dtype))


class _Flat(NamedTuple):
    """A stack of matrices as one: each matrix, and its groups' scales, in consecutive rows."""

    weight: Int8[Array, "matrix_n k"]
    scales: BFloat16[Array, "matrix_g n"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _blocked(x: Array, flat: _Flat, place: Array, shape: Any, dtype: Any) -> Array:
    _, groups = shape
    scales = _scales(flat, place, groups)
    if x.shape[1] <= _FEW_ROWS and dtype != jnp.float32:
        high, low, unit = split_in_two(x, groups)
        columns = jnp.concatenate([high, low], axis=1)
        partial = _each_block(columns, flat, place, shape, jnp.int32).astype(jnp.float32)
        high, low = jnp.split(partial, 2, axis=2)
        partial = (high * 128 + low) * unit[:, None]
    else:
        partial = _each_block(x.astype(dtype), flat, place, shape, dtype)
    return jnp.sum(partial * scales[:, :, None], axis=0)


def _each_block(
    x: Num[Array, "k row"], flat: _Flat, place: Array, shape: tuple[int, int], dtype: Any
) -> Num[Array, "g n row"]:
    """Each group's product with its part of `x`, in whichever arithmetic `x` comes."""
    n, groups = shape
    k = x.shape[0] // groups
    size = block_rows(n, k)

    def one(_, block):
        row, group = block
        start = (place * n + row, group * k)
        weight = jax.lax.dynamic_slice(flat.weight, start, (size, k))
        part = jax.lax.dynamic_slice_in_dim(x, group * k, k) if groups > 1 else x
        return None, _dot(weight, part, dtype)

    group, row = jnp.meshgrid(jnp.arange(groups), jnp.arange(0, n, size), indexing="ij")
    blocks = (row.reshape(-1).astype(jnp.int32), group.reshape(-1).astype(jnp.int32))
    products = jax.lax.scan(one, None, blocks)[1]
    return products.reshape(groups, n, x.shape[1])


def _dot(weight: Int8[Array, "n k"], x: Num[Array, "k row"], dtype: Any) -> Array:
    if dtype == jnp.int32:
        return jnp.dot(weight, x, preferred_element_type=jnp.int32)
    return jnp.dot(
        weight.astype(dtype),
        x,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _forward(x: Array, flat: _Flat, place: Array, shape: Any, dtype: Any) -> Any:
    return _blocked(x, flat, place, shape, dtype), (flat, place)


def _backward(shape: Any, dtype: Any, residuals: Any, dy: Float[Array, "n row"]) -> Any:
    """The gradient of `x`, in float32; the weights have none."""
    del dtype
    flat, place = residuals
    n, groups = shape
    k = flat.weight.shape[1] // groups
    size = block_rows(n, k)
    scaled = dy * _scales(flat, place, groups)[:, :, None]

    def one(_, group):
        def add(total, row):
            start = (place * n + row, group * k)
            weight = jax.lax.dynamic_slice(flat.weight, start, (size, k)).astype(jnp.float32)
            part = jax.lax.dynamic_slice(scaled, (group, row, 0), (1, size, dy.shape[1]))[0]
            return total + jnp.dot(part.T, weight, precision=jax.lax.Precision.HIGHEST), None

        # Zeros that vary over the devices as the sums will.
        zeros = 0 * jnp.dot(scaled[0, :1].T, flat.weight[:1, :k].astype(jnp.float32))
        rows = jnp.arange(0, n, size, dtype=jnp.int32)
        return None, jax.lax.scan(add, zeros, rows)[0].T

    dx = jax.lax.scan(one, None, jnp.arange(groups, dtype=jnp.int32))[1]
    return dx.reshape(groups * k, dy.shape[1]), None, None


_blocked.defvjp(_forward, _backward)


def _scales(flat: _Flat, place: Array, groups: int) -> Float[Array, "g n"]:
    start = (place * groups, jnp.int32(0))
    return jax.lax.dynamic_slice(flat.scales, start, (groups, flat.scales.shape[1])).astype(
        jnp.float32
    )


def split_in_two(
    x: Float[Array, "k row"], groups: int
) -> tuple[Int8[Array, "k row"], Int8[Array, "k row"], Float[Array, "g row"]]:
    """Two 8-bit numbers for each entry: `x` is about `(128 * high + low) * unit`.

    To half of 1/16256 of the largest entry of its column and group: 15 bits, where bfloat16 has
    8 of each entry's own size.
    """
    k, rows = x.shape
    grouped = x.reshape(groups, k // groups, rows)
    unit = jnp.max(jnp.abs(grouped), axis=1) / (127 * 128)
    whole = jnp.round(grouped / jnp.where(unit == 0, 1, unit)[:, None])
    high = jnp.round(whole / 128)
    low = whole - 128 * high
    return high.reshape(k, rows).astype(jnp.int8), low.reshape(k, rows).astype(jnp.int8), unit


def block_rows(n: int, k: int) -> int:
    """How many of a matrix's n rows of k entries to take at a time: a divisor of n."""
    pieces = min(math.ceil(n * k / _BLOCK), n)
    while n % pieces:
        pieces += 1
    return n // pieces
