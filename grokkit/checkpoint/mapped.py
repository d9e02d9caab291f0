"""Arrays that are the very pages of their files, which nothing copies.

That is possible on CPU devices, for what lies in a file just as the model holds it; and on one such
device for the 8-bit matrices of official files, which its products take as they are, in the file's
pages or in other memory.
"""

import dataclasses
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from grokkit import cpu, quant
from grokkit.checkpoint import pages
from grokkit.checkpoint.loading import LeafPlan
from grokkit.checkpoint.pages import PAGE
from grokkit.checkpoint.tensor_file import TensorFile
from grokkit.quant import QuantizedArray, Stored

_ALIGNMENT = 64  # bytes: what XLA asks of host memory that it uses in place
_MOST = 2**31 - 1  # bytes that XLA counts in 32 bits


def as_stored(plans: PyTree) -> PyTree:
    """A tree of `LeafPlan`s with the 8-bit matrices as their files hold them, where they can be
    used so: see `grokkit.quant.Stored`."""
    return jax.tree.map(
        lambda x: _as_stored(x) if isinstance(x, QuantizedArray) else x,
        plans,
        is_leaf=lambda x: isinstance(x, QuantizedArray),
    )


def _as_stored(matrix: QuantizedArray) -> QuantizedArray:
    plan: Any = matrix.weight
    first = plan.sources[0].span
    before = first.offset % PAGE  # so that whole pages can be read, past the page cache
    n_layers, n_bytes = len(plan.sources), before + first.nbytes
    are_fit = all(source.turned and source.span.offset >= before for source in plan.sources)
    if not (cpu.is_there() and are_fit and n_bytes <= _MOST and plan.sharding.num_devices == 1):
        return matrix

    def as_bytes(source: Any) -> Any:
        offset = source.span.offset - before
        span = dataclasses.replace(source.span, shape=(n_bytes,), offset=offset)
        return dataclasses.replace(source, turned=False, span=span)

    axes = [axis for axis in plan.sharding.spec if axis is not None]
    sharding = NamedSharding(plan.sharding.mesh, PartitionSpec(None, *axes))
    sources = tuple(map(as_bytes, plan.sources))
    weight = LeafPlan((n_layers, n_bytes), plan.dtype, sharding, sources)
    if not all(can_be_mapped(weight.layer(i)) for i in range(n_layers)):
        return matrix
    return quant.as_stored(matrix, weight, Stored(first.shape, before))


def can_be_mapped(plan: LeafPlan) -> bool:
    """Whether a leaf's parts are stretches of its file, on devices that can use them there."""
    (source, *more), places = plan.sources, _places(plan)
    return (
        not more
        and isinstance(source.file, TensorFile)
        and source.layer is None
        and not source.turned
        and source.span.dtype == plan.dtype
        and source.span.offset % _ALIGNMENT == 0
        and all(device.platform == "cpu" for device in places)
        and all(_is_stretch(plan, index) for index in places.values())
    )


def _places(plan: LeafPlan) -> Mapping[Any, Any]:
    return plan.sharding.addressable_devices_indices_map(plan.shape)


def _is_stretch(plan: LeafPlan, index: tuple[slice, ...]) -> bool:
    """Whether a part is in one piece, and where XLA can use it."""
    ranges = [range(*s.indices(n)) for s, n in zip(index, plan.shape, strict=True)]
    last_cut = max((i for i, n in enumerate(plan.shape) if len(ranges[i]) < n), default=0)
    offset = plan.dtype.itemsize * np.ravel_multi_index([r.start for r in ranges], plan.shape)
    return offset % _ALIGNMENT == 0 and all(len(r) == 1 for r in ranges[:last_cut])


class MappedLeaves:
    """Some leaves as pages of their files, which come into memory and are let go of.

    Where the system keeps files in pages of 2 MB, as Linux can on some file systems, the first
    takes next to no time for what it has; and it is asked to read the rest in such pages.
    """

    def __init__(self, plans: Mapping[int, LeafPlan]) -> None:
        """Open nothing yet.

        **Arguments:**

        - `plans`: as `can_be_mapped` wants, each with its place among the leaves.
        """
        self.plans = plans
        self._mapped: dict[int, tuple[np.ndarray, Array]] = {}

    def read(self, pool: ThreadPoolExecutor) -> dict[int, Array]:
        """The leaves, all in memory, if it has the room.

        **Arguments:**

        - `pool`: threads, several of which wait for the disk at a time.

        **Raises:** `CheckpointError` if a file is gone or has changed since its header was read;
        `OSError` if it cannot be read.
        """
        coming = []
        for i, plan in self.plans.items():
            file: Any = plan.sources[0].file
            if i in self._mapped:
                file.check()
            else:  # once: it takes longer than to have the pages again
                self._mapped[i] = _map(plan)
            values, _ = self._mapped[i]
            if values.nbytes < pages.LARGE:
                _have_in_memory(file.path, values, *pages.of_array(values))
                continue
            coming += [
                pool.submit(_have_in_memory, file.path, values, *stretch)
                for stretch in pages.stretches(*pages.of_array(values))
            ]
        wait(coming)
        for stretch in coming:
            stretch.result()
        return {i: leaf for i, (_, leaf) in self._mapped.items()}

    def let_go(self) -> None:
        """Give the pages back: the system may keep them, but they do not count as this process's
        memory any more. To use the leaves is to read them again."""
        for values, _ in self._mapped.values():
            pages.let_go(*pages.of_array(values))


def _map(plan: LeafPlan) -> tuple[np.ndarray, Array]:
    """A file's array, and the leaf that lies in it."""
    source: Any = plan.sources[0]
    values = np.asarray(source.file.open(source.span))
    pages.ask_for_large(*pages.of_array(values))
    parts = [jax.device_put(values[i], device) for device, i in _places(plan).items()]
    return values, jax.make_array_from_single_device_arrays(plan.shape, plan.sharding, parts)


def _have_in_memory(path: Path, values: np.ndarray, address: int, n_bytes: int) -> None:
    """Have some pages of a file's array read, and found by this process."""
    try:
        if not pages.have_in_memory(address, n_bytes):
            first = max(0, address - values.ctypes.data)
            np.bitwise_or.reduce(values.reshape(-1).view(np.uint8)[first:][:n_bytes:PAGE])
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(path)) from e
