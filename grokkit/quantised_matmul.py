"""Products with 8-bit matrices: `x @ w` without the matrix of floats that `w` stands for.

`plain` says what is computed, and is what accelerators run: there the conversion fuses into the
product. On a CPU `blocked` gives the same, converting one block of the matrix at a time so that
its floats stay in the processor's cache; a few rows go to `few_rows`. docs/performance.md explains
why it looks as it does.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int8, Num

from grokkit import few_rows
from grokkit.numerics import einsum32
from grokkit.quant import QuantizedArray, Slot

_BLOCK = 2**21
"""Entries of the matrix converted at a time: their floats fit in a cache of a few megabytes, and
the cost of starting a step is small beside them."""
_SHORT_GROUP = 256
"""Groups with fewer entries than this would make products too small to be worth starting."""
_A_ROW_OR_TWO = 2
"""Up to this many rows an accelerator multiplies and adds straight from the stack; its products
would copy the matrix out of it first."""
_AS_COLUMNS = 64
"""A number of rows whose products are twice as fast with the rows as columns."""


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
        cpu=lambda x, w: on_cpu(x, w, dtype),
        default=lambda x, w: plain(x, w, dtype),
    )
    return y.reshape(*x.shape[:-1], y.shape[-1])


def columns(
    x: Float[Array, "k row"], w: QuantizedArray | Slot | Float[Array, "k n"], dtype: Any
) -> Float[Array, "n row"]:
    """`(x.T @ w).T` on a CPU, for rows that lie as columns; see `as_columns`."""
    if not isinstance(w, QuantizedArray | Slot):
        return einsum32("kt,kn->nt", x, w, dtype)
    return blocked(x, w, dtype, k_axis=0)


def plain(x: Float[Array, "row k"], w: QuantizedArray | Slot, dtype: Any) -> Float[Array, "row n"]:
    """The definition: each group's product, times its scales, summed."""
    q = w.read() if isinstance(w, Slot) else w
    k, n = q.shape
    x = x.reshape(-1, q.groups, k // q.groups)
    weight = q.weight.reshape(n, q.groups, k // q.groups)
    if x.shape[0] <= _A_ROW_OR_TWO:
        rows, entries = x.astype(dtype).astype(jnp.float32), weight.astype(jnp.float32)
        partial = jnp.stack([jnp.sum(entries * row, axis=-1).T for row in rows])
    else:
        partial = einsum32("tgk,ngk->tgn", x, weight, dtype)
    return jnp.sum(partial * q.scales.astype(jnp.float32), axis=1)


def as_columns(rows: int) -> bool:
    """Whether a CPU multiplies so many rows faster if they lie as columns."""
    return rows == _AS_COLUMNS


def on_cpu(x: Float[Array, "row k"], w: QuantizedArray | Slot, dtype: Any) -> Float[Array, "row n"]:
    """`blocked`, in the orientation that suits the number of rows."""
    if as_columns(x.shape[0]):
        return blocked(x.T, w, dtype, k_axis=0).T
    return blocked(x, w, dtype, k_axis=1)


def blocked(
    x: Float[Array, "_ _"], w: QuantizedArray | Slot, dtype: Any, k_axis: int
) -> Float[Array, "_ _"]:
    """The same as `plain` for a CPU, block by block, or in `few_rows`. Differentiable in `x`.

    **Arguments:**

    - `x`, `w`, `dtype`: as for `matmul`.
    - `k_axis`: which axis of `x` is the contracting one. The result takes its place: with 1 it is
        `x @ w`, with 0 `(x.T @ w).T`.
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
    return _blocked(x, flat, place, _How(n, stack.groups, k_axis, jnp.dtype(dtype)))


class _Flat(NamedTuple):
    """A stack of matrices as one: each matrix, and its groups' scales, in consecutive rows."""

    weight: Int8[Array, "matrix_n k"]
    scales: BFloat16[Array, "matrix_g n"]


class _How(NamedTuple):
    """What is known of a product when it is compiled."""

    n: int
    groups: int
    k_axis: int
    dtype: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _blocked(x: Array, flat: _Flat, place: Array, how: _How) -> Array:
    k, rows = x.shape[how.k_axis], x.shape[1 - how.k_axis]
    if how.k_axis == 1 and few_rows.takes(rows, k // how.groups):
        return few_rows.product(x, flat.weight, flat.scales, place)
    scales = _scales(flat, place, how)
    if 1 < how.groups and k // how.groups < _SHORT_GROUP:
        whole = how._replace(groups=1)
        return _join(_each_block(x, flat, place, whole, scales)[0], how.k_axis)
    partial = _each_block(x.astype(how.dtype), flat, place, how)
    scales = scales.reshape(how.groups, partial.shape[1], -1)
    scales = jnp.expand_dims(scales, 3 if how.k_axis == 0 else 2)
    # Added one by one, in one pass; a sum over the axis takes many times as long.
    total = partial[0] * scales[0]
    for group in range(1, how.groups):
        total = total + partial[group] * scales[group]
    return _join(total, how.k_axis)


def _each_block(
    x: Float[Array, "_ _"],
    flat: _Flat,
    place: Array,
    how: _How,
    scales: Float[Array, "g n"] | None = None,
) -> Float[Array, "group block _ _"]:
    """Each group's part of `x` times each block of the matrix, in the arithmetic that `x` is in.

    With `scales` every entry of a block is scaled before the product, for all groups at once.
    """
    k = x.shape[how.k_axis] // how.groups
    size = block_rows(how.n, k)

    def one(_, block):
        row, group = block
        weight = jax.lax.dynamic_slice(flat.weight, (place * how.n + row, group * k), (size, k))
        if scales is not None:
            scale = jax.lax.dynamic_slice_in_dim(scales, row, size, axis=1).T[:, :, None]
            parts = weight.astype(jnp.float32).reshape(size, scale.shape[1], -1)
            weight = (parts * scale).reshape(size, k)
        part = x
        if how.groups > 1:
            part = jax.lax.dynamic_slice_in_dim(x, group * k, k, how.k_axis)
        return None, _dot(part, weight, how.k_axis)

    rows = jnp.arange(0, how.n, size, dtype=jnp.int32)
    group, row = jnp.meshgrid(jnp.arange(how.groups, dtype=jnp.int32), rows, indexing="ij")
    products = jax.lax.scan(one, None, (row.reshape(-1), group.reshape(-1)))[1]
    return products.reshape(*group.shape, *products.shape[1:])


def _dot(x: Float[Array, "_ _"], weight: Num[Array, "n k"], k_axis: int) -> Float[Array, "_ _"]:
    """`x` times the transposed weight, which stays on the left where rows are columns."""
    weight = _floats(weight, x.dtype)
    left, right = (weight, x) if k_axis == 0 else (x, weight)
    return jax.lax.dot_general(
        left,
        right,
        (((1,), (k_axis,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _floats(weight: Num[Array, "n k"], dtype: Any) -> Float[Array, "n k"]:
    """The same numbers, which 8 bits of mantissa hold exactly, as floats."""
    if dtype != jnp.bfloat16:
        return weight.astype(dtype)
    # The upper half of the float32: XLA's own conversion rounds, which takes twice as long.
    bits = jax.lax.bitcast_convert_type(weight.astype(jnp.float32), jnp.uint32)
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def _join(blocks: Float[Array, "block _ _"], k_axis: int) -> Float[Array, "_ _"]:
    """The blocks' results side by side along the axis that was contracted."""
    if k_axis == 0:
        return blocks.reshape(-1, blocks.shape[2])
    return jnp.moveaxis(blocks, 0, 1).reshape(blocks.shape[1], -1)


def _forward(x: Array, flat: _Flat, place: Array, how: _How) -> Any:
    return _blocked(x, flat, place, how), (flat, place)


def _backward(how: _How, residuals: Any, dy: Float[Array, "_ _"]) -> Any:
    """The gradient of `x`, in float32; the weights have none."""
    flat, place = residuals
    dy = dy if how.k_axis == 1 else dy.T
    k = flat.weight.shape[1] // how.groups
    size = block_rows(how.n, k)
    scaled = dy * _scales(flat, place, how)[:, None]

    def one(_, group):
        def add(total, row):
            start = (place * how.n + row, group * k)
            weight = jax.lax.dynamic_slice(flat.weight, start, (size, k)).astype(jnp.float32)
            part = jax.lax.dynamic_slice(scaled, (group, 0, row), (1, dy.shape[0], size))[0]
            return total + jnp.dot(part, weight, precision=jax.lax.Precision.HIGHEST), None

        # Zeros that vary over the devices as the sums will.
        zeros = 0 * jnp.dot(scaled[0, :, :1], flat.weight[:1, :k].astype(jnp.float32))
        rows = jnp.arange(0, how.n, size, dtype=jnp.int32)
        return None, jax.lax.scan(add, zeros, rows)[0]

    dx = jax.lax.scan(one, None, jnp.arange(how.groups, dtype=jnp.int32))[1]
    dx = _join(dx, 1)
    return dx if how.k_axis == 1 else dx.T, None, None


_blocked.defvjp(_forward, _backward)


def _scales(flat: _Flat, place: Array, how: _How) -> Float[Array, "g n"]:
    start = (place * how.groups, jnp.int32(0))
    return jax.lax.dynamic_slice(flat.scales, start, (how.groups, how.n)).astype(jnp.float32)


def block_rows(n: int, k: int) -> int:
    """How many of a matrix's n rows of k entries to take at a time: a divisor of n."""
    pieces = min(math.ceil(n * k / _BLOCK), n)
    while n % pieces:
        pieces += 1
    return n // pieces
