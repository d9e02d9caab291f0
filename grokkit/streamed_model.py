"""The model with its layers left on disk: each is read when a pass comes to it, and let go."""

import dataclasses
import functools
from collections.abc import Sequence
from contextlib import closing
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PyTree
from tqdm.auto import tqdm

from grokkit import cpu
from grokkit.checkpoint import Checkpoint
from grokkit.checkpoint.load import load_planned, plan_params
from grokkit.checkpoint.stream import LayerReader
from grokkit.config import GrokConfig
from grokkit.kv_cache import KVCache
from grokkit.layers.attention import KEY_BLOCK
from grokkit.model import (
    Block,
    Ends,
    Grok,
    Output,
    Resume,
    Rows,
    check_room,
    run_block,
    with_tokens,
)
from grokkit.taps import Capture, Change

PREFILL_PART = 1024
"""Tokens of a long prompt that are run at once."""
_BAR_AFTER = 2.0
"""Seconds that a pass takes before its progress is shown."""


class StreamedGrok:
    """What `Grok` is, with embedding and norms in memory and the layers on disk.

    It is called as `Grok` is, but is no pytree: it cannot go into a compiled function. See
    `grokkit.compiled` for functions that serve both.
    """

    is_streamed: ClassVar[bool] = True

    def __init__(
        self, checkpoint: Checkpoint, specs: Grok, mesh: Mesh, progress: bool = True
    ) -> None:
        """Read the embedding and the last norm; leave the layers where they are.

        **Arguments:**

        - `checkpoint`: from `open_checkpoint`.
        - `specs`: the parameters' declarations, as the checkpoint stores them.
        - `mesh`: the devices.
        - `progress`: show progress bars, for this and for passes that take seconds.

        **Raises:** as `load_params`, before anything is allocated.
        """
        self.specs = specs
        self.checkpoint = checkpoint
        self.mesh = mesh
        plans: Any = plan_params(checkpoint, specs, mesh)
        self.reader = LayerReader(plans.blocks)
        self.name = checkpoint.directory.name
        self.ends: Ends = load_planned(plans.ends, self.name, progress)
        self.progress = progress

    @property
    def config(self) -> GrokConfig:
        """The model's sizes and constants."""
        return self.ends.config

    @property
    def dtype(self) -> Any:
        """What matrix products round their operands to."""
        return self.ends.dtype

    def __call__(
        self,
        tokens: Int[Array, "batch position"],
        *,
        cache: KVCache | None = None,
        lengths: Int[Array, " batch"] | None = None,
        last_only: bool = False,
        captures: tuple[Capture, ...] = (),
        edits: tuple[Change, ...] = (),
        resume: Resume | None = None,
    ) -> Output:
        """A pass over all layers; see `Grok.__call__`. `cache` is used up: go on with the result's.

        All rows of the batch share the pass. Long prompts that go into a cache go through each
        layer in parts, so that memory does not grow with their length.

        **Raises:** `PromptError` if the cache has no room for `tokens`.
        """
        tokens = jnp.asarray(tokens)
        if cache is not None:
            check_room(cache, tokens.shape[1])
        x, rows, captured = enter(self.ends, tokens, cache, lengths, captures, edits)
        first = 0
        if resume is not None:
            assert cache is None and not captures, "resume goes with neither cache nor captures"
            x, first = jax.reshard(resume.resid_pre, P("data", None, None)), int(resume.layer)
        found: dict[str, dict[int, Any]] = {}
        parts = _cut(x, rows, whole=cache is None or bool(captures))
        del x
        layer, is_new = first, cache is not None and cache.is_new
        with closing(self.reader.layers(first)) as blocks, self._bar(first) as bar:
            for block in blocks:
                wanted = tuple(c for c in captures if _is_in(c, layer))
                for i, (part, its_rows) in enumerate(parts):
                    if cache is not None:
                        cache = dataclasses.replace(cache, is_new=is_new and i == 0)
                    part, cache, ended, kept = run_layer(
                        block, part, its_rows, cache, jnp.int32(layer), self.dtype, wanted, edits
                    )
                    parts[i] = part, its_rows
                    for key, value in kept.items():
                        found.setdefault(key, {})[layer] = value
                # Each part takes the cache of the one before, so the last one ends last.
                self.reader.is_used_until(ended)
                del block
                layer += 1
                bar.update()
        x = parts[0][0] if len(parts) == 1 else jnp.concatenate([part for part, _ in parts], 1)
        logits, last = leave(self.ends, x, rows, last_only, captures, edits)
        within = {c.key: _stack(c, found.pop(c.key)) for c in captures if c.key in found}
        return Output(logits, with_tokens(cache, rows), within | captured | last)

    def streams(self, groups: Sequence[tuple[Array, Array]]) -> list[list[tuple[Array, Rows]]]:
        """The stream after the last layer, of groups of rows that share one pass.

        **Arguments:**

        - `groups`: tokens of each [batch, position], and how many of each row are real [batch]. One
            after the other goes through a layer, with keys and values of that layer alone.

        **Returns:** for each group its stream [batch, position, d_model] and what `Ends.leave` needs
        besides, in parts of some positions each.
        """
        one_layer = dataclasses.replace(self.config, n_layers=1)

        def empty(shape: tuple[int, ...]) -> KVCache:
            return KVCache.empty(one_layer, shape[0], shape[1], self.dtype, self.mesh)

        entered = []
        for tokens, lengths in groups:
            x, rows, _ = enter(self.ends, tokens, empty(tokens.shape), lengths, (), ())
            entered.append(_cut(x, rows, whole=False))
            del x
        with closing(self.reader.layers()) as blocks, self._bar(0) as bar:
            for block in blocks:
                ended: Array | None = None
                for (tokens, _), parts in zip(groups, entered, strict=True):
                    jax.block_until_ready(ended)  # one group's activations at a time
                    cache = empty(tokens.shape)
                    for i, (part, rows) in enumerate(parts):
                        cache = dataclasses.replace(cache, is_new=i == 0)
                        part, cache, ended, _ = run_layer(
                            block, part, rows, cache, jnp.int32(0), self.dtype, (), ()
                        )
                        parts[i] = part, rows
                self.reader.is_used_until(ended)
                del block
                bar.update()
        return entered

    def _bar(self, first: int) -> Any:
        """Progress over the layers, shown if it takes long."""
        return tqdm(
            initial=first, total=self.reader.n_layers, desc=f"layers of {self.name}", unit="layer",
            leave=False, delay=_BAR_AFTER, disable=not self.progress,
        )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("captures",))
