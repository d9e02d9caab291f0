"""Products with the keys and values of a layer, where they lie in the cache.

XLA copies a layer out of the cache before it multiplies it. On a CPU few queries meet it in loops
of our own, and only as far as it is filled.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from grokkit import cpu
from grokkit.float_matmul import products, sums
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
    return _multiply(products, "bngqd,bnkd->bngqk", q, keys, layer, reach, dtype)


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
    return _multiply(sums, "bngqk,bnkd->bngqd", weights, values, layer, reach, dtype)


def _multiply(
    loops: Callable[..., Array], spec: str, x: Array, stored: Stored, layer: Array, reach: Array,
    dtype: Any,
) -> Array:  # fmt: skip
    def direct(x: Array, stored: Array, layer: Array, reach: Array) -> Array:
        return einsum32(spec, x, read(stored, layer), dtype)

    def in_place(x: Array, stored: Array, layer: Array, reach: Array) -> Array:
        layouts = (_QUERIES, P(None, "data", "model"), P(), P("data"))
        arrays = jax.reshard((x, stored, layer, reach), layouts)
        return jax.shard_map(local, in_specs=layouts, out_specs=_QUERIES)(*arrays)

    def local(x: Array, stored: Array, layer: Array, reach: Array) -> Array:
        batch, heads, group, queries, _ = x.shape
        matrices = batch * heads
        reach = jnp.repeat(reach, heads)
        rows = x.reshape(matrices, group * queries, -1).astype(jnp.float32)
        found = loops(rows, reach, stored, layer * matrices)
        return found.reshape(batch, heads, group, queries, -1)

    if not cpu.is_fit_for_floats(x.shape[2] * x.shape[3], stored.shape[4]):
        return direct(x, stored, layer, reach)
    return jax.lax.platform_dependent(x, stored, layer, reach, cpu=in_place, default=direct)
