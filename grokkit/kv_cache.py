"""The keys and values of the tokens seen so far."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt16

from grokkit.config import GrokConfig
from grokkit.numerics import of_bits
from grokkit.sharding import Declaration, ParamSpec, partition_spec

_KEYS = ("batch", "kv_head", "position", "d_head")
Stored = (
    Float[Array, "layer batch kv_head capacity d_head"]
    | UInt16[Array, "layer batch kv_head capacity d_head"]
)


class KVCache(eqx.Module):
    """Keys and values of every layer, one slot a position; slot i holds position i.

    A head's keys lie together, as products with them read them. Sequences of a batch may have different lengths. Slots at and beyond a sequence's length
    hold nothing of use and are written over by its next tokens.

    bfloat16 numbers are held as the integers of the same 16 bits: XLA's CPU compiler widens a
    bfloat16 buffer to write into it, and so would rewrite the whole of it for each token.
    """

    keys: Stored | Declaration
    values: Stored | Declaration
    visible: Bool[Array, "batch position"] | Declaration
    """Whether a slot holds a token that may be attended to: written, and no pad."""
    length: Int[Array, " batch"] | Declaration
    """Tokens of each sequence so far."""
    is_new: bool = eqx.field(static=True, default=False)
    """Whether it is known, before anything runs, that no token has been written yet: the first
    tokens need only attend to each other then, not to every slot."""

    @staticmethod
    def specs(config: GrokConfig, batch: int, capacity: int, dtype: jnp.dtype) -> "KVCache":
        """Declare the cache for `batch` sequences of up to `capacity` tokens, rounded to `dtype`."""
        kv = ParamSpec(
            (config.n_layers, batch, config.n_kv_heads, capacity, config.d_head),
            jnp.uint16 if dtype == jnp.bfloat16 else dtype,
            ("layer", *_KEYS),
        )
        return KVCache(
            keys=kv,
            values=kv,
            visible=ParamSpec((batch, capacity), jnp.bool_, ("batch", "position")),
            length=ParamSpec((batch,), jnp.int32, ("batch",)),
        )

    @staticmethod
    def empty(
        config: GrokConfig, batch: int, capacity: int, dtype: jnp.dtype, mesh: Mesh
    ) -> "KVCache":
        """A cache without tokens, laid out over `mesh`."""
        specs = KVCache.specs(config, batch, capacity, dtype)
        specs = dataclasses.replace(specs, is_new=True)
        return jax.tree.map(
            lambda s: jnp.zeros(s.shape, s.dtype, device=s.sharding(mesh)),
            specs,
            is_leaf=lambda s: isinstance(s, ParamSpec),
        )

    @property
    def capacity(self) -> int:
        """Longest sequence that fits, in tokens."""
        return self.keys.shape[3]


def write(
    buffer: Stored,
    new: Float[Array, "batch kv_head position d_head"],
    layer: Int[Array, ""] | int,
    start: Int[Array, " batch"],
) -> Stored:
    """Put the keys (or values) of new tokens into one layer, each row at its own position."""

    def local(buffer, new, layer, start):
        if buffer.dtype == jnp.uint16:
            new = jax.lax.bitcast_convert_type(new.astype(jnp.bfloat16), jnp.uint16)
        for row in range(new.shape[0]):
            update = new[row].astype(buffer.dtype)[None, None]
            buffer = jax.lax.dynamic_update_slice(buffer, update, (layer, row, 0, start[row], 0))
        return buffer

    cache, keys, rows = (partition_spec(a) for a in (("layer", *_KEYS), _KEYS, ("batch",)))
    # Slicing forgets the layout of a batch of one.
    new, start = jax.reshard((new, start), (keys, rows))
    return jax.shard_map(local, in_specs=(cache, keys, partition_spec(()), rows), out_specs=cache)(
        buffer, new, jnp.asarray(layer, jnp.int32), start
    )


def read(
    buffer: Stored, layer: Int[Array, ""] | int
) -> Float[Array, "batch kv_head capacity d_head"]:
    """The keys (or values) of one layer, in the dtype that they were rounded to."""
    found = part(buffer, layer, 0, buffer.shape[3])
    return jax.reshard(found, partition_spec(_KEYS))


def part(
    buffer: Stored, layer: Int[Array, ""] | int, start: Int[Array, ""] | int, size: int
) -> Float[Array, "batch kv_head position d_head"]:
    """The keys (or values) of one layer from some position on."""
    found = jax.lax.dynamic_slice(
        buffer, (layer, 0, 0, start, 0), (1, *buffer.shape[1:3], size, buffer.shape[4])
    )[0]
    return of_bits(found)


def rounded(
    buffer: Stored, new: Float[Array, "batch kv_head position d_head"]
) -> Float[Array, "batch kv_head position d_head"]:
    """Keys (or values) as they would be read after they were written."""
    return new.astype(jnp.bfloat16 if buffer.dtype == jnp.uint16 else buffer.dtype)


def mark_visible(
    visible: Bool[Array, "batch capacity"],
    new: Bool[Array, "batch position"],
    start: Int[Array, " batch"],
) -> Bool[Array, "batch capacity"]:
    """Record for each new token whether it may be attended to."""

    def local(visible, new, start):
        return jax.vmap(lambda row, n, s: jax.lax.dynamic_update_slice(row, n, (s,)))(
            visible, new, start
        )

    spec, rows = partition_spec(("batch", "position")), partition_spec(("batch",))
    return jax.shard_map(local, in_specs=(spec, spec, rows), out_specs=spec)(
        visible, *jax.reshard((new, start), (spec, rows))
    )


def put_rows(cache: KVCache, new: KVCache, at: Int[Array, " row"]) -> KVCache:
    """Put the sequences of another cache over rows of this one, whatever those held.

    **Arguments:**

    - `cache`: written in place where it is donated.
    - `new`: of fewer rows, and of any capacity that holds its sequences.
    - `at`: for each of its rows the one to go to, counted among those of the same device;
        negative for a row that goes nowhere.
    """
    capacity = cache.capacity

    def local(cache, new, at):
        for row in range(at.shape[0]):
            cache = tuple(
                put_row(whole, part, axis, row, at[row])
                for whole, part, axis in zip(cache, new, (1, 1, 0, 0), strict=True)
            )
        return cache

    kv = partition_spec(("layer", *_KEYS))
    specs = (kv, kv, partition_spec(("batch", "position")), partition_spec(("batch",)))
    beyond = max(capacity - new.capacity, 0)
    parts = (
        new.keys[:, :, :, :capacity],
        new.values[:, :, :, :capacity],
        jnp.pad(new.visible, ((0, 0), (0, beyond)))[:, :capacity],
        new.length,
    )
    whole = (cache.keys, cache.values, cache.visible, cache.length)
    found = jax.shard_map(local, in_specs=(specs, specs, specs[3]), out_specs=specs)(
        whole, jax.reshard(parts, specs), at
    )
    keys, values, visible, length = found
    return KVCache(keys, values, visible, length)


def put_row(whole: Array, part: Array, axis: int, row: int, at: Int[Array, ""]) -> Array:
    """Row `row` of `part` over the first entries of row `at` of `whole`; nothing if `at` < 0."""
    part = jax.lax.slice_in_dim(part, row, row + 1, axis=axis)
    start = [jnp.int32(0)] * whole.ndim
    start[axis] = jnp.maximum(at, 0)
    kept = jax.lax.dynamic_slice(whole, start, part.shape)
    return jax.lax.dynamic_update_slice(whole, jnp.where(at >= 0, part, kept), start)
