"""Arrays that are the very pages of their files, which nothing copies.

That is possible on CPU devices, for what lies in a file just as the model holds it; and for 8-bit
matrices that do not, which products there take as they lie, in the file's pages or in other memory:
they are of the official layout, or a device's part of them is not in one piece.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, PyTree

from grokkit.checkpoint import pages
from grokkit.checkpoint.loading import LeafPlan, Parts, finished
from grokkit.checkpoint.pages import PAGE
from grokkit.checkpoint.tensor_file import TensorFile

_ALIGNMENT = 64  # bytes: what XLA asks of host memory that it uses in place
_MOST = 2**31 - 1  # bytes that XLA counts in 32 bits


def as_stored(plans: PyTree) -> PyTree:
    """The plans as they are."""
    return plans


def can_be_mapped(plan: LeafPlan) -> bool:
    """Whether a leaf's parts are stretches of its file, on devices that can use them there."""
    return _lies_in_a_file(plan) and _is_in_place(plan)


def is_soon_copied(plan: LeafPlan) -> bool:
    """Whether a leaf is so small that it is copied from its mapped file, where it cannot be used,
    sooner than read."""
    is_small = plan.nbytes < pages.LARGE and plan.sharding.is_fully_addressable
    return _lies_in_a_file(plan) and is_small


def _lies_in_a_file(plan: LeafPlan) -> bool:
    """Whether a leaf has the entries of one array of one file, and is on devices that could use
    them there."""
    source, *more = plan.sources
    return (
        not more
        and isinstance(source.file, TensorFile)
        and source.layer is None
        and not source.turned
        and source.span.dtype == plan.dtype
        and all(device.platform == "cpu" for device in _places(plan))
    )


def _is_in_place(plan: LeafPlan) -> bool:
    """Whether a leaf's parts are stretches of its file where XLA can use them."""
    is_aligned = plan.sources[0].span.offset % _ALIGNMENT == 0
    return is_aligned and all(_is_stretch(plan, index) for index in _places(plan).values())


def _places(plan: LeafPlan) -> Mapping[Any, Any]:
    return plan.sharding.addressable_devices_indices_map(plan.shape)


def _is_stretch(plan: LeafPlan, index: tuple[slice, ...]) -> bool:
    """Whether a part is in one piece, and begins where XLA can use it if the leaf does."""
    ranges = [range(*s.indices(n)) for s, n in zip(index, plan.shape, strict=True)]
    last_cut = max((i for i, n in enumerate(plan.shape) if len(ranges[i]) < n), default=0)
    offset = plan.dtype.itemsize * int(np.ravel_multi_index([r.start for r in ranges], plan.shape))
    return offset % _ALIGNMENT == 0 and all(len(r) == 1 for r in ranges[:last_cut])


Files = dict[Path, np.ndarray]
"""Files that are mapped as a whole: their bytes."""


class MappedLeaves:
    """Some leaves as pages of their files, which come into memory and are let go of.

    Where the system keeps files in pages of 2 MB, as Linux can on some file systems, the first
    takes next to no time for what it has; and it is asked to read the rest in such pages.
    """

    def __init__(self, plans: Mapping[int, LeafPlan], files: Files) -> None:
        """Open nothing yet.

        **Arguments:**

        - `plans`: as `can_be_mapped` or `is_soon_copied` want, each with its place among the leaves.
        - `files`: those that have been mapped, to which others are added. They are mapped as a
            whole, for a large page that is half another leaf's is there for both.
        """
        self.plans = plans
        self._files = files
        self._runs = list(_runs(plans.values()))
        self._in_place: dict[int, Array] = {}

    def read(self, pool: ThreadPoolExecutor, parts: Callable[[int], Parts]) -> dict[int, Array]:
        """The leaves, all in memory, if it has the room.

        **Arguments:**

        - `pool`: threads, several of which wait for the disk at a time.
        - `parts`: gives the memory for a leaf, by its place, if it cannot be used in its file.

        **Raises:** `CheckpointError` if a file is gone or has changed since its header was read;
        `OSError` if it cannot be read.
        """
        coming = []
        for run in self._runs:
            run.file.check()
            path = run.file.path
            if path not in self._files:  # once: it takes longer than to have the pages again
                self._files[path] = run.file.mapped()
                pages.ask_for_large(*pages.of_array(self._files[path]))
            there, step = self._bytes(run), pages.AT_ONCE // 4
            if there.nbytes < pages.LARGE or not pages.missing(path, *pages.of_array(there), step):
                _have_in_memory(path, there)  # sooner than another thread could be told
                continue
            coming += [
                pool.submit(_have_in_memory, path, there[i : i + pages.AT_ONCE])
                for i in range(0, there.nbytes, pages.AT_ONCE)
            ]
        wait(coming)
        for stretch in coming:
            stretch.result()
        return {i: self._leaf(i, parts) for i in self.plans}

    def _leaf(self, i: int, parts: Callable[[int], Parts]) -> Array:
        if i in self._in_place:
            return self._in_place[i]
        plan = self.plans[i]
        values = self._values(plan)
        if not _is_in_place(plan):
            memory = parts(i)
            for device, index in _places(plan).items():
                memory[device].write(..., values[index])
            return finished(plan, memory)
        devices = [jax.device_put(values[index], device) for device, index in _places(plan).items()]
        leaf = jax.make_array_from_single_device_arrays(plan.shape, plan.sharding, devices)
        self._in_place[i] = leaf
        return leaf

    def _values(self, plan: LeafPlan) -> np.ndarray:
        """A leaf's entries in the file."""
        source: Any = plan.sources[0]
        span, whole = source.span, self._files[source.file.path]
        values = whole[span.offset : span.offset + span.nbytes]
        return values.view(span.dtype).reshape(span.shape)

    def let_go(self) -> None:
        """Give the pages back: the system may keep them, but they do not count as this process's
        memory any more. To use the leaves is to read them again."""
        for run in self._runs:
            if run.file.path in self._files:
                pages.let_go(*pages.of_array(self._bytes(run)))

    def _bytes(self, run: "_Run") -> np.ndarray:
        return self._files[run.file.path][run.start : run.stop]


class _Run(NamedTuple):
    """Bytes of a file in which leaves follow each other."""

    file: TensorFile
    start: int
    stop: int


def _runs(plans: Iterable[LeafPlan]) -> Iterator[_Run]:
    """Where some leaves lie; between those of a run is less than a page."""
    sources: list[Any] = [plan.sources[0] for plan in plans]
    sources.sort(key=lambda source: (source.file.path, source.span.offset))
    present: _Run | None = None
    for file, span in ((source.file, source.span) for source in sources):
        start, stop = span.offset, span.offset + span.nbytes
        if present and present.file.path == file.path and start - present.stop < PAGE:
            present = present._replace(stop=max(stop, present.stop))
            continue
        if present:
            yield present
        present = _Run(file, start, stop)
    if present:
        yield present


def _have_in_memory(path: Path, there: np.ndarray) -> None:
    """Have some of a mapped file's bytes read, and found by this process."""
    try:
        if not pages.have_in_memory(*pages.of_array(there)):
            np.bitwise_or.reduce(there[::PAGE])
            there[-1:].tobytes()
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(path)) from e
