"""Products on a CPU, for use in JAX's programs: calls of loops of our own.

XLA's own products cannot read one matrix of a stack where it lies: they copy it first, and write
an 8-bit one's floats out before they multiply them.
"""

import os
import threading
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int, Int8, UInt16

from grokkit.cpu import few_rows, large_pages, many_rows, task, whole_numbers, xla
from grokkit.cpu.instructions import LANES

_ONE_AT_A_TIME = threading.Lock()
_A_THREAD = 2**18
"""Entries of the matrix that are worth sharing with one thread more."""


class Strides(NamedTuple):
    """How 8-bit matrices, or those parts of them that are used, lie in a stack, in bytes."""

    k_first: bool
    """Whether as [k, n], and not as [n, k]."""
    row: int
    """From one of a matrix's rows, as it lies, to the next."""
    matrix: int
    """From matrix to matrix."""


def is_there() -> bool:
    """Whether this system has threads of the kind that are started here."""
    return os.name == "posix"


def grouped_product(
    x: Float[Array, "row k"],
    counts: Int[Array, " matrix"],
    weight: Int8[Array, "matrix_n k"] | Int8[Array, " bytes"],
    scales: BFloat16[Array, "matrix_g n"],
    groups: int,
    place: Int[Array, ""],
    dtype: Any,
    strides: Strides,
    before: Int[Array, ""] | int = 0,
) -> Float[Array, "row n"]:
    """Each row times its matrix, of consecutive matrices of a stack.

    **Arguments:**

    - `x`: rows, in float32; the first `counts[0]` of them meet the first matrix, and so on.
    - `counts`: how many rows meet each matrix. Of a matrix that none meets nothing is read.
    - `weight`, `scales`: the stack, and its groups' scales, each matrix's in consecutive rows.
    - `groups`: how many groups of scales a matrix has.
    - `place`: where in the stack the first matrix is.
    - `dtype`: float32 or bfloat16, which rows are rounded to before they are multiplied, unless
        they are few or multiplied as whole numbers. Sums are in float32.
    - `strides`: how the matrices lie in it. With those that lie as [k, n] few rows' products are
        summed in another order.
    - `before`: bytes before the first matrix's first entry.

    Under `shard_map` all must be of one type.
    """
    (rows, k), n = x.shape, scales.shape[1]
    rounded = int(jnp.dtype(dtype) == jnp.bfloat16)
    whole = whole_numbers.is_fit(k, groups)
    how = groups, rounded, whole, strides.k_first, before, strides.row, strides.matrix
    numbers = place, _threads(rows, n * k), *how, counts
    bits = jax.lax.bitcast_convert_type(scales, jnp.uint16)
    most = _most_blocks(rows, counts.shape[0], whole, k // groups)
    if whole:
        packed = most, whole_numbers.block_words.py_func(k, groups)
    else:
        packed = most, LANES * (k // 2 if many_rows.is_paired.py_func(rounded, k, groups) else k)
    return _call(task.MULTIPLYING, numbers, x, weight, bits, results=((rows, n), packed))


def is_fit_for_floats(rows: int, k: int) -> bool:
    """Whether there are loops for so many rows of a matrix of floats, of k entries."""
    return is_there() and rows <= few_rows.FEW_ROWS and k >= LANES


def float_products(
    x: Float[Array, "matrix row k"],
    reach: Int[Array, " matrix"],
    weight: Float[Array, "*stack n k"] | UInt16[Array, "*stack n k"],
    place: Int[Array, ""],
) -> Float[Array, "matrix row n"]:
    """Some rows times each of consecutive matrices of a stack, summed in float32.

    **Arguments:**

    - `x`: each matrix's rows, in float32; as `is_fit_for_floats` wants.
    - `reach`: how many of each matrix's outputs are wanted; the others are 0.
    - `weight`: the stack, in float32 or the bits of bfloat16. What is out of reach is not read.
        It is best what was last written to: what XLA reshapes or slices it may copy.
    - `place`: where in the stack the first matrix is.
    """
    return _with_floats(task.PRODUCTS, x, reach, weight, place, weight.shape[-2])


def float_sums(
    x: Float[Array, "matrix row k"],
    reach: Int[Array, " matrix"],
    weight: Float[Array, "*stack k n"] | UInt16[Array, "*stack k n"],
    place: Int[Array, ""],
) -> Float[Array, "matrix row n"]:
    """`float_products` with matrices that lie the other way round.

    **Arguments:** as there, but for

    - `reach`: how many of a row's entries are taken; the others count as 0.
    """
    return _with_floats(task.SUMS, x, reach, weight, place, weight.shape[-1])


def in_large_pages(x: Float[Array, "..."], n_bytes: int) -> Float[Array, "..."]:
    """`x`, and the program's working memory in large pages, if the system has some.

    **Arguments:**

    - `x`: what the rest of the program begins with, in float32.
    - `n_bytes`: how much the rest needs, or somewhat more.

    The memory is asked for as a result that nobody uses: XLA puts what comes later in its place.
    """
    if not is_there() or n_bytes < large_pages.LEAST:
        return x
    return _call(task.ASKING, (), x, results=(x.shape, (n_bytes // 4,)), aliases={1: 0})


def _with_floats(what: int, x: Array, reach: Array, weight: Array, place: Array, n: int) -> Array:
    matrices, rows, k = x.shape
    entry = task.FLOAT32 if weight.dtype == jnp.float32 else task.BFLOAT16
    numbers = place, _threads(rows, matrices * n * k), entry, reach
    return _call(what, numbers, x, weight, results=((matrices, rows, n),))


def _call(
    what: int, numbers: tuple[Any, ...], x: Array, *more: Array,
    results: tuple[tuple[int, ...], ...], aliases: dict[int, int] | None = None,
) -> Array:  # fmt: skip
    """The first of the results, of these shapes, of what `grokkit.cpu.xla` does."""
    with _ONE_AT_A_TIME:  # XLA takes one registration, and two threads may compile at once
        xla.register()
    # For the type that shard_map wants of what is used with the rows, and of what comes of it.
    zero = 0 * x[(0,) * x.ndim]
    facts = jnp.concatenate([jnp.ravel(jnp.asarray(n, jnp.int32)) for n in (what, *numbers)])
    facts = facts + zero.astype(jnp.int32)
    kinds = [jax.typeof(jnp.broadcast_to(zero, shape)) for shape in results]
    call = jax.ffi.ffi_call(
        xla.TARGET, kinds, vmap_method="sequential", input_output_aliases=aliases
    )
    return call(facts, x, *more)[0]


def _most_blocks(rows: int, matrices: int, whole: bool, group: int) -> int:
    """How many blocks packed rows can take up; the last of each matrix may be part empty."""
    block = whole_numbers.BLOCK if whole else LANES
    fewest = 1 if whole or group < LANES else few_rows.FEW_ROWS + 1
    return (rows + min(matrices, rows // fewest) * (block - 1)) // block if rows >= fewest else 1


def _threads(rows: int, entries: int) -> int:
    """How many threads to cut a product over: the processor's, shared between devices."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else max(1, mesh.size // jax.process_count())
    return max(1, min(cores() // devices, entries * -(-rows // 4) // _A_THREAD))


def cores() -> int:
    """The processor's cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
