"""Running rows through the experts chosen for them, without running the others.

Rows are sorted by expert. `plain` cuts them into blocks of one expert each (the block-sparse form
of Gale et al., MegaBlocks, arXiv 2211.15841), and a loop runs block after block, reading only the
weights of that block's expert; that is what accelerators run. On a CPU `grouped` runs all experts'
rows in one product.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grokkit.quant import QuantizedArray, Slot, index
from grokkit.quantised_matmul import Stack, cpu_kernels, matmul

_Into = QuantizedArray | Slot | Float[Array, "expert d_model d_ff"]
_Back = QuantizedArray | Slot | Float[Array, "expert d_ff d_model"]

_LARGEST_BLOCK = 256


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
    experts = (gate, value, out)
    fast = [cpu_kernels(w) for w in experts if isinstance(w, QuantizedArray | Slot)]
    if len(fast) == len(experts) and all(fast):
        return grouped(fast[0], x, chosen, experts, dtype)
    return plain(x, chosen, experts, dtype)


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


def grouped(fast: Any, x: Array, chosen: Array, experts: tuple[Any, Any, Any], dtype: Any) -> Array:
    """`expert_outputs` of 8-bit matrices, by CPU kernels for rows that are grouped by expert.
    Differentiable in `x`, at the cost of `plain`."""

    @jax.custom_jvp
    def computed(x: Array, chosen: Array, experts: Any) -> Array:
        gate, value, out = (Stack.of(w) for w in experts)
        (n_rows, n_chosen), n_experts = chosen.shape, experts[0].shape[0]
        is_packed = all(
            fast.is_fit_for_packing(n_rows * n_chosen, w.k, w.groups, n_experts, dtype)
            for w in (gate, out)
        )
        prepared = fast.pack if is_packed else (lambda rows: rows)
        block = fast.BLOCK if is_packed else 1
        pairs, starts, place = _by_expert(chosen.reshape(-1), n_experts, block)
        rows = prepared(x[pairs // n_chosen])
        gates = jax.nn.gelu(fast.product(rows, starts, *gate), approximate=True)
        hidden = prepared(gates * fast.product(rows, starts, *value))
        outputs = fast.product(hidden, starts, *out)
        return outputs[place].reshape(n_rows, n_chosen, -1)

    @computed.defjvp
    def derivative(primals: Any, tangents: Any) -> tuple[Array, Array]:
        x, chosen, experts = primals
        tangent = jax.jvp(lambda x: plain(x, chosen, experts, dtype), (x,), tangents[:1])[1]
        return computed(*primals), tangent

    return computed(fast.varying(x, Stack.of(experts[0]).scales), chosen, experts)


def _by_expert(
    experts: Int[Array, " pair"], n_experts: int, size: int
) -> tuple[Int[Array, " row"], Int[Array, " start"], Int[Array, " pair"]]:
    """Sort pairs by expert into blocks of `size` that share one; what is left of a block is filled.

    **Returns:** which pair each row of the blocks is; where each expert's blocks begin, and the last
    one's end; and for each pair its row.
    """
    n = experts.shape[0]
    order, counts = _sorted(experts, n_experts)
    starts = jnp.cumulative_sum((counts + size - 1) // size, include_initial=True)
    if size == 1:
        return order, starts, _places(order)
    first_pair = jnp.cumsum(counts) - counts
    row = starts[experts] * size + _places(order) - first_pair[experts]
    n_blocks = min(n, n // size + n_experts)
    rows = jnp.zeros(n_blocks * size, order.dtype).at[row].set(jnp.arange(n, dtype=order.dtype))
    return rows, starts, row


def _sorted(
    experts: Int[Array, " pair"], n_experts: int
) -> tuple[Int[Array, " pair"], Int[Array, " expert"]]:
    """The pairs in the order of their experts, and how many there are of each."""
    counts = jnp.sum(experts[:, None] == jnp.arange(n_experts), axis=0)
    return jnp.argsort(experts, stable=True), counts


def _places(order: Int[Array, " pair"]) -> Int[Array, " pair"]:
    """Where in an order each pair is."""
    n = order.shape[0]
    return jnp.zeros(n, order.dtype).at[order].set(jnp.arange(n, dtype=order.dtype))


class _Blocks(NamedTuple):
    """(row, choice) pairs sorted into blocks that share an expert."""

    expert: Int[Array, " block"]
    pairs: Int[Array, "block size"]


def _blocks(
    experts: Int[Array, " pair"], n_experts: int, size: int
) -> tuple[_Blocks, Int[Array, " pair"]]:
    """Cut the pairs into blocks of `size`.

    **Returns:** the blocks; and for each pair its place in their concatenation.
    """
    n = experts.shape[0]
    n_blocks = min(n, n // size + n_experts)
    order, counts = _sorted(experts, n_experts)
    blocks_used = (counts + size - 1) // size
    first_block = jnp.cumsum(blocks_used) - blocks_used
    first_pair = jnp.cumsum(counts) - counts
    block = jnp.arange(n_blocks)
    expert = jnp.searchsorted(jnp.cumsum(blocks_used), block, side="right")
    # Blocks past the last used one hold nothing; any expert will do.
    expert = jnp.minimum(expert, n_experts - 1)
    done = (block - first_block[expert]) * size
    start = first_pair[expert] + done
    pairs = order[jnp.minimum(start[:, None] + jnp.arange(size), n - 1)]
    place = first_block[experts] * size + _places(order) - first_pair[experts]
    return _Blocks(expert, pairs), place
