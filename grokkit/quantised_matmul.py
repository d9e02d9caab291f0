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
from grokkit.quant import QuantizedArray, Slot, n_first

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
    flat, place = _flat(w)
    return _product(_varying(x, flat), flat, place, jnp.dtype(dtype), _before(w))


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
    flat, place = _flat(w)
    return cpu.grouped_product(_varying(x, flat), counts, *flat, place, dtype, _before(w))


class _Flat(NamedTuple):
    """A stack of matrices as one: each matrix, and its groups' scales, in consecutive rows."""

    weight: Int8[Array, "matrix_n k"] | Int8[Array, " bytes"]
    scales: BFloat16[Array, "matrix_g n"]


def _flat(w: QuantizedArray | Slot) -> tuple[_Flat, Int[Array, ""]]:
    """The stack that a matrix is in, and its place there; of several matrices, the first one's."""
    stack, at = _stack(w), w.at if isinstance(w, Slot) else ()
    (*lead, _, n), place = stack.shape, jnp.int32(0)
    for axis, size in enumerate(lead):
        place = place * size + (at[axis] if axis < len(at) else 0)
    weight = stack.weight if stack.stored else stack.weight.reshape(-1, stack.weight.shape[-1])
    return _Flat(weight, stack.scales.reshape(-1, n)), place


def _stack(w: QuantizedArray | Slot) -> QuantizedArray:
    return w.stack if isinstance(w, Slot) else w


def _before(w: QuantizedArray | Slot) -> int | None:
    """If the weights are a file's bytes, how many are before them."""
    stored = _stack(w).stored
    return stored.before if stored else None


def _varying(x: Array, flat: _Flat) -> Array:
    """`x`, of the type that shard_map wants of what is used with the weights.

    Where the matrix differs between devices, so does the gradient of what it multiplies.
    """
    # Of whole numbers XLA knows that this is 0, so that nothing is added.
    return x + (0 * flat.weight[(0,) * flat.weight.ndim]).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _product(x: Array, flat: _Flat, place: Array, dtype: Any, before: int | None) -> Array:
    return cpu.grouped_product(x, jnp.array([x.shape[0]]), *flat, place, dtype, before)


def _forward(x: Array, flat: _Flat, place: Array, dtype: Any, before: int | None) -> Any:
    return _product(x, flat, place, dtype, before), (flat, place, x.shape[1])


def _backward(dtype: Any, before: int | None, residuals: Any, dy: Float[Array, "row n"]) -> Any:
    """The gradient of `x`, in float32; the weights have none."""
    (weight, scales), place, k = residuals
    n = scales.shape[1]
    groups = scales.shape[0] // (weight.size // (n * k))
    size = k // groups
    scaled = jax.lax.dynamic_slice(scales, (place * groups, jnp.int32(0)), (groups, n))
    scaled = dy * scaled.astype(jnp.float32)[:, None]
    if before is None:
        dx = _through_outputs(scaled, weight, place, size)
    else:
        dx = _through_entries(scaled, weight, before, place, size)
    return jnp.moveaxis(dx, 0, 1).reshape(dy.shape[0], -1), None, None


def _through_outputs(
    scaled: Float[Array, "group row n"], weight: Int8[Array, "matrix_n k"], place: Any, k: int
) -> Float[Array, "group row entry"]:
    """The gradient of each group's entries, `k` of them, some outputs at a time."""
    groups, rows, n = scaled.shape
    size = block_rows(n, k)

    def one(_, group):
        def add(total, row):
            block = jax.lax.dynamic_slice(weight, (place * n + row, group * k), (size, k))
            part = jax.lax.dynamic_slice(scaled, (group, 0, row), (1, rows, size))[0]
            product = jnp.dot(part, block.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
            return total + product, None

        # Zeros that vary over the devices as the sums will.
        zeros = 0 * jnp.dot(scaled[0, :, :1], weight[:1, :k].astype(jnp.float32))
        return None, jax.lax.scan(add, zeros, jnp.arange(0, n, size, dtype=jnp.int32))[0]

    return jax.lax.scan(one, None, jnp.arange(groups, dtype=jnp.int32))[1]


def _through_entries(
    scaled: Float[Array, "group row n"],
    weight: Int8[Array, " bytes"],
    before: int,
    place: Any,
    k: int,
) -> Float[Array, "group row entry"]:
    """The same of a matrix that lies as [k, n], some entries at a time."""
    groups, rows, n = scaled.shape
    size = block_rows(k, n)

    def one(_, i):
        start = before + (place * groups * k + i * size) * n
        block = jax.lax.dynamic_slice(weight, (start,), (size * n,)).reshape(size, n)
        product = jnp.dot(
            scaled[i * size // k], block.T.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )  # fmt: skip
        return None, product

    steps = jnp.arange(groups * k // size, dtype=jnp.int32)
    dx = jax.lax.scan(one, None, steps)[1].reshape(groups, k // size, rows, size)
    return jnp.moveaxis(dx, 2, 1).reshape(groups, rows, k)


_product.defvjp(_forward, _backward)


def block_rows(n: int, k: int) -> int:
    """How many of a matrix's n rows of k entries to take at a time: a divisor of n."""
    pieces = min(math.ceil(n * k / _BLOCK), n)
    while n % pieces:
        pieces += 1
    return n // pieces
