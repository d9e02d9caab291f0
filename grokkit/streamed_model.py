"""The model with its layers left on disk: each is read when a pass comes to it, and let go."""

import dataclasses
import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PyTree
from tqdm.auto import tqdm

from grokkit.abstract_model import PREFILL_PART, Group, Model, Read, Resume, Step
from grokkit.checkpoint import Checkpoint, fingerprint
from grokkit.checkpoint.load import load_planned, plan_params
from grokkit.checkpoint.stream import LayerReader
from grokkit.kv_cache import KVCache
from grokkit.layers.block import Block, Rows, run_layer
from grokkit.layers.ends import Ends, enter
from grokkit.model import Grok
from grokkit.processes import to_host
from grokkit.sharding import abstract
from grokkit.taps import Capture, Change

_BAR_AFTER = 2.0
"""Seconds that a pass takes before its progress is shown."""

_Parts = list[tuple[Array, Rows]]
"""The stream [batch, position, d_model] in parts of some positions, with what belongs to each."""


class StreamedGrok(Model):
    """What `Grok` is, with embedding and norms in memory and the layers on disk."""

    shares_passes: ClassVar[bool] = True
    runs_ahead: ClassVar[bool] = False

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
        ends: Ends = load_planned(plans.ends, self.name, progress)
        self.embedding, self.final_norm = ends.embedding, ends.final_norm
        self.config, self.dtype = ends.config, ends.dtype
        self.progress = progress

    def _run_layers(
        self,
        x: Array,
        rows: Rows,
        cache: KVCache | None,
        captures: tuple[Capture, ...],
        edits: tuple[Change, ...],
        resume: Resume | None,
    ) -> tuple[Array, KVCache | None, dict[str, Any]]:
        """A pass, which uses stream and cache up. Long prompts that go into a cache go through each
        layer in parts, so that memory does not grow with their length."""
        first = 0
        if resume is not None:
            x, first = jax.reshard(resume.resid_pre, P("data", None, None)), int(resume.layer)
        parts = _cut(x, rows, whole=cache is None or bool(captures))
        found: dict[str, dict[int, Any]] = {}

        def run(block: Block, layer: int) -> Array:
            nonlocal cache
            wanted = tuple(c for c in captures if c.is_in(layer))
            cache, ended, kept = self._run_parts(block, layer, parts, cache, wanted, edits)
            for key, value in kept.items():
                found.setdefault(key, {})[layer] = value
            return ended

        self._each_layer(run, first)
        x = parts[0][0] if len(parts) == 1 else jnp.concatenate([part for part, _ in parts], 1)
        return x, cache, {c.key: _stack(c, found.pop(c.key)) for c in captures if c.key in found}

    def run(self, program: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        args, kwargs = jax.tree.map(
            lambda a: jnp.asarray(a) if isinstance(a, np.ndarray) else a, (args, kwargs)
        )
        plain: Any = program  # which the type checker does not know to have this
        return plain.__wrapped__(self, *args, **kwargs)

    def repeat(self, step: Step, carry: Any, n: int) -> tuple[Any, PyTree]:
        kept = []
        for _ in range(n):
            carry, out = step(carry)
            kept.append(out)
        return carry, jax.tree.map(lambda *values: jnp.stack(values), *kept)

    def layers(
        self, start: int = 0, stop: int | None = None, backwards: bool = False
    ) -> Generator[Block]:
        return self.reader.layers(start, stop, backwards)

    def part(self, layer: int, choose: Callable[[Block], PyTree]) -> PyTree:
        return self.reader.part(layer, choose)

    def read_logits(self, groups: Sequence[Group], read: Read, mesh: Mesh) -> Iterator[np.ndarray]:
        """See `Model.read_logits`. All groups share the pass: one after the other goes through a
        layer, with keys and values of that layer alone."""
        one_layer = dataclasses.replace(self.config, n_layers=1)

        def empty(tokens: Array) -> KVCache:
            batch, n = tokens.shape
            return KVCache.empty(one_layer, batch, n, self.dtype, mesh)

        on_rows = [jax.device_put(group, P("data")) for group in groups]
        streams: list[_Parts] = []
        for tokens, _, lengths in on_rows:
            x, rows, _ = enter(self.ends, tokens, empty(tokens), lengths, (), ())
            streams.append(_cut(x, rows, whole=False))

        def run(block: Block, layer: int) -> Array | None:
            ended = None
            for (tokens, *_), parts in zip(on_rows, streams, strict=True):
                jax.block_until_ready(ended)  # one group's activations at a time
                _, ended, _ = self._run_parts(block, 0, parts, empty(tokens))
            return ended

        self._each_layer(run)
        for (_, numbers, _), parts in zip(on_rows, streams, strict=True):
            pieces, start = [], 0
            for x, rows in parts:
                of_part = numbers[:, start : start + x.shape[1]]
                pieces.append(to_host(_read(self.ends, x, rows, of_part, read)))
                start += x.shape[1]
            yield np.concatenate(pieces, axis=1)

    def shapes(self) -> Grok:
        return abstract(self.specs, self.mesh)

    def digest(self) -> str:
        return f"streamed from disk, {fingerprint(self.checkpoint)[:32]}"

    def pass_nbytes(self) -> int:
        return self.reader.nbytes

    def read_rate(self) -> float:
        return self.reader.rate()

    def _each_layer(self, run: Callable[[Block, int], Array | None], first: int = 0) -> None:
        """One pass. `run` takes each layer and its number, and returns what is there when nothing
        uses the layer any more."""
        with (
            closing(self.layers(first)) as blocks,
            tqdm(
                initial=first, total=self.config.n_layers, desc=f"layers of {self.name}",
                unit="layer", leave=False, delay=_BAR_AFTER, disable=not self.progress,
            ) as bar,
        ):  # fmt: skip
            layer = first
            for block in blocks:  # enumerate would hold on to the last one
                self.reader.is_used_until(run(block, layer))
                del block
                layer += 1
                bar.update()

    def _run_parts(
        self,
        block: Block,
        layer: int,
        parts: _Parts,
        cache: KVCache | None,
        captures: tuple[Capture, ...] = (),
        edits: tuple[Change, ...] = (),
    ) -> tuple[KVCache | None, Array, dict[str, Any]]:
        """Take the stream through a layer, each part into the place of the one that came. Each takes
        the cache of the one before, so that the last one ends last.

        **Returns:** the cache, what is there at the end, and what the last part's captures kept.
        """
        is_new = cache is not None and cache.is_new
        for i, (x, rows) in enumerate(parts):
            if cache is not None:
                cache = dataclasses.replace(cache, is_new=is_new and i == 0)
            x, cache, ended, kept = run_layer(
                block, x, rows, cache, jnp.int32(layer), self.dtype, captures, edits
            )
            parts[i] = x, rows
        if cache is not None:  # in the next layer
            cache = dataclasses.replace(cache, is_new=is_new)
        return cache, ended, kept


@functools.partial(jax.jit, static_argnames=("read",))
def _read(
    ends: Ends, x: Array, rows: Rows, numbers: Int[Array, "batch position"], read: Read
) -> Array:
    return read(ends.leave(x, rows, False, (), ())[0], numbers)


def _cut(x: Float[Array, "batch position d_model"], rows: Rows, whole: bool) -> _Parts:
    """The stream in parts; it is used up."""
    n = x.shape[1]
    if whole or n <= PREFILL_PART:
        return [(x, rows)]
    slices = [slice(start, start + PREFILL_PART) for start in range(0, n, PREFILL_PART)]
    parts = [(x[:, s], dataclasses.replace(rows, positions=rows.positions[:, s])) for s in slices]
    x.delete()
    return parts


def _stack(capture: Capture, found: dict[int, PyTree]) -> PyTree:
    """A capture's layers as one array, in the order in which they were asked for."""
    order = sorted(found) if capture.layer_numbers is None else capture.layer_numbers
    return jax.tree.map(lambda *values: jnp.stack(values), *(found[i] for i in order))
