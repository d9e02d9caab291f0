"""Products with 8-bit matrices: `x @ w` without the matrix of floats that `w` stands for.

`plain` says what is computed, and is what accelerators run: there the conversion fuses into the
product. On a CPU the kernels of `grokkit.kernels.cpu` give the same for matrices that gain by it.
docs/performance.md explains why they look as they do.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import linear_call
from jaxtyping import Array, BFloat16, Float, Int, Int8

from grokkit.kernels.cpu import kernels
from grokkit.numerics import einsum32
from grokkit.quant import QuantizedArray, Slot

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
    rows, fast = x.reshape(-1, x.shape[-1]), cpu_kernels(w)
    y = plain(rows, w, dtype) if fast is None else on_cpu(fast, rows, w, dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


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


class Stack(NamedTuple):
    """8-bit matrices, one after the other."""

    weight: Int8[Array, "matrix n k"]
    scales: BFloat16[Array, "matrix g n"]
    place: Int[Array, ""]
    """Of a matrix among them; of several, the first one's."""

    @property
    def k(self) -> int:
        """Entries of a matrix's contracting axis."""
        return self.weight.shape[2]

    @property
    def groups(self) -> int:
        """Groups of scales of a matrix."""
        return self.scales.shape[1]

    @staticmethod
    def of(w: QuantizedArray | Slot) -> "Stack":
        """The stack that a matrix, or some in a row, are in."""
        stack, at = (w.stack, w.at) if isinstance(w, Slot) else (w, ())
        place = jnp.int32(0)
        for axis, size in enumerate(stack.shape[:-2]):
            place = place * size + (at[axis] if axis < len(at) else 0)
        weight, scales = (a.reshape(-1, *a.shape[-2:]) for a in (stack.weight, stack.scales))
        return Stack(weight, scales, place)


def cpu_kernels(w: QuantizedArray | Slot) -> Any:
    """`grokkit.kernels.cpu.product`, if it has kernels for such matrices and they gain by it."""
    stack = w.stack if isinstance(w, Slot) else w
    k, n = stack.shape[-2:]
    fast = kernels(n * k)
    return fast if fast is not None and fast.is_fit(n, k, stack.groups) else None


def on_cpu(
    fast: Any, x: Float[Array, "row k"], w: QuantizedArray | Slot, dtype: Any
) -> Float[Array, "row n"]:
    """The same as `plain`, by `cpu_kernels`. Differentiable in `x`."""
    rows, stack = x.shape[0], Stack.of(w)
    is_packed = fast.is_fit_for_packing(rows, stack.k, stack.groups, 1, dtype)

    @jax.custom_jvp
    def multiply(x: Array, stack: Stack) -> Array:
        if not is_packed:
            return fast.product(x, jnp.array([0, rows]), *stack)
        blocks = -(-rows // fast.BLOCK)
        packed = fast.pack(jnp.pad(x, ((0, blocks * fast.BLOCK - rows), (0, 0))))
        return fast.product(packed, jnp.array([0, blocks]), *stack)[:rows]

    @multiply.defjvp
    def derivative(primals: Any, tangents: Any) -> tuple[Array, Array]:
        x, stack = primals
        forward = lambda stack, dx: multiply(dx, stack)
        return multiply(x, stack), linear_call(forward, transposed, stack, tangents[0])

    return multiply(fast.varying(x, stack.scales), stack)


def transposed(stack: Stack, dy: Float[Array, "row n"]) -> Float[Array, "row k"]:
    """`dy @ w.T`, the gradient of a product's rows, in float32: some outputs at a time."""
    _, n, k = stack.weight.shape
    groups, size = stack.groups, block_rows(n, k)

    def add(total: Array, first: Array) -> tuple[Array, None]:
        start = (stack.place, first, jnp.int32(0))
        block = jax.lax.dynamic_slice(stack.weight, start, (1, size, k))[0]
        start = (stack.place, jnp.int32(0), first)
        scales = jax.lax.dynamic_slice(stack.scales, start, (1, groups, size))[0]
        part = jax.lax.dynamic_slice_in_dim(dy, first, size, axis=1)
        scaled = part * scales.astype(jnp.float32)[:, None]
        block = block.astype(jnp.float32).reshape(size, groups, k // groups)
        return total + einsum32("gtn,ngk->tgk", scaled, block, jnp.float32), None

    # Zeros that vary over the devices as the sums will.
    vary = 0 * dy[:, :1] * stack.scales[0, 0, 0].astype(jnp.float32)
    zeros = jnp.zeros((dy.shape[0], groups, k // groups)) + vary[:, :, None]
    total = jax.lax.scan(add, zeros, jnp.arange(0, n, size, dtype=jnp.int32))[0]
    return total.reshape(dy.shape[0], k)


def block_rows(n: int, k: int) -> int:
    """How many of a matrix's n rows of k entries to take at a time: a divisor of n."""
    pieces = min(math.ceil(n * k / _BLOCK), n)
    while n % pieces:
        pieces += 1
    return n // pieces
