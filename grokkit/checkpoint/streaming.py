"""A checkpoint's layers read one after the other, the next while one is in use."""

import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jaxtyping import PyTree

from grokkit.checkpoint.loading import LeafPlan, new_parts, read_leaf


class LayerReader:
    """Gives the layers of a stack that stays on disk, at most two of them in memory at a time.

    On a CPU both layers' memory is made once and used again, so that a layer must not be used
    any more when the next is asked for.
    """

    def __init__(self, plans: PyTree) -> None:
        """Read nothing yet.

        **Arguments:**

        - `plans`: of the stacked layers, each leaf with a leading layer axis; see `plan_params`.
        """
        leaves, self._treedef = jax.tree.flatten(plans)
        self.n_layers: int = leaves[0].shape[0]
        self._plans: list[list[LeafPlan]] = [
            [leaf.layer(i) for leaf in leaves] for i in range(self.n_layers)
        ]
        self._parts: list[Any] = [None, None]
        self._one_pass = threading.Lock()

    def layers(self, start: int = 0) -> Generator[PyTree]:
        """One layer after the other; while one is used, the next is read.

        Let go of each, and see that nothing computed from it is still under way, before asking
        for the next. One pass at a time: another thread's waits until this one ends or is closed.

        **Arguments:**

        - `start`: the first layer.
        """
        with self._one_pass, ThreadPoolExecutor(1, "reading-layers") as pool:
            pending = [pool.submit(self._read, start)] if start < self.n_layers else []
            for layer in range(start, self.n_layers):
                ready = [pending.pop().result()]
                if layer + 1 < self.n_layers:
                    pending.append(pool.submit(self._read, layer + 1))
                # Nothing here may hold on to the layer while the next is read.
                yield jax.tree.unflatten(self._treedef, ready.pop())

    def _read(self, layer: int) -> list[Any]:
        plans = self._plans[layer]
        parts = self._parts[layer % 2]
        if parts is None:
            parts = self._parts[layer % 2] = [new_parts(plan) for plan in plans]
        return [read_leaf(plan, part) for plan, part in zip(plans, parts, strict=True)]