def enter(
    ends: Ends,
    tokens: Array,
    cache: KVCache | None,
    lengths: Array | None,
    captures: tuple[Capture, ...],
    edits: tuple[Change, ...],
) -> tuple[Array, Rows, dict[str, Any]]:
    """`Ends.enter`, compiled."""
    return ends.enter(tokens, cache, lengths, captures, edits)


@functools.partial(jax.jit, static_argnames=("dtype", "captures"), donate_argnames=("x", "cache"))
def run_layer(
    block: Block,
    x: Array,
    rows: Rows,
    cache: KVCache | None,
    layer: Array,
    dtype: Any,
    captures: tuple[Capture, ...],
    edits: tuple[Change, ...],
) -> tuple[Array, KVCache | None, Array, dict[str, Any]]:
    """`run_block`, compiled; stream and cache are used up. Before the captures it returns a few
    numbers that nobody uses up: when they are there, it has ended."""
    x = _in_large_pages(x, block.attention.config)
    x, cache, kept = run_block(block, x, rows, cache, layer, dtype, captures, edits)
    stream = P("data", None, None)
    ended = jax.shard_map(lambda x: x[:1, :1, :1], in_specs=stream, out_specs=stream)(x)
    return x, cache, ended, kept


def _in_large_pages(
    x: Float[Array, "batch position d_model"], config: GrokConfig
) -> Float[Array, "batch position d_model"]:
    """See `grokkit.cpu.in_large_pages`: here a program runs once for each layer."""

    def local(x: Array) -> Array:
        heads = 2 * config.n_heads * KEY_BLOCK
        units = 3 * config.n_experts_per_token * config.d_ff
        parts = jax.sharding.get_abstract_mesh().shape["model"]
        n_bytes = x.shape[0] * x.shape[1] * (heads + units) // parts * x.itemsize
        return jax.lax.platform_dependent(
            x, cpu=lambda x: cpu.in_large_pages(x, n_bytes), default=lambda x: x
        )

    rows = P("data", None, None)
    return jax.shard_map(local, in_specs=rows, out_specs=rows)(x)


@functools.partial(jax.jit, static_argnames=("last_only", "captures"))
def leave(
    ends: Ends,
    x: Array,
    rows: Rows,
    last_only: bool,
    captures: tuple[Capture, ...],
    edits: tuple[Change, ...],
) -> tuple[Array, dict[str, Any]]:
    """`Ends.leave`, compiled."""
    return ends.leave(x, rows, last_only, captures, edits)


def _cut(
    x: Float[Array, "batch position d_model"], rows: Rows, whole: bool
) -> list[tuple[Array, Rows]]:
    """The stream in parts of some positions each, with what belongs to them."""
    n = x.shape[1]
    if whole or n <= PREFILL_PART:
        return [(x, rows)]
    return [
        (x[:, part], dataclasses.replace(rows, positions=rows.positions[:, part]))
        for part in (slice(start, start + PREFILL_PART) for start in range(0, n, PREFILL_PART))
    ]


def _is_in(capture: Capture, layer: int) -> bool:
    return capture.layer_numbers is None or layer in capture.layer_numbers


def _stack(capture: Capture, found: dict[int, PyTree]) -> PyTree:
    """A capture's layers as one array, in the order in which they were asked for."""
    order = sorted(found) if capture.layer_numbers is None else capture.layer_numbers
    return jax.tree.map(lambda *values: jnp.stack(values), *(found[i] for i in order))
