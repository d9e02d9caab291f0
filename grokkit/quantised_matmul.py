"""Products with 8-bit matrices: `x @ w` without the matrix of floats that `w` stands for.

`plain` says what is computed, and is what accelerators run: there the conversion fuses into the
product. On a CPU the loops of `grokkit.cpu` give the same. docs/performance.md explains why they
look as they do.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int, Int8

from grokkit import cpu
from grokkit.numerics import einsum32
from grokkit.quant import QuantizedArray, Slot, first_entry, n_first

_BLOCK = 2**21
"""Entries of the matrix that a gradient converts at a time: their floats fit in a cache of a few
megabytes, and the cost of starting a step is small beside them."""
_A_ROW_OR_TWO = 2
"""Up to this many rows an accelerator multiplies and adds straight from the stack; its products
would copy the matrix out of it first."""


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


def plain(x: Float[Array, "row k"], w: QuantizedArray | Slot, dtype: Any) -> Float[Array, "row n"]:
    """The definition: each group's product, times its scales, summed."""
    q = n_first(w.read() if isinstance(w, Slot) else w)
    k, n = q.shape
    x = x.reshape(-1, q.groups, k // q.groups)
    weight = q.weight.reshape(n, q.groups, k // q.groups)
    if x.shape[0] <= _A_ROW_OR_TWO:
        rows, entries = x.astype(dtype).astype(jnp.float32), weight.astype(jnp.float32)
        partial = jnp.stack([jnp.sum(entries * row, axis=-1).T for row in rows])
    else:
        partial = einsum32("tgk,ngk->tgn", x, weight, dtype)
    return jnp.sum(partial * q.scales.astype(jnp.float32), axis=1)


def on_cpu(x: Float[Array, "row k"], w: QuantizedArray | Slot, dtype: Any) -> Float[Array, "row n"]:
    """The same as `plain`, in loops of our own. Differentiable in `x`."""
    if not cpu.is_there():
        return plain(x, w, dtype)
    flat, how = _flat(w, dtype)
    return _product(varying(x, w), flat, how)


def grouped_on_cpu(
    x: Float[Array, "row k"], counts: Int[Array, " matrix"], w: QuantizedArray | Slot, dtype: Any
) -> Float[Array, "row n"]:
    """Each row times its own matrix, in loops of our own. Not differentiable.

    **Arguments:**

    - `x`: rows, sorted by the matrix that they meet.
    - `counts`: how many of them meet each matrix.
    - `w`: the matrices, stacked.
    - `dtype`: as for `matmul`.
    """
    flat, how = _flat(w, dtype)
    return _products(varying(x, w), counts, flat, how)


class _Flat(NamedTuple):
    """A stack of matrices as one: each matrix, unless it is a file's bytes, and its groups' scales, in
    consecutive rows."""

    weight: Int8[Array, "matrix_n k"] | Int8[Array, " bytes"]
    scales: BFloat16[Array, "matrix_g n"]
    place: Int[Array, ""]
    """Of a matrix in the stack; of several, the first one's."""
    first: tuple[Int[Array, ""], Int[Array, ""]]
    """Row and column, as they lie, of a matrix's first entry that is used."""


class _How(NamedTuple):
    """What is known of a product before it is computed."""

    dtype: Any
    k: int
    groups: int
    strides: cpu.Strides
    before: int
    """Bytes before the first matrix."""


def _flat(w: QuantizedArray | Slot, dtype: Any) -> tuple[_Flat, _How]:
    """The stack that a matrix is in, and its place there."""
    stack, at = (w.stack, w.at) if isinstance(w, Slot) else (w, ())
    (*lead, k, n), place, stored = stack.shape, jnp.int32(0), stack.stored
    for axis, size in enumerate(lead):
        place = place * size + (at[axis] if axis < len(at) else 0)
    scales, zero = stack.scales.reshape(-1, n), jnp.int32(0)
    if stored:
        rows, row = stored.rows
        strides, before = cpu.Strides(stored.k_first, row, rows * row), stored.before
        weight, first = stack.weight, tuple(jnp.int32(i) for i in first_entry(stack))
    else:
        strides, before = cpu.Strides(False, k, n * k), 0
        weight, first = stack.weight.reshape(-1, k), (zero, zero)
    how = _How(jnp.dtype(dtype), k, stack.groups, strides, before)
    return _Flat(weight, scales, place, first), how


def _products(x: Array, counts: Array, flat: _Flat, how: _How) -> Array:
    row, column = flat.first
    before = how.before + row * how.strides.row + column
    stack = flat.weight, flat.scales, how.groups, flat.place
    return cpu.grouped_product(x, counts, *stack, how.dtype, how.strides, before)


def varying(x: Array, w: QuantizedArray | Slot) -> Array:
    """`x`, of the type that shard_map wants of what is used with a matrix.

    Where the matrix differs between devices, and so its scales do, so does the gradient of what it
    multiplies.
    """
    scales = (w.stack if isinstance(w, Slot) else w).scales
    # Of whole numbers XLA knows that this is 0, so that nothing is added.
    first = jax.lax.bitcast_convert_type(scales[(0,) * scales.ndim], jnp.uint16)
    return x + (0 * first).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: Array, flat: _Flat, how: _How) -> Array:
    return _products(x, jnp.array([x.shape[0]]), flat, how)


def _forward(x: Array, flat: _Flat, how: _How) -> Any:
    return _product(x, flat, how), flat


def _backward(how: _How, flat: _Flat, dy: Float[Array, "row n"]) -> Any:
    """The gradient of `x`, in float32; the weights have none."""
    n = flat.scales.shape[1]
    start = flat.place * how.groups, jnp.int32(0)
    scaled = jax.lax.dynamic_slice(flat.scales, start, (how.groups, n))
    scaled = dy * scaled.astype(jnp.float32)[:, None]
    through = _through_entries if how.strides.k_first else _through_outputs
    dx = through(scaled, flat, how)
    return jnp.moveaxis(dx, 0, 1).reshape(dy.shape[0], -1), None


def _block(
    flat: _Flat, how: _How, row: Any, column: Any, shape: tuple[int, int]
) -> Float[Array, "row column"]:
    """Some of a matrix's rows, as they lie, as floats."""
    weight, strides = flat.weight, how.strides
    if weight.ndim == 1:
        row, column = flat.first[0] + row, flat.first[1] + column
        # Whole rows: of the bytes after the last part of a row there may be too few.
        start = how.before + flat.place * strides.matrix + row * strides.row
        size = shape[0] * strides.row
        weight = jax.lax.dynamic_slice(weight, (start,), (size,)).reshape(-1, strides.row)
        row = jnp.int32(0)
    else:
        row = flat.place * (strides.matrix // strides.row) + row
    return jax.lax.dynamic_slice(weight, (row, column), shape).astype(jnp.float32)


def _through_outputs(
    scaled: Float[Array, "group row n"], flat: _Flat, how: _How
) -> Float[Array, "group row entry"]:
    """The gradient of each group's entries, some outputs at a time."""
    groups, rows, n = scaled.shape
    k = how.k // groups
    size = block_rows(n, k)

    def one(_, group):
        def add(total, row):
            block = _block(flat, how, row, group * k, (size, k))
            part = jax.lax.dynamic_slice(scaled, (group, 0, row), (1, rows, size))[0]
            product = jnp.dot(part, block, precision=jax.lax.Precision.HIGHEST)
            return total + product, None

        # Zeros that vary over the devices as the sums will.
        zeros = jnp.zeros((rows, k)) + 0 * scaled[0, :, :1]
        return None, jax.lax.scan(add, zeros, jnp.arange(0, n, size, dtype=jnp.int32))[0]

    return jax.lax.scan(one, None, jnp.arange(groups, dtype=jnp.int32))[1]


def _through_entries(
    scaled: Float[Array, "group row n"], flat: _Flat, how: _How
) -> Float[Array, "group row entry"]:
    """The same of a matrix that lies as [k, n], some entries at a time."""
    groups, rows, n = scaled.shape
    k = how.k // groups
    size = block_rows(k, n)

    def one(_, i):
        block = _block(flat, how, i * size, jnp.int32(0), (size, n))
        part = scaled[i * size // k]
        return None, jnp.dot(part, block.T, precision=jax.lax.Precision.HIGHEST)

    steps = jnp.arange(how.k // size, dtype=jnp.int32)
    dx = jax.lax.scan(one, None, steps)[1].reshape(groups, k // size, rows, size)
    return jnp.moveaxis(dx, 2, 1).reshape(groups, rows, k)


_product.defvjp(_forward, _backward)


def block_rows(n: int, k: int) -> int:
    """How many of a matrix's n rows of k entries to take at a time: a divisor of n."""
    pieces = min(math.ceil(n * k / _BLOCK), n)
    while n % pieces:
        pieces += 1
    return n // pieces
