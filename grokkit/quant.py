"""8-bit weights: int8 values with a bfloat16 scale for each group and output column.

The groups cut the contracting axis K in equal, consecutive parts: the matrix's entry in row k and
column n is `weight[n, k] * scales[k // (K / G), n]`. The values are held transposed, [n, k]: what
makes one output is contiguous, which is how products read a matrix fastest. The official
checkpoint holds [k, n]; its matrices are transposed while they are read and written.
"""

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, BFloat16, Float, Int, Int8, PyTree

from grokkit.errors import GrokkitError
from grokkit.sharding import Declaration, ParamSpec


class QuantizedArray(eqx.Module):
    """A matrix (or a stack of them) held as int8 values and grouped scales.

    In a tree of declarations both leaves are `ParamSpec`s.
    """

    weight: Int8[Array, "*lead n k"] | Declaration
    scales: BFloat16[Array, "*lead g n"] | Declaration

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix, leading axes first: `(*lead, k, n)`."""
        *lead, n, k = self.weight.shape
        return (*lead, k, n)

    @property
    def groups(self) -> int:
        """Number of scale groups G along the contracting axis."""
        return self.scales.shape[-2]


class Slot(eqx.Module):
    """One matrix of a stack (or a part of the stack), named but not read yet.

    Slicing a matrix out of a stack copies it; a product that knows the place reads its parts as it
    needs them.
    """

    stack: QuantizedArray
    at: tuple[Int[Array, ""], ...]
    """Place on the first leading axes of the stack."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix, or of the smaller stack, that is named."""
        return self.stack.shape[len(self.at) :]

    def read(self) -> QuantizedArray:
        """What is named, copied out."""

        def take(a: Array) -> Array:
            rest = a.shape[len(self.at) :]
            start = (*self.at, *(jnp.int32(0),) * len(rest))
            return jax.lax.dynamic_slice(a, start, (1,) * len(self.at) + rest).reshape(rest)

        return jax.tree.map(take, self.stack)


def index(
    stack: QuantizedArray | Slot | Array, i: Int[Array, ""] | int
) -> QuantizedArray | Slot | Array:
    """Entry `i` of the leading axis of a stack of matrices; of 8-bit ones, its `Slot`."""
    if isinstance(stack, QuantizedArray):
        return Slot(stack, (jnp.asarray(i, jnp.int32),))
    if isinstance(stack, Slot):
        return Slot(stack.stack, (*stack.at, jnp.asarray(i, jnp.int32)))
    return jax.lax.dynamic_index_in_dim(stack, i, keepdims=False)


def layout(w: QuantizedArray | Slot | Array, cut: Literal["k", "n"]) -> PyTree[P]:
    """Where a matrix's arrays lie when one of its axes is cut over the mesh's `model` axis.

    The scale groups are cut with the contracting axis k, so that each device has its own.
    """
    stack, at = (w.stack, w.at) if isinstance(w, Slot) else (w, ())
    lead = (None,) * (len(stack.shape) - 2)
    first, last = P(*lead, "model", None), P(*lead, None, "model")
    if not isinstance(stack, QuantizedArray):
        return first if cut == "k" else last
    scales = first if cut == "k" else last
    weight = last if cut == "k" else first
    return jax.tree.unflatten(jax.tree.structure(w), [weight, scales, *(P() for _ in at)])


def declare(
    shape: tuple[int, ...], axes: tuple[str, ...], groups: tuple[int, str] = (1, "group")
) -> QuantizedArray:
    """Declare a matrix, or a stack of them.

    **Arguments:**

    - `shape`, `axes`: of the matrix, `(*lead, k, n)`. Random weights have variance 1 / k.
    - `groups`: number of scale groups, and the logical axis along which they lie.
    """
    *lead, k, n = shape
    *lead_axes, k_axis, n_axis = axes
    return QuantizedArray(
        ParamSpec((*lead, n, k), jnp.int8, (*lead_axes, n_axis, k_axis), k**-0.5),
        ParamSpec((*lead, groups[0], n), jnp.bfloat16, (*lead_axes, groups[1], n_axis)),
    )


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
    return QuantizedArray(jnp.swapaxes(rounded.reshape(w.shape), -1, -2), scales)


def dequantize(q: QuantizedArray, dtype: jnp.dtype = jnp.float32) -> Float[Array, "*lead k n"]:
    """The matrix that `q` stands for, whole. For tests and analyses; the model never makes it."""
    *lead, k, n = q.shape
    weight = jnp.swapaxes(q.weight, -1, -2).astype(jnp.float32)
    grouped = weight.reshape(*lead, q.groups, k // q.groups, n)
    scaled = grouped * q.scales.astype(jnp.float32)[..., :, None, :]
    return scaled.reshape(q.shape).astype(dtype)
