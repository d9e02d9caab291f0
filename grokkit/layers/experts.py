"""Running rows through the experts chosen for them, without running the others.

Rows are sorted by expert and cut into blocks of one expert each (the block-sparse form of
Gale et al., MegaBlocks, arXiv 2211.15841); a loop runs block after block, reading only the
weights of that block's expert.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grokkit.quant import QuantizedArray, index, matmul

_Into = QuantizedArray | Float[Array, "expert d_model d_ff"]
_Back = QuantizedArray | Float[Array, "expert d_ff d_model"]


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
    n_rows, n_chosen = chosen.shape
    n_experts = jax.tree.leaves(gate)[0].shape[0]
    size = _block_size(n_rows * n_chosen, n_experts)
    blocks = _blocks(chosen.reshape(-1), n_experts, size)

    def run(_, block):
        expert, assignments = block
        rows = x[jnp.minimum(assignments, n_rows * n_chosen - 1) // n_chosen]
        hidden = jax.nn.gelu(matmul(rows, index(gate, expert), dtype), approximate=True)
        hidden = hidden * matmul(rows, index(value, expert), dtype)
        return None, matmul(hidden, index(out, expert), dtype)

    _, results = jax.lax.scan(run, None, blocks[:2])
    results = results.reshape(-1, results.shape[-1])
    return results[blocks[2]].reshape(n_rows, n_chosen, -1)


def _block_size(assignments: int, n_experts: int) -> int:
    """Rows a block: about an expert's even share, so that few blocks are part empty."""
    share = assignments // n_experts
    return 1 if share < 2 else min(256, 1 << (share - 1).bit_length())


def _blocks(
    experts: Int[Array, " assignment"], n_experts: int, size: int
) -> tuple[Int[Array, " block"], Int[Array, "block size"], Int[Array, " assignment"]]:
    """Cut the assignments (row, choice pairs) into blocks of `size` that share an expert.

    **Returns:** each block's expert; its assignments (one past the last for an empty place); and
    for each assignment its place in the blocks' concatenation.
    """
    n = experts.shape[0]
    n_blocks = min(n, n // size + n_experts)
    order = jnp.argsort(experts, stable=True)
    counts = jnp.sum(experts[:, None] == jnp.arange(n_experts), axis=0)
    blocks_used = (counts + size - 1) // size
    first_block = jnp.cumsum(blocks_used) - blocks_used
    first_assignment = jnp.cumsum(counts) - counts
    sorted_experts = experts[order]
    rank = jnp.arange(n) - first_assignment[sorted_experts]
    place_sorted = first_block[sorted_experts] * size + rank
    assignments = jnp.full(n_blocks * size, n).at[place_sorted].set(order)
    place = jnp.zeros(n, place_sorted.dtype).at[order].set(place_sorted)
    block_expert = jnp.searchsorted(jnp.cumsum(blocks_used), jnp.arange(n_blocks), side="right")
    # Blocks past the last used one compute on empty places; any expert will do.
    return jnp.minimum(block_expert, n_experts - 1), assignments.reshape(n_blocks, size), place
