"""Running rows through the experts chosen for them, without running the others.

Rows are sorted by expert. `plain` cuts them into blocks of one expert each (the block-sparse form
of Gale et al., MegaBlocks, arXiv 2211.15841), and a loop runs block after block, reading only the
weights of that block's expert; that is what accelerators run. On a CPU `grouped` runs each
matrix's rows as they are, all experts in one product.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grokkit import cpu
from grokkit.quant import QuantizedArray, Slot, index
from grokkit.quantised_matmul import grouped_on_cpu, matmul, varying

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
    if not isinstance(gate, QuantizedArray | Slot) or not cpu.is_there():
        return plain(x, chosen, (gate, value, out), dtype)
    return jax.lax.platform_dependent(
        x,
        chosen,
        (gate, value, out),
        cpu=lambda x, chosen, experts: grouped(x, chosen, experts, dtype),
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


def grouped(x: Array, chosen: Array, experts: tuple[Any, Any, Any], dtype: Any) -> Array:
    """`expert_outputs` of 8-bit matrices, by products of rows that are grouped by expert.
    Differentiable in `x`, at the cost of `plain`."""
    return _grouped(varying(x, experts[0]), chosen, experts, jnp.dtype(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped(x: Array, chosen: Array, experts: Any, dtype: Any) -> Array:
    gate, value, out = experts
    n_rows, n_chosen = chosen.shape
    order, counts = _sorted(chosen.reshape(-1), gate.shape[0])
    rows = x[order // n_chosen]
    hidden = jax.nn.gelu(grouped_on_cpu(rows, counts, gate, dtype), approximate=True)
    hidden = hidden * grouped_on_cpu(rows, counts, value, dtype)
    outputs = grouped_on_cpu(hidden, counts, out, dtype)
    return outputs[_places(order)].reshape(n_rows, n_chosen, -1)


def _grouped_forward(x: Array, chosen: Array, experts: Any, dtype: Any) -> Any:
    return _grouped(x, chosen, experts, dtype), (x, chosen, experts)


def _grouped_backward(dtype: Any, residuals: Any, dy: Array) -> Any:
    # The products of groups have no derivative of their own.
    x, chosen, experts = residuals
    return *jax.vjp(lambda x: plain(x, chosen, experts, dtype), x)[1](dy), None, None


_grouped.defvjp(_grouped_forward, _grouped_backward)


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
