"""What lies before and after the layers: the embedding, and the norm and unembedding."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from grokkit.config import GrokConfig
from grokkit.kv_cache import KVCache, mark_visible
from grokkit.layers.block import Rows
from grokkit.layers.embedding import Embedding
from grokkit.layers.rms_norm import RMSNorm
from grokkit.taps import Capture, Change, Tap


class Ends(eqx.Module):
    """What lies before and after the layers."""

    embedding: Embedding
    final_norm: RMSNorm
    config: GrokConfig = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)

    def enter(
        self,
        tokens: Int[Array, "batch position"],
        cache: KVCache | None,
        lengths: Int[Array, " batch"] | None,
        captures: tuple[Capture, ...],
        edits: tuple[Change, ...],
    ) -> tuple[Float[Array, "batch position d_model"], Rows, dict[str, Any]]:
        """Embed tokens. **Returns:** the stream, what layers need besides, and what was kept."""
        batch, n = tokens.shape
        tokens = jax.reshard(tokens, P("data", None))
        start = jnp.zeros(batch, jnp.int32) if cache is None else cache.length
        start = jax.reshard(start, P("data"))
        counts = jnp.full(batch, n, jnp.int32) if lengths is None else lengths
        counts = jax.reshard(counts, P("data"))
        positions = start[:, None] + jnp.arange(n, dtype=jnp.int32)
        real = jnp.arange(n) < counts[:, None]
        visible = real & (tokens != self.config.pad_token)
        if cache is not None:
            visible = mark_visible(cache.visible, visible, start)
        tap = Tap(captures, edits, None, positions)
        x = tap("embed", self.embedding.embed(tokens) * self.config.embedding_multiplier)
        return x, Rows(positions, visible, start, counts), tap.captured

    def leave(
        self,
        x: Float[Array, "batch position d_model"],
        rows: Rows,
        last_only: bool,
        captures: tuple[Capture, ...],
        edits: tuple[Change, ...],
    ) -> tuple[Float[Array, "batch shown vocab"], dict[str, Any]]:
        """Unembed the stream. **Returns:** logits, and what was kept."""
        positions = rows.positions
        if last_only:
            x = jnp.take_along_axis(x, (rows.counts - 1)[:, None, None], axis=1)
            positions = (rows.start + rows.counts - 1)[:, None]
        tap = Tap(captures, edits, None, positions)
        logits = self.embedding.unembed(tap("final_norm", self.final_norm(x)), self.dtype)
        logits = tap("logits", logits * self.config.output_multiplier)
        return logits, tap.captured


enter = jax.jit(Ends.enter, static_argnames=("captures",), inline=True)
"""`Ends.enter`, compiled; in a compiled function it is no function of its own."""
leave = jax.jit(Ends.leave, static_argnames=("last_only", "captures"), inline=True)
"""`Ends.leave`, likewise."""
