"""A decoder layer, and what it needs to know of the tokens that pass through it."""

import functools
from typing import Any

import equinox as eqx
import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from grokkit.config import GrokConfig
from grokkit.kv_cache import KVCache
from grokkit.layers.attention import Attention
from grokkit.layers.moe import MoE
from grokkit.layers.rms_norm import RMSNorm
from grokkit.taps import Capture, Change, Tap


class Rows(eqx.Module):
    """What the layers need to know of the tokens of a pass."""

    positions: Int[Array, "batch position"]
    """Absolute position of each token."""
    visible: Bool[Array, "batch key"]
    """Which keys may be attended to, by absolute position."""
    start: Int[Array, " batch"]
    """Tokens before these, in the cache."""
    counts: Int[Array, " batch"]
    """How many of each row's tokens are real."""


class Block(eqx.Module):
    """A decoder layer: attention and experts, each between two norms."""

    attn_norm: RMSNorm
    attention: Attention
    attn_out_norm: RMSNorm
    moe_norm: RMSNorm
    moe: MoE
    moe_out_norm: RMSNorm

    @staticmethod
    def specs(config: GrokConfig) -> "Block":
        """Declare one layer's parameters."""
        norm = RMSNorm.specs(config)
        return Block(norm, Attention.specs(config), norm, norm, MoE.specs(config), norm)

    def __call__(
        self,
        x: Float[Array, "batch position d_model"],
        rows: Rows,
        cache: KVCache | None,
        layer: Int[Array, ""],
        dtype: Any,
        captures: tuple[Capture, ...] = (),
        edits: tuple[Change, ...] = (),
    ) -> tuple[Float[Array, "batch position d_model"], KVCache | None, dict[str, Any]]:
        """Pass the stream through the layer.

        **Arguments:** as in `Attention.__call__`, and

        - `captures`, `edits`: what to keep and what to change.

        **Returns:** the stream, the cache, and what was kept.
        """
        tap = Tap(captures, edits, layer, rows.positions)
        x = tap("resid_pre", x)
        attn_in = tap("attn_in", self.attn_norm(x))
        attn_out, cache = self.attention(
            attn_in, rows.positions, rows.visible, cache, layer, dtype, tap
        )
        x = tap("resid_mid", x + tap("attn_out", self.attn_out_norm(attn_out)))
        moe_in = tap("moe_in", self.moe_norm(x))
        moe_out = self.moe(moe_in, dtype, tap)
        x = tap("resid_post", x + tap("moe_out", self.moe_out_norm(moe_out)))
        return x, cache, tap.captured


@functools.partial(jax.jit, static_argnames=("dtype", "captures"), donate_argnames=("x", "cache"))
def run_layer(
    block: Block,
    x: Float[Array, "batch position d_model"],
    rows: Rows,
    cache: KVCache | None,
    layer: Int[Array, ""],
    dtype: Any,
    captures: tuple[Capture, ...] = (),
    edits: tuple[Change, ...] = (),
) -> tuple[Float[Array, "batch position d_model"], KVCache | None, Array, dict[str, Any]]:
    """A layer, compiled; stream and cache are used up. Before the captures it returns a few numbers
    that nobody uses up: when they are there, it has ended."""
    x, cache, kept = block(x, rows, cache, layer, dtype, captures, edits)
    stream = P("data", None, None)
    ended = jax.shard_map(lambda x: x[:1, :1, :1], in_specs=stream, out_specs=stream)(x)
    return x, cache, ended, kept
