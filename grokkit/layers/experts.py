"""Running rows through the experts chosen for them, without running the others.

Rows are sorted by expert and cut into blocks of one expert each (the block-sparse form of
Gale et al., MegaBlocks, arXiv 2211.15841); a loop runs block after block, reading only the
weights of that block's expert. `plain` runs every block in full and is what accelerators run; on
a CPU `trimmed` runs of each block little more than the rows that it holds.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grokkit.quant import QuantizedArray, Slot, index
from grokkit.quantised_matmul import columns, matmul

_Into = QuantizedArray | Slot | Float[Array, "expert d_model d_ff"]
_Back = QuantizedArray | Slot | Float[Array, "expert d_ff d_model"]

_LARGEST_BLOCK = 256
_STEP = 16
"""Rows that the processor multiplies at once."""


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
    return jax.lax.platform_dependent(
        x,
        chosen,
        (gate, value, out),
        cpu=lambda x, chosen, experts: trimmed(x, chosen, *experts, dtype),
        default=lambda x, chosen, experts: plain(x, chosen, *experts, dtype),
    )


def plain(x: Array, chosen: Array, gate: Any, value: Any, out: Any, dtype: Any) -> Array:
    """`expert_outputs` with every block run in full."""
    n_rows, n_chosen = chosen.shape
    share = n_rows * n_chosen // gate.shape[0]
    # About an expert's even share, so that few blocks are part empty.
    size = 1 if share < 2 else min(_LARGEST_BLOCK, 1 << (share - 1).bit_length())

    def run(expert, count, assignments):
        del count
        rows = x[assignments // n_chosen]
        hidden = jax.nn.gelu(matmul(rows, index(gate, expert), dtype), approximate=True)
        hidden = hidden * matmul(rows, index(value, expert), dtype)
        return matmul(hidden, index(out, expert), dtype)

    return _block_by_block(chosen, gate.shape[0], size, run)


def trimmed(x: Array, chosen: Array, gate: Any, value: Any, out: Any, dtype: Any) -> Array:
    """`expert_outputs` with each block cut to the least of a few sizes that holds its rows."""
    n_rows, n_chosen = chosen.shape
    size = min(n_rows, _LARGEST_BLOCK)
    sizes = _sizes(size)

    def run_first(n: int, expert: Array, assignments: Array) -> Array:
        rows = x[assignments[:n] // n_chosen].T
        hidden = jax.nn.gelu(columns(rows, index(gate, expert), dtype), approximate=True)
        hidden = hidden * columns(rows, index(value, expert), dtype)
        results = columns(hidden, index(out, expert), dtype).T
        return jnp.pad(results, ((0, size - n), (0, 0)))

    def none(expert: Array, assignments: Array) -> Array:
        # Zeros of the type that the others give under shard_map, where data and weights vary.
        zero = 0 * (assignments[0] + jnp.isnan(jax.tree.leaves(out)[0].reshape(-1)[0]).astype(int))
        return jnp.zeros((size, x.shape[1])) + zero.astype(jnp.float32)

    branches = [none, *(functools.partial(run_first, n) for n in sizes)]

    def run(expert, count, assignments):
        branch = jnp.searchsorted(jnp.asarray([0, *sizes]), count)
        return jax.lax.switch(branch, branches, expert, assignments)

    return _block_by_block(chosen, gate.shape[0], size, run)


def _sizes(largest: int) -> list[int]:
    """Numbers of rows that a block may be cut to, close enough that little is run for nothing."""
    sizes = [1]
    while sizes[-1] < largest:
        n = sizes[-1]
        sizes.append(2 * n if n < _STEP else n + max(_STEP, n // 3 // _STEP * _STEP))
    return [*sizes[:-1], largest]


def _block_by_block(
    chosen: Int[Array, "row choice"],
    n_experts: int,
    size: int,
    run: Callable[[Array, Array, Array], Array],
) -> Float[Array, "row choice d_model"]:
    """Sort (row, choice) pairs into blocks of one expert and call `run` on each.

    `run` is given the block's expert, how many pairs it holds, and the pairs, `size` of them with
    any others after the first.
    """
    blocks, place = _blocks(chosen.reshape(-1), n_experts, size)
    results = jax.lax.scan(lambda _, block: (None, run(*block)), None, blocks)[1]
    results = results.reshape(-1, results.shape[-1])
    return results[place].reshape(*chosen.shape, -1)


def _blocks(
    experts: Int[Array, " pair"], n_experts: int, size: int
) -> tuple[
    tuple[Int[Array, " block"], Int[Array, " block"], Int[Array, "block size"]], Int[Array, " pair"]
]:
    """Cut the pairs into blocks of `size` that share an expert.

    **Returns:** each block's expert, its number of pairs and the pairs; and for each pair its place
    in the blocks' concatenation.
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
    return (expert, count, pairs), place
