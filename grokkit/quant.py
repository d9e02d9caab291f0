"""8-bit weights: int8 values with a bfloat16 scale for each group and output column.

The groups cut the contracting axis K in equal, consecutive parts: the matrix's entry in row k and
column n is `weight[n, k] * scales[k // (K / G), n]`. The values are held transposed, [n, k]: what
makes one output lies together, which is how products read a matrix fastest. The official
checkpoint holds [k, n]; reading and writing it turn the matrices round, except where a matrix is
used as it lies in its file (`Stored`).
"""

from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, BFloat16, Float, Int, Int8, PyTree

from grokkit.errors import GrokkitError
from grokkit.sharding import Declaration, ParamSpec


class Stored(NamedTuple):
    """How a stack of matrices lies in the bytes of a file.

    Where the matrices are cut over a mesh, each device has all the bytes, and uses those of its part.
    """

    shape: tuple[int, ...]
    """`(*lead, k, n)`, of whole matrices."""
    groups: int
    """Scale groups of a whole matrix."""
    k_first: bool
    """Whether they lie as [k, n], as in the official layout, and not as [n, k]."""
    before: int
    """Bytes before the first entry."""

    @property
    def rows(self) -> tuple[int, int]:
        """How many rows a matrix has as it lies, and of how many entries."""
        k, n = self.shape[-2:]
        return (k, n) if self.k_first else (n, k)


class QuantizedArray(eqx.Module):
    """A matrix (or a stack of them) held as int8 values and grouped scales.

    In a tree of declarations both leaves are `ParamSpec`s.
    """

    weight: Int8[Array, "*lead n k"] | Int8[Array, " bytes"] | Declaration
    scales: BFloat16[Array, "*lead g n"] | Declaration
    stored: Stored | None = eqx.field(static=True, default=None)
    """If the weights are a file's bytes, how they lie there."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix, leading axes first: `(*lead, k, n)`."""
        if self.stored:  # of which a device's part has its own scales
            *lead, k, _ = self.stored.shape
            return (*lead, k // self.stored.groups * self.groups, self.scales.shape[-1])
        *lead, n, k = self.weight.shape
        return (*lead, k, n)

    @property
    def groups(self) -> int:
        """Number of scale groups G along the contracting axis."""
        return self.scales.shape[-2]


def as_stored(q: QuantizedArray, weight: Any, stored: Stored) -> QuantizedArray:
    """The same, whatever its leaves are, with `weight` in place of its own."""
    none = ParamSpec((), jnp.int8, ())
    structure = jax.tree.structure(QuantizedArray(none, none, stored))
    return jax.tree.unflatten(structure, [weight, q.scales])


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

        return jax.tree.map(take, n_first(self.stack))


def n_first(q: QuantizedArray) -> QuantizedArray:
    """The same, with the values as `[*lead, n, k]` if they are a file's bytes."""
    if not q.stored:
        return q
    (*lead, k, n), k_first = q.shape, q.stored.k_first
    weight = q.weight[q.stored.before :].reshape(*lead, *q.stored.rows)
    start, size = (*(0 for _ in lead), *first_entry(q)), (k, n) if k_first else (n, k)
    weight = jax.lax.dynamic_slice(weight, start, (*lead, *size))
    return QuantizedArray(jnp.swapaxes(weight, -1, -2) if k_first else weight, q.scales)


def first_entry(q: QuantizedArray) -> tuple[Int[Array, ""] | int, Int[Array, ""] | int]:
    """Of matrices that are a file's bytes, the row and column, as they lie, where this device's part
    begins; under `shard_map` over the axis `model`, if they are cut."""
    assert q.stored
    along_k, along_n = (
        0 if part == whole else part * jax.lax.axis_index("model")
        for part, whole in zip(q.shape[-2:], q.stored.shape[-2:], strict=True)
    )
    return (along_k, along_n) if q.stored.k_first else (along_n, along_k)


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
    if stack.stored:  # each device has all the bytes
        weight = P(None)
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
    weight = jnp.swapaxes(n_first(q).weight, -1, -2).astype(jnp.float32)
    grouped = weight.reshape(*lead, q.groups, k // q.groups, n)
    scaled = grouped * q.scales.astype(jnp.float32)[..., :, None, :]
    return scaled.reshape(q.shape).astype(dtype)
