"""A checkpoint's layers read one after the other, the next while one is in use."""

import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jaxtyping import PyTree

from grokkit.checkpoint import slabs
from grokkit.checkpoint.loading import LeafPlan, Parts, new_parts, read_leaves
from grokkit.checkpoint.mapped import Files, MappedLeaves, as_stored, can_be_mapped, is_soon_copied

_KEPT = 0.8  # of the machine's memory: a larger stack would not stay in the page cache
_SAMPLE = 1 << 28  # bytes: the most that is read only to see how fast that is


class LayerReader:
    """Gives the layers of a stack that stays on disk, at most two of them in memory at a time.

    On a CPU both layers' memory is made once and used again: see `layers` for how long a layer may
    be used. What can be used as it lies in its file is read so, or used in the page cache and not
    copied at all: see `grokkit.checkpoint.mapped`.
    """

    def __init__(self, plans: PyTree) -> None:
        """Read nothing yet.

        **Arguments:**

        - `plans`: of the stacked layers, each leaf with a leading layer axis; see `plan_params`.
        """
        self.nbytes: int = sum(plan.nbytes for plan in jax.tree.leaves(plans))
        """Of the layers' weights, which a pass over them all reads."""
        leaves, self._treedef = jax.tree.flatten(as_stored(plans))
        self.n_layers: int = leaves[0].shape[0]
        self._plans: list[list[LeafPlan]] = [
            [leaf.layer(i) for leaf in leaves] for i in range(self.n_layers)
        ]
        self.past_cache = self.nbytes > _KEPT * _physical_memory()
        self._one_pass = threading.Lock()
        self._until: PyTree = None
        self._bytes_read, self._seconds = 0, 0.0

    @property
    def past_cache(self) -> bool:
        """Whether the files are read past the page cache, which would not keep them until the next
        pass."""
        return self._past_cache

    @past_cache.setter
    def past_cache(self, past_cache: bool) -> None:
        self._past_cache = past_cache
        self._parts: list[dict[int, Parts]] = [{}, {}]
        files: Files = {}
        self._mapped = [
            MappedLeaves({i: plan for i, plan in enumerate(layer) if self._is_mapped(plan)}, files)
            for layer in self._plans
        ]
        self._in_memory: list[MappedLeaves | None] = [None, None]

    def _is_mapped(self, plan: LeafPlan) -> bool:
        """Whether a leaf is used where it lies in the page cache, or soon copied from there."""
        return not self.past_cache and (can_be_mapped(plan) or is_soon_copied(plan))

    def rate(self) -> float:
        """Bytes a second at which layers have been read so far, in all passes together.

        If there were none, one of the first layer's arrays is read to see, the largest below
        270 MB. What the page cache holds comes faster than it would from the disk.
        """
        if not self._bytes_read:
            first = self._plans[0]
            small = [plan for plan in first if plan.nbytes <= _SAMPLE]
            plan = max(small or first, key=lambda plan: plan.nbytes)
            return plan.nbytes / self._seconds_for(plan)
        return self._bytes_read / self._seconds

    def _seconds_for(self, plan: LeafPlan) -> float:
        if self._is_mapped(plan):
            mapped = MappedLeaves({0: plan}, {})
            with slabs.new_pool() as pool:
                seconds = _timed(lambda: mapped.read(pool, lambda _: _new_parts(plan)))[1]
            mapped.let_go()
            return seconds
        parts, past = [_new_parts(plan)], self.past_cache
        return _timed(lambda: read_leaves([plan], parts, past_cache=past))[1]

    def abstract(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Shapes, dtypes and layouts of one layer."""
        found = [
            jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding) for p in self._plans[0]
        ]
        return jax.tree.unflatten(self._treedef, found)

    def part(self, layer: int, choose: Callable[[Any], PyTree]) -> PyTree:
        """Some arrays of one layer.

        **Arguments:**

        - `layer`: which.
        - `choose`: takes the layer's tree and returns the parts of it that are to be read.
        """
        plans = choose(jax.tree.unflatten(self._treedef, self._plans[layer]))
        leaves, treedef = jax.tree.flatten(plans)
        return jax.tree.unflatten(treedef, read_leaves(leaves, [_new_parts(p) for p in leaves]))

    def layers(
        self, start: int = 0, stop: int | None = None, backwards: bool = False
    ) -> Generator[PyTree]:
        """One layer after the other; while one is used, the next is read.

        Let go of each before asking for the next, and see that nothing computed from it is still
        under way; or say until when it is, with `is_used_until`. One pass at a time: another
        thread's waits until this one ends or is closed.

        **Arguments:**

        - `start`: the first layer.
        - `stop`: the layer to stop before; by default all are given.
        - `backwards`: give the last of them first.
        """
        order = range(self.n_layers)[start:stop]
        order = order[::-1] if backwards else order
        with (
            self._one_pass,
            slabs.new_pool() as threads,
            ThreadPoolExecutor(1, "reading-layers") as pool,
        ):
            coming = [*order, None, None]
            read = functools.partial(pool.submit, self._read)
            pending = [read(threads, None, *coming[:2])] if order else []
            before: PyTree = None
            try:
                for i in range(1, len(order) + 1):
                    before, self._until = self._until, None
                    if coming[i] is not None:  # into the memory of the layer given last
                        pending.append(read(threads, before, *coming[i : i + 2]))
                    ready = [pending.pop(0).result()]
                    # Nothing here may hold on to the layer while the next is read.
                    yield jax.tree.unflatten(self._treedef, ready.pop())
            finally:
                last, self._until = self._until, None
                jax.block_until_ready((before, last))

    def is_used_until(self, ended: PyTree) -> None:
        """Say, in a pass, until when the layer that was given last is used, so that the next is
        asked for, and can be set to work, before that.

        **Arguments:**

        - `ended`: arrays that are there when nothing uses the layer any more.
        """
        self._until = ended

    def _read(
        self, pool: ThreadPoolExecutor, until: PyTree, layer: int, then: int | None
    ) -> list[Any]:
        """One layer, in the memory that is used until some arrays are there; the other layer is the
        one that will be read after it."""
        jax.block_until_ready(until)
        if before := self._in_memory[layer % 2]:
            before.let_go()
        then = None if self.past_cache else then  # nobody would be told
        copied, copied_then = self._copied(layer), self._copied(then)

        def read() -> list[Any]:
            self._in_memory[layer % 2] = self._mapped[layer]
            leaves: dict[int, Any] = self._mapped[layer].read(
                pool, lambda i: self._parts_of(layer, [i])[0]
            )
            arrays = read_leaves(
                [*copied.values()], self._parts_of(layer, copied),
                then=([*copied_then.values()], self._parts_of(then, copied_then)),
                past_cache=self.past_cache, pool=pool,
            )  # fmt: skip
            leaves |= zip(copied, arrays, strict=True)
            return [leaves[i] for i in range(len(leaves))]

        leaves, seconds = _timed(read)
        self._bytes_read += self.nbytes // self.n_layers
        self._seconds += seconds
        return leaves

    def _copied(self, layer: int | None) -> dict[int, LeafPlan]:
        """A layer's leaves that are read, and not had from the page cache by address."""
        if layer is None:
            return {}
        mapped = self._mapped[layer].plans
        return {i: plan for i, plan in enumerate(self._plans[layer]) if i not in mapped}

    def _parts_of(self, layer: int | None, leaves: Iterable[int]) -> list[Parts]:
        """The memory for some leaves of a layer, which every other one shares."""
        if layer is None:
            return []
        kept = self._parts[layer % 2]
        for i in leaves:
            if i not in kept:
                kept[i] = _new_parts(self._plans[layer][i])
        return [kept[i] for i in leaves]


def _new_parts(plan: LeafPlan) -> Parts:
    return new_parts(plan, are_shared=True)


def _physical_memory() -> int:
    """Bytes."""
    if not hasattr(os, "sysconf"):
        return sys.maxsize  # and files are read as any other
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _timed(read: Callable[[], Any]) -> tuple[Any, float]:
    """What `read` gives, once it is there, and the seconds that it took."""
    start = time.perf_counter()
    found = jax.block_until_ready(read())
    return found, time.perf_counter() - start
