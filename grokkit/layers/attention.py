"""Grouped-query attention with rotary positions and soft-capped scores."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from grokkit.config import GrokConfig
from grokkit.kv_cache import KVCache, Stored, part, rounded, write
from grokkit.layers.cached_products import key_products, value_sums
from grokkit.layers.linear import column_parallel, row_parallel
from grokkit.layers.rotary import rotate
from grokkit.numerics import einsum32
from grokkit.quant import QuantizedArray, Slot, declare
from grokkit.taps import Tap

KEY_BLOCK = 1024
"""Keys that are attended to at once, where nothing asks for the pattern over them all."""
_LOWEST = -1e30  # below any score, which the soft cap bounds, and finite in differences

_HEADS = P("data", None, "model")
_KEYS = _SCORES = P("data", "model")
_STORED = P(None, "data", "model")


class Attention(eqx.Module):
    """Query, key, value and output projections of one layer."""

    query: QuantizedArray | Slot | Float[Array, "*layer d_model heads"]
    key: QuantizedArray | Slot | Float[Array, "*layer d_model kv_heads"]
    value: QuantizedArray | Slot | Float[Array, "*layer d_model kv_heads"]
    out: QuantizedArray | Slot | Float[Array, "*layer heads d_model"]
    config: GrokConfig = eqx.field(static=True)

    @staticmethod
    def specs(config: GrokConfig) -> "Attention":
        """Declare the parameters."""

        def into(n_heads: int, axis: str) -> QuantizedArray:
            return declare((config.d_model, n_heads * config.d_head), ("d_model", axis))

        heads = config.n_heads * config.d_head
        return Attention(
            query=into(config.n_heads, "heads"),
            key=into(config.n_kv_heads, "kv_heads"),
            value=into(config.n_kv_heads, "kv_heads"),
            out=declare(
                (heads, config.d_model), ("heads", "d_model"), (config.out_groups, "group_split")
            ),
            config=config,
        )

    def __call__(
        self,
        x: Float[Array, "batch position d_model"],
        positions: Int[Array, "batch position"],
        visible: Bool[Array, "batch key"],
        cache: KVCache | None,
        layer: Int[Array, ""],
        dtype: Any,
        tap: Tap,
    ) -> tuple[Float[Array, "batch position d_model"], KVCache | None]:
        """Attend from each position to the visible ones up to it.

        **Arguments:**

        - `x`: normalised residual stream.
        - `positions`: absolute position of each token.
        - `visible`: which keys may be attended to, by absolute position.
        - `cache`: keys and values of earlier tokens, or `None` if `x` holds the whole sequence.
        - `layer`: which layer of the cache is this one's.
        - `dtype`: in which to multiply; see `einsum32`.
        - `tap`: called on each named activation; see `grokkit.taps`.

        **Returns:** what attention adds to the stream before its closing norm, and the cache with
        the new keys and values in it.
        """
        config = self.config
        q = tap("q", _split_heads(column_parallel(x, self.query, dtype), config.d_head))
        k = tap("k", _split_heads(column_parallel(x, self.key, dtype), config.d_head))
        v = tap("v", _split_heads(column_parallel(x, self.value, dtype), config.d_head))
        q = rotate(q, positions, config.rope_base)
        k = rotate(k, positions, config.rope_base)
        k, v = (jax.reshard(jnp.moveaxis(a, 2, 1), _KEYS) for a in (k, v))
        whole = tap.wants("attn_scores") or tap.wants("pattern")  # over every slot, seen or not
        stored, at = (k[None], v[None]), jnp.int32(0)
        if cache is not None:
            start = positions[:, 0]
            keys = write(cache.keys, k, layer, start)
            values = write(cache.values, v, layer, start)
            if cache.is_new and not whole:
                stored = rounded(keys, k)[None], rounded(values, v)[None]
            else:
                stored, at = (keys, values), layer
            cache = eqx.tree_at(lambda c: (c.keys, c.values), cache, (keys, values))
        n_keys = stored[0].shape[3]
        mask = (jnp.arange(n_keys) <= positions[:, :, None]) & visible[:, None, :n_keys]
        if n_keys <= KEY_BLOCK or whole:
            reach = jnp.max(positions, axis=1) + 1
            z = _attend(q, stored, at, reach, mask, config, dtype, tap)
        else:
            # Beyond the last position a cache holds nothing; that of a whole sequence is known.
            reach = n_keys if cache is None or cache.is_new else jnp.max(positions) + 1
            z = _attend_by_blocks(q, stored, at, reach, mask, config, dtype)
        z = tap("z", z)
        out = row_parallel(z.reshape(*x.shape[:2], -1), self.out, dtype)
        return tap("attn_out_pre_norm", out), cache


def _split_heads(x: Array, d_head: int) -> Array:
    return _reshape(x, (*x.shape[:-1], x.shape[-1] // d_head, d_head), _HEADS)


def _reshape(x: Array, shape: tuple[int, ...], layout: P) -> Array:
    """`x.reshape(shape)` in a stated layout: JAX drops that of an axis of one, as a batch may be."""
    return jax.reshard(x.reshape(shape), layout)


def _attend(
    q: Float[Array, "batch query head d_head"],
    stored: tuple[Stored, Stored],
    layer: Int[Array, ""],
    reach: Int[Array, " batch"],
    mask: Bool[Array, "batch query key"],
    config: GrokConfig,
    dtype: Any,
    tap: Tap,
) -> Float[Array, "batch query head d_head"]:
    """Softmax attention; query head h reads key/value head h // (n_heads / n_kv_heads).

    A query that sees no key at all (nothing but pads up to it) gets zeros.
    """
    batch, queries, n_heads, d_head = q.shape
    keys, values = stored
    n_kv_heads, n_keys = keys.shape[2:4]
    # Heads before queries: the other order would turn the values round in memory first.
    grouped = _reshape(q, (batch, queries, n_kv_heads, n_heads // n_kv_heads, d_head), _HEADS)
    grouped = jnp.moveaxis(grouped, 1, 3)
    scores = _capped(key_products(grouped, keys, layer, reach, dtype), config)
    scores = _reshape(scores, (batch, n_heads, queries, n_keys), _SCORES)
    mask = mask[:, None]
    # Masked again after the tap: an edit of a score cannot make a hidden key visible.
    scores = jnp.where(mask, tap("attn_scores", jnp.where(mask, scores, -jnp.inf)), -jnp.inf)
    largest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    exp = jnp.where(mask, jnp.exp(scores - jnp.where(jnp.isinf(largest), 0, largest)), 0)
    total = jnp.sum(exp, axis=-1, keepdims=True)
    pattern = tap("pattern", exp / jnp.where(total == 0, 1, total))
    weights = _reshape(pattern, (batch, n_kv_heads, -1, queries, n_keys), _SCORES)
    z = value_sums(weights, values, layer, reach, dtype)
    return _reshape(jnp.moveaxis(z, 3, 1), (batch, queries, n_heads, d_head), _HEADS)


def _capped(products: Array, config: GrokConfig) -> Array:
    """How strongly queries ask for keys, under the soft cap."""
    scores = products * config.attention_multiplier
    return config.attention_softcap * jnp.tanh(scores / config.attention_softcap)


def _attend_by_blocks(
    q: Float[Array, "batch query head d_head"],
    stored: tuple[Stored, Stored],
    layer: Int[Array, ""],
    reach: Int[Array, ""] | int,
    mask: Bool[Array, "batch query key"],
    config: GrokConfig,
    dtype: Any,
) -> Float[Array, "batch query head d_head"]:
    """`_attend` without the whole pattern: a block of keys at a time, with a running softmax.

    No query sees a key from `reach` on; their blocks are not read. A derivative is there if it is
    known beforehand.

    (Milakov and Gimelshein, arXiv 1805.02867; Dao et al., FlashAttention, arXiv 2205.14135.)
    """
    n_keys, n_blocks = mask.shape[2], (reach + KEY_BLOCK - 1) // KEY_BLOCK
    unknown = () if isinstance(n_blocks, int) else (n_blocks,)

    def local(
        q: Array, stored: tuple[Array, Array], layer: Array, mask: Array, *unknown: Array
    ) -> Array:
        batch, queries, n_heads, d_head = q.shape
        grouped = q.reshape(batch, queries, stored[0].shape[2], -1, d_head)

        def add(block: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            largest, total, z = carry
            # The last block begins where it still fits; what the one before has seen is left out.
            start = jnp.minimum(block * KEY_BLOCK, n_keys - KEY_BLOCK)
            keys, values = (part(a, layer, start, KEY_BLOCK) for a in stored)
            seen = jax.lax.dynamic_slice_in_dim(mask, start, KEY_BLOCK, axis=2)
            seen = (seen & (start + jnp.arange(KEY_BLOCK) >= block * KEY_BLOCK))[:, None, None]
            scores = _capped(einsum32("bqngd,bnkd->bngqk", grouped, keys, dtype), config)
            above = jnp.maximum(largest, jnp.max(scores, axis=-1, where=seen, initial=_LOWEST))
            exp = jnp.where(seen, jnp.exp(scores - above[..., None]), 0)
            shrink = jnp.exp(largest - above)
            z = z * shrink[..., None] + einsum32("bngqk,bnkd->bngqd", exp, values, dtype)
            return above, total * shrink + jnp.sum(exp, axis=-1), z

        # Zeros of the type that the sums have: they differ between devices as the heads do.
        zeros = jnp.moveaxis(0 * grouped, 1, 3)
        start = (zeros[..., 0] + _LOWEST, zeros[..., 0], zeros)
        _, total, z = jax.lax.fori_loop(0, unknown[0] if unknown else n_blocks, add, start)
        z = z / jnp.where(total == 0, 1, total)[..., None]
        return jnp.moveaxis(z, 3, 1).reshape(batch, queries, n_heads, d_head)

    layouts = [_HEADS, (_STORED, _STORED), P(), P("data"), *(P() for _ in unknown)]
    arrays = jax.reshard([q, stored, layer, mask, *unknown], layouts)
    return jax.shard_map(local, in_specs=tuple(layouts), out_specs=_HEADS)(*arrays)
