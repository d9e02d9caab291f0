"""Running rows through the experts chosen for them, without running the others.

Rows are sorted by expert and cut into blocks of one expert each (the block-sparse form of
Gale et al., MegaBlocks, arXiv 2211.15841); a loop runs block after block, reading only the
weights of that block's expert. `plain` runs every block in full and is what accelerators run; on
a CPU `trimmed` runs of each block little more than the rows that it holds.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grokkit.quant import QuantizedArray, Slot, index
from grokkit.quantised_matmul import as_columns, columns, matmul

_Into = QuantizedArray | Slot | Float[Array, "expert d_model d_ff"]
_Back = QuantizedArray | Slot | Float[Array, "expert d_ff d_model"]

_LARGEST_BLOCK = 256
_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256)
"""Close enough that little is run for nothing."""


def expert_outputs(
    x: Float[Array, "row d_model"],
    chosen: Int[Array, "row choice"],
    gate: _Into,
    value: _Into,
    out: _Back,
    dtype: Any,
) -> Float[Array, "row choice d_model"]:
    """`out(gelu_tanh(gate(x)) * value(x))` of each row's chosen experts.

    **Arguments:**

    - `x`: rows of the normalised residual stream.
    - `chosen`: the experts of each row.
    - `gate`, `value`, `out`: the experts' matrices, stacked. Where they are cut along d_ff the
        result is this part's share of the sum.
    - `dtype`: in which to multiply; see `einsum32`.
    """
    if not isinstance(gate, QuantizedArray | Slot):
        return plain(x, chosen, (gate, value, out), dtype)
    return jax.lax.platform_dependent(
        x,
        chosen,
        (gate, value, out),
        cpu=lambda x, chosen, experts: trimmed(x, chosen, experts, dtype),
        default=lambda x, chosen, experts: plain(x, chosen, experts, dtype),
    )


def plain(x: Array, chosen: Array, experts: tuple[Any, Any, Any], dtype: Any) -> Array:
    """`expert_outputs` with every block run in full."""
    gate, value, out = experts
    n_rows, n_chosen = chosen.shape
    n_experts = gate.shape[0]
    share = n_rows * n_chosen // n_experts
    # About an expert's even share, so that few blocks are part empty.
    size = 1 if share < 2 else min(_LARGEST_BLOCK, 1 << (share - 1).bit_length())
    blocks, place = _blocks(chosen.reshape(-1), n_experts, size)

    def run(_, block):
        rows = x[block.pairs // n_chosen]
        hidden = jax.nn.gelu(matmul(rows, index(gate, block.expert), dtype), approximate=True)
        hidden = hidden * matmul(rows, index(value, block.expert), dtype)
        return None, matmul(hidden, index(out, block.expert), dtype)

    results = jax.lax.scan(run, None, blocks)[1]
    return results.reshape(-1, results.shape[-1])[place].reshape(n_rows, n_chosen, -1)


def trimmed(x: Array, chosen: Array, experts: tuple[Any, Any, Any], dtype: Any) -> Array:
    """`expert_outputs` of 8-bit matrices with each block cut to the least of a few sizes that
    holds its rows. Differentiable in `x`, at the cost of `plain`."""
    # As in quantised_matmul.blocked: of the type of what varies over devices as the weights do.
    x = x + 0 * jax.tree.leaves(experts)[0].reshape(-1)[0].astype(x.dtype)
    return _trimmed(x, chosen, experts, jnp.dtype(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _trimmed(x: Array, chosen: Array, experts: Any, dtype: Any) -> Array:
    n_rows, n_chosen = chosen.shape
    n_experts = experts[0].shape[0]
    size = min(n_rows, _LARGEST_BLOCK)
    sizes = _sizes(size)
    blocks, place = _blocks(chosen.reshape(-1), n_experts, size)
    # Blocks of one size come in one loop. A branch on the size would be simpler, but XLA runs
    # what is inside a branch on one thread.
    kind = jnp.searchsorted(jnp.asarray([0, *sizes]), blocks.count)
    order = jnp.argsort(kind)
    zero = 0 * jnp.isnan(x[0, 0]).astype(jnp.float32)
    results = jnp.zeros((kind.shape[0], size, x.shape[1])) + zero
    for i, n in enumerate(sizes, start=1):
        run = functools.partial(_run_block, x, experts, blocks, order, n, n_chosen, dtype)
        results = jax.lax.fori_loop(jnp.sum(kind < i), jnp.sum(kind <= i), run, results)
    return results.reshape(-1, x.shape[1])[place].reshape(n_rows, n_chosen, -1)


def _run_block(
    x: Array,
    experts: Any,
    blocks: "_Blocks",
    order: Array,
    n: int,
    n_chosen: int,
    dtype: Any,
    i: Array,
    results: Array,
) -> Array:
    """Put the outputs of the i-th block in order, of at most `n` pairs, into `results`."""
    gate, value, out = (index(w, blocks.expert[order[i]]) for w in experts)
    rows = x[blocks.pairs[order[i], :n] // n_chosen]
    turned = as_columns(n)
    times = columns if turned else matmul
    rows = rows.T if turned else rows
    hidden = jax.nn.gelu(times(rows, gate, dtype), approximate=True) * times(rows, value, dtype)
    outputs = times(hidden, out, dtype)
    # Not fused with what makes them: a sum over groups in that order would jump about in memory.
    outputs = jax.lax.optimization_barrier(outputs).T if turned else outputs
    return jax.lax.dynamic_update_slice(results, outputs[None], (order[i], 0, 0))


def _trimmed_forward(x: Array, chosen: Array, experts: Any, dtype: Any) -> Any:
    return _trimmed(x, chosen, experts, dtype), (x, chosen, experts)


def _trimmed_backward(dtype: Any, residuals: Any, dy: Array) -> Any:
    # Loops of as many turns as there are blocks of a size have no derivative of their own.
    x, chosen, experts = residuals
    return *jax.vjp(lambda x: plain(x, chosen, experts, dtype), x)[1](dy), None, None


_trimmed.defvjp(_trimmed_forward, _trimmed_backward)


def _sizes(largest: int) -> list[int]:
    """Numbers of rows that a block may be cut to: those of which products are fastest."""
    return [*(n for n in _SIZES if n < largest), largest]


class _Blocks(NamedTuple):
    """(row, choice) pairs sorted into blocks that share an expert."""

    expert: Int[Array, " block"]
    count: Int[Array, " block"]
    """Pairs that a block holds; in its places after them are other experts'."""
    pairs: Int[Array, "block size"]


