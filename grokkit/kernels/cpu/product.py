"""The kernels, for use in JAX's programs. Under `shard_map` a call's arrays must be of one type."""

import os
import threading
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int, Int8, UInt16, UInt32

from grokkit.kernels.cpu import gemm, handler, machine, skinny, sums

BLOCK = gemm.ROWS
"""Rows of a block of packed rows."""
_FEW_FLOAT_ROWS = 16
_MANY_ROWS = 24
"""Rows of a matrix from which they are packed, though part of a block may be empty."""
_A_THREAD = 2**18
"""Entries of the matrix that are worth waking one thread more for."""
_ONE_AT_A_TIME = threading.Lock()

_Floats = Float[Array, "*stack rows columns"] | UInt16[Array, "*stack rows columns"]
"""Matrices of float32, or of the bits of bfloat16."""


def is_fit(n: int, k: int, groups: int) -> bool:
    """Whether there is a kernel for 8-bit matrices [n, k] with so many groups of scales."""
    return n >= skinny.OUTPUTS and k // groups % machine.target().lanes == 0


def is_fit_for_packing(rows: int, k: int, groups: int, matrices: int, dtype: Any) -> bool:
    """Whether so many rows of some matrices that are fit gain by being packed, to be multiplied in
    `dtype`."""
    is_bfloat16 = jnp.dtype(dtype) == jnp.bfloat16 and machine.target().has_pairs
    return is_bfloat16 and rows >= _MANY_ROWS * matrices and k // groups % gemm.STEP == 0


def is_fit_for_products(rows: int, n: int, k: int) -> bool:
    """Whether there is a kernel for so many rows with matrices of floats [n, k]."""
    return rows <= _FEW_FLOAT_ROWS and n >= skinny.OUTPUTS and k % machine.target().lanes == 0


def is_fit_for_sums(rows: int, n: int) -> bool:
    """Whether there is a kernel for so many sums of the rows of matrices of floats [k, n]."""
    return rows <= _FEW_FLOAT_ROWS and n % (sums.VECTORS * machine.target().lanes) == 0


def product(
    x: Float[Array, "row k"] | UInt32[Array, "block pair lane"],
    starts: Int[Array, " start"],
    weight: Int8[Array, "*stack n k"],
    scales: BFloat16[Array, "*stack g n"],
    place: Int[Array, ""],
) -> Float[Array, "row n"]:
    """Each row times its matrix, of consecutive matrices of a stack, as `is_fit` wants.

    **Arguments:**

    - `x`: rows in float32, sorted by the matrix that they meet; or from `pack`, each block for one
        matrix.
    - `starts`: where the rows of each matrix begin, and the last ones' end; or the blocks. Of a
        matrix that no row meets nothing is read, and for blocks beyond the end nothing is written.
    - `weight`, `scales`: the stack, and its groups' scales.
    - `place`: where in the stack the first matrix is.

    **Returns:** the products, in float32.
    """
    is_packed = x.ndim == 3
    kind, k = (handler.GEMM, 2 * x.shape[1]) if is_packed else (handler.PRODUCT_INT8, x.shape[1])
    rows = x.shape[0] * (BLOCK if is_packed else 1)
    return _call(kind, x, rows, k, starts, weight, place, scales)


def pack(x: Float[Array, "row k"]) -> UInt32[Array, "block pair lane"]:
    """Round rows to bfloat16 and lay the pairs of `BLOCK` of them side by side."""
    rows, k = x.shape
    pairs = x.astype(jnp.bfloat16).reshape(rows, k // 2, 2)
    bits = jax.lax.bitcast_convert_type(pairs, jnp.uint32)
    return jnp.swapaxes(bits.reshape(-1, BLOCK, k // 2), 1, 2)


def float_products(
    x: Float[Array, "matrix row k"], reach: Int[Array, " matrix"], weight: _Floats, place: Array
) -> Float[Array, "matrix row n"]:
    """Some rows times each of consecutive matrices [n, k] of a stack, as `is_fit_for_products` wants.

    **Arguments:**

    - `x`: each matrix's rows, in float32.
    - `reach`: how many of each matrix's outputs are wanted; the others are 0.
    - `weight`: the stack. It is best what was last written to: what XLA reshapes or slices it may
        copy.
    - `place`: where in the stack the first matrix is.
    """
    return _with_floats(handler.PRODUCT_FLOAT32, x, reach, weight, place, weight.shape[-2])


def float_sums(
    x: Float[Array, "matrix row k"], reach: Int[Array, " matrix"], weight: _Floats, place: Array
) -> Float[Array, "matrix row n"]:
    """The same with matrices [k, n], as `is_fit_for_sums` wants; `reach` is how many of a matrix's
    rows are added: those beyond are not read."""
    return _with_floats(handler.SUMS_FLOAT32, x, reach, weight, place, weight.shape[-1])


def _with_floats(kind: int, x: Array, reach: Array, weight: Array, place: Array, n: int) -> Array:
    matrices, rows, k = x.shape
    starts = rows * jnp.arange(matrices + 1, dtype=jnp.int32)
    kind += weight.dtype != jnp.float32
    flat, n_rows = x.reshape(-1, k), matrices * rows
    found = _call(kind, flat, n_rows, k, starts, weight, place, reach=reach, n=n)
    return found.reshape(matrices, rows, n)


def _call(
    kind: int, x: Array, rows: int, k: int, starts: Array, weight: Array, place: Array,
    scales: Array | None = None, reach: Array | None = None, n: int | None = None,
) -> Array:  # fmt: skip
    """Call a kernel with `x`, which stands for so many rows of k entries."""
    with _ONE_AT_A_TIME:  # two threads may compile programs at once
        machine.register()
    groups = 1 if scales is None else scales.shape[-2]
    n = weight.shape[-2] if n is None else n
    matrices = starts.shape[0] - 1
    reach = jnp.full(matrices, n) if reach is None else reach
    n_threads = _threads(rows, n * k)
    numbers = [kind, k, n, groups, place, n_threads, matrices, starts, reach]
    facts = jnp.concatenate([jnp.ravel(jnp.asarray(i, jnp.int32)) for i in numbers])
    bits = weight if scales is None else jax.lax.bitcast_convert_type(scales, jnp.uint16)
    x = varying(x, bits)
    zero = _zero_of(x)
    result = jax.typeof(jnp.broadcast_to(zero.astype(jnp.float32), (rows, n)))
    call = jax.ffi.ffi_call(handler.NAME, result, vmap_method="sequential")
    return call(facts + zero.astype(jnp.int32), x, weight, bits)


def varying(x: Array, like: Array) -> Array:
    """`x`, of the type that `shard_map` wants of what is used with an array that differs between
    devices: then so does the gradient of what it multiplies."""
    return x + _zero_of(like).astype(x.dtype)


def _zero_of(a: Array) -> UInt32[Array, ""]:
    """A zero that varies as an array does. Of whole numbers XLA knows that it is 0, so that nothing
    is added."""
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[a.dtype.itemsize]
    first = jax.lax.bitcast_convert_type(a[(0,) * a.ndim], width)
    return 0 * first.astype(jnp.uint32)


def _threads(rows: int, entries: int) -> int:
    """How many threads to cut a product over: the processor's, shared between devices."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else max(1, mesh.size // jax.process_count())
    return max(1, min(cores() // devices, entries * -(-rows // 4) // _A_THREAD))


def cores() -> int:
    """The processor's cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
