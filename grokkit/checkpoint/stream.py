"""A checkpoint's layers read one after the other, the next while one is in use."""

import os
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jaxtyping import Array, PyTree

from grokkit.checkpoint.load import LeafPlan, Parts, new_parts, read_leaves

_KEPT = 0.8  # of the machine's memory: a larger stack would not stay in the page cache
_SAMPLE = 1 << 28  # bytes: the most that is read only to see how fast that is


class LayerReader:
    """Gives the layers of a stack that stays on disk, at most two of them in memory at a time.

    On a CPU both layers' memory is made once and used again: see `layers` for how long a layer may
    be used.
    """

    def __init__(self, plans: PyTree) -> None:
        """Read nothing yet.

        **Arguments:**

        - `plans`: of the stacked layers, each leaf with a leading layer axis; see `plan_params`.
        """
        leaves, self._treedef = jax.tree.flatten(plans)
        self.nbytes: int = sum(plan.nbytes for plan in leaves)
        """Of the layers' weights, which a pass over them all reads."""
        self.n_layers: int = leaves[0].shape[0]
        self.past_cache = self.nbytes > _KEPT * _physical_memory()
        """Whether the files are read with O_DIRECT: the page cache would not keep them until the
        next pass."""
        self._plans: list[list[LeafPlan]] = [
            [leaf.layer(i) for leaf in leaves] for i in range(self.n_layers)
        ]
        self._parts: list[list[Parts]] = [[], []]
        self._one_pass = threading.Lock()
        self._until: PyTree = None
        self._bytes_read, self._seconds = 0, 0.0

    def rate(self) -> float:
        """Bytes a second at which layers have been read so far, in all passes together.

        If there were none, one of the first layer's arrays is read to see, the largest below
        270 MB. What the page cache holds comes faster than it would from the disk.
        """
        if not self._bytes_read:
            first = self._plans[0]
            small = [plan for plan in first if plan.nbytes <= _SAMPLE]
            plan = max(small or first, key=lambda plan: plan.nbytes)
            return plan.nbytes / self._timed([plan], [new_parts(plan)])[1]
        return self._bytes_read / self._seconds

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
        return jax.tree.unflatten(treedef, read_leaves(leaves, [new_parts(p) for p in leaves]))

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
        with self._one_pass, ThreadPoolExecutor(1, "reading-layers") as pool:
            pending = [pool.submit(self._read, None, layer) for layer in order[:1]]
            before: PyTree = None
            try:
                for following in (*order[1:], None)[: len(order)]:
                    before, self._until = self._until, None
                    if following is not None:  # into the memory of the layer given last
                        pending.append(pool.submit(self._read, before, following))
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

    def _read(self, until: PyTree, layer: int) -> list[Array]:
        """One layer, in the memory that every other one shares, and that is used until some arrays
        are there."""
        jax.block_until_ready(until)
        plans = self._plans[layer]
        if not self._parts[layer % 2]:
            self._parts[layer % 2] = [new_parts(plan, are_shared=True) for plan in plans]
        leaves, seconds = self._timed(plans, self._parts[layer % 2])
        self._bytes_read += self.nbytes // self.n_layers
        self._seconds += seconds
        return leaves

    def _timed(
        self, plans: Sequence[LeafPlan], parts: Sequence[Parts]
    ) -> tuple[list[Array], float]:
        """Leaves, once they are there, and the seconds that it took."""
        start = time.perf_counter()
        leaves = jax.block_until_ready(read_leaves(plans, parts, direct=self.past_cache))
        return leaves, time.perf_counter() - start


def _physical_memory() -> int:
    """Bytes."""
    if not hasattr(os, "sysconf"):
        return sys.maxsize  # and files are read as any other
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