def _blocks(
    experts: Int[Array, " pair"], n_experts: int, size: int
) -> tuple[_Blocks, Int[Array, " pair"]]:
    """Cut the pairs into blocks of `size`.

    **Returns:** the blocks; and for each pair its place in their concatenation.
    """
    n = experts.shape[0]
    n_blocks = min(n, n // size + n_experts)
    order = jnp.argsort(experts, stable=True)
    counts = jnp.sum(experts[:, None] == jnp.arange(n_experts), axis=0)
    blocks_used = (counts + size - 1) // size
    first_block = jnp.cumsum(blocks_used) - blocks_used
    first_pair = jnp.cumsum(counts) - counts
    block = jnp.arange(n_blocks)
    expert = jnp.searchsorted(jnp.cumsum(blocks_used), block, side="right")
    # Blocks past the last used one hold nothing; any expert will do.
    expert = jnp.minimum(expert, n_experts - 1)
    done = (block - first_block[expert]) * size
    count = jnp.clip(counts[expert] - done, 0, size)
    start = first_pair[expert] + done
    pairs = order[jnp.minimum(start[:, None] + jnp.arange(size), n - 1)]
    rank = jnp.zeros(n, order.dtype).at[order].set(jnp.arange(n, dtype=order.dtype))
    place = first_block[experts] * size + rank - first_pair[experts]
    return _Blocks(expert, count, pairs), place
