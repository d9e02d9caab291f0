"""Products with the keys and values of a layer, in their place in the cache.

XLA copies a layer out of the cache before it multiplies it. On a CPU kernels of ours read it in
place for few queries, and only as far as it is filled.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from grokkit.float_matmul import products, sums
from grokkit.kernels.cpu import kernels
from grokkit.kv_cache import Stored, read
from grokkit.numerics import einsum32

_QUERIES = P("data", "model")


def key_products(
    q: Float[Array, "batch kv_head group query d_head"],
    keys: Stored,
    layer: Int[Array, ""],
    reach: Int[Array, " batch"],
    dtype: Any,
) -> Float[Array, "batch kv_head group query key"]:
    """Each query against the keys of its head.

    **Arguments:**

    - `q`: queries.
    - `keys`: of all layers.
    - `layer`: which one of them.
    - `reach`: how many keys of each sequence any query may see. What the others give is of no use.
    - `dtype`: in which to multiply; see `einsum32`.
    """
    rows, n_keys, d_head = q.shape[2] * q.shape[3], *keys.shape[3:]
    fast = kernels(math.prod(keys.shape[1:]))
    is_fit = fast is not None and fast.is_fit_for_products(rows, n_keys, d_head)
    kernel = products if is_fit else None
    return _multiply(kernel, "bngqd,bnkd->bngqk", q, keys, layer, reach, dtype)


def value_sums(
    weights: Float[Array, "batch kv_head group query key"],
    values: Stored,
    layer: Int[Array, ""],
    reach: Int[Array, " batch"],
    dtype: Any,
) -> Float[Array, "batch kv_head group query d_head"]:
    """The sum of each head's values, weighted for each query.

    **Arguments:** as for `key_products`, but for

    - `weights`: nothing for keys out of reach.
    """
    rows, d_head = weights.shape[2] * weights.shape[3], values.shape[4]
    fast = kernels(math.prod(values.shape[1:]))
    is_fit = fast is not None and fast.is_fit_for_sums(rows, d_head)
    kernel = sums if is_fit else None
    return _multiply(kernel, "bngqk,bnkd->bngqd", weights, values, layer, reach, dtype)


def _multiply(
    kernel: Callable[..., Array] | None, spec: str, x: Array, stored: Stored, layer: Array,
    reach: Array, dtype: Any,
) -> Array:  # fmt: skip
    if kernel is None:
        return einsum32(spec, x, read(stored, layer), dtype)

    def local(x: Array, stored: Array, layer: Array, reach: Array) -> Array:
        batch, heads, group, queries, _ = x.shape
        matrices = batch * heads
        reach = jnp.repeat(reach, heads)
        rows = x.reshape(matrices, group * queries, -1).astype(jnp.float32)
        found = kernel(rows, reach, stored, layer * matrices)
        return found.reshape(batch, heads, group, queries, -1)

    layouts = (_QUERIES, P(None, "data", "model"), P(), P("data"))
    arrays = jax.reshard((x, stored, layer, reach), layouts)
    return jax.shard_map(local, in_specs=layouts, out_specs=_QUERIES)(*arrays)
