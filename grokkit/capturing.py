"""A pass over many prompts that writes what it captures to disk, layer by layer.

Some prompts at a time go through each layer, all of them before the next layer is read. What
they show goes into the layer's file, and the stream that leaves the layer is kept beside it, so
that a pass that was cut off begins again at its layer.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array
from tqdm.auto import tqdm

from grokkit.abstract_model import PREFILL_PART, Model
from grokkit.activation_cache import described
from grokkit.errors import PromptError, SiteError
from grokkit.layers.block import Rows, run_layer
from grokkit.layers.ends import enter, leave
from grokkit.processes import (
    agree,
    by_first,
    from_first,
    is_first,
    share,
    spans_processes,
    to_host,
)
from grokkit.stored_captures import (
    AFTER,
    BEFORE,
    MANIFEST,
    Arrays,
    Store,
    StoredCaptures,
    layer_name,
    open_captures,
    read_captures_json,
    refused,
)
from grokkit.taps import SITES, Capture, Change

_Kept = dict[str, Any]


def capture_to(
    model: Model,
    mesh: Mesh,
    directory: Path,
    tokens: np.ndarray,
    lengths: np.ndarray,
    captures: tuple[Capture, ...],
    edits: tuple[Change, ...] = (),
    rows: int | None = None,
    progress: bool = True,
) -> StoredCaptures:
    """Capture activations of prompts into a directory; see `LanguageModel.capture_to`.

    **Arguments:**

    - `model`, `mesh`: the model and the mesh it lies on.
    - `directory`: to write to, or to go on in.
    - `tokens`, `lengths`: rows of ids, and how many of each are real.
    - `captures`, `edits`: resolved against the model and the prompts.
    - `rows`: prompts that run at once.
    - `progress`: show a progress bar.
    """
    together = spans_processes(mesh)
    with jax.set_mesh(mesh), ExitStack() as until_done:
        sweep = _Sweep(model, mesh, tokens, lengths, captures, edits, rows)
        store = agree(lambda: _asked_alike(sweep.store(directory)), together)

        def begin() -> tuple[bool, int, list[str]]:
            if store.is_complete:
                store.check_request()
                return True, 0, []
            until_done.enter_context(store.alone())
            return store.is_complete, *store.begin(tokens, lengths)

        is_complete, first, there = share(begin, together)
        agree(lambda: _seen_alike(directory), together)
        if not is_complete:
            sweep.run(store, first, there, progress and is_first())
    return open_captures(directory)


def _asked_alike(store: Store) -> tuple[Store, dict[str, str]]:
    """What several processes must have been asked alike."""
    return store, {
        name: value if isinstance(value, str) else f"those with the digest {_digest_json(value)}"
        for name, value in store.request.items()
    }


def _seen_alike(directory: Path) -> tuple[None, dict[str, str]]:
    """That every process sees the directory which process 0 writes to, since all return what it holds.

    **Raises:** `CaptureError` in one that does not.
    """
    if not (directory / MANIFEST).is_file():
        raise refused(
            directory, "the captures that process 0 has begun there", "none that this process sees",
            "choose a directory on a file system that every machine sees",
        )  # fmt: skip
    digest = _digest_json(read_captures_json(directory))
    return None, {f"captures in {directory}": f"those with the digest {digest}"}


class _Sweep:
    """What goes through the layers, and what is kept of it."""

    def __init__(
        self,
        model: Model,
        mesh: Mesh,
        tokens: np.ndarray,
        lengths: np.ndarray,
        captures: tuple[Capture, ...],
        edits: tuple[Change, ...],
        rows: int | None,
    ) -> None:
        self.model, self.mesh, self.edits = model, mesh, edits
        self.together = spans_processes(mesh)
        self.tokens, self.lengths, self.captures = tokens, lengths, captures
        self.rows = _rows(mesh, tokens, edits, rows)
        n_layers = model.config.n_layers
        inside = [c for c in captures if SITES[c.site].in_layer]
        self.before = tuple(c for c in captures if c.site == "embed")
        self.after = tuple(c for c in captures if c not in inside and c not in self.before)
        self.of_layer = [tuple(c for c in inside if c.is_in(i)) for i in range(n_layers)]
        # Layers beyond the last that shows anything are not run.
        wanted = [i for i, of in enumerate(self.of_layer) if of]
        self.stop = n_layers if self.after else max(wanted, default=-1) + 1

    # What there will be

    def store(self, directory: Path) -> Store:
        """The directory, with the files that it will hold."""
        shapes = self._shapes()
        files: dict[str, Arrays] = {}
        each = [(BEFORE, self.before), (AFTER, self.after)]
        each[1:1] = [(layer_name(i), of) for i, of in enumerate(self.of_layer)]
        for name, of in each:
            # Larger entries first, so that each array begins at a multiple of its entries' size.
            found = sorted(((c.key, *shapes[c.key]) for c in of), key=lambda a: -a[1].itemsize)
            if found:
                files[name] = {key: (dtype, shape) for key, dtype, shape in found}
        notes = {}
        for c in self.captures:
            axes, layers = described(c, self.model.config.n_layers)
            notes[c.key] = {"site": c.site, "axes": axes and list(axes),
                            "layers": layers and list(layers)}  # fmt: skip
        return Store(directory, self._request(), files, notes)

    def _shapes(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Dtype and shape of each capture, of all prompts and one layer.

        **Raises:** `SiteError` for a reduction that gives something else than one array, or, if
        not all prompts run at once, whose first axis is not the batch.
        """
        n, found = len(self.tokens), {}
        at_once = self._kept(self.programs)
        reduced = self.rows < n and any(c.reduce for c in self.captures)
        twice = self._kept(self._lowered(2 * self.rows)) if reduced else at_once
        for c in self.captures:
            value = at_once[c.key]
            if isinstance(value, tuple | list | dict) or not hasattr(value, "shape"):
                raise SiteError(f"{c.key!r}: only single arrays can be written, and its reduction "
                                f"returned a {type(value).__name__}")  # fmt: skip
            shape = value.shape
            if self.rows < n:
                lead = shape[:1], twice[c.key].shape[:1]
                if c.reduce is not None and lead != ((self.rows,), (2 * self.rows,)):
                    raise SiteError(
                        f"{c.key!r}: expected a reduction that keeps the batch as its first axis, "
                        f"since {self.rows} of {n} prompts run at once; found one of shape {shape}. "
                        f"Pass rows={n} to run all at once"
                    )
                shape = (n, *shape[1:])
            if SITES[c.site].in_layer:
                shape = (1, *shape)
            found[c.key] = np.dtype(value.dtype), shape
        return found

    @functools.cached_property
    def programs(self) -> list[Any]:
        """What is compiled for the beginning, for a layer, and for the end, not yet compiled."""
        return self._lowered(self.rows)

    def _lowered(self, n_rows: int) -> list[Any]:
        ids = np.zeros((n_rows, self.tokens.shape[1]), np.int32)
        counts = np.ones(n_rows, np.int32)
        ends, dtype, layer = self.model.ends, self.model.dtype, jnp.int32(0)
        inside = tuple(dict.fromkeys(c for of in self.of_layer for c in of))
        entering = (None, counts, self.before, self.edits)
        x, rows, _ = jax.eval_shape(lambda ends: enter(ends, ids, *entering), ends)
        block = jax.eval_shape(lambda model: model.block(layer), self.model.shapes())
        layers = run_layer.lower(block, x, rows, None, layer, dtype, inside, self.edits)
        leaves = leave.lower(ends, x, rows, False, self.after, self.edits)
        return [enter.lower(ends, ids, *entering), layers, leaves]

    def _kept(self, programs: list[Any]) -> _Kept:
        """What the captures of each program keep, without data."""
        return {key: value for program in programs for key, value in program.out_info[-1].items()}

    # What must be the same for a sweep to go on

    def _request(self) -> dict[str, Any]:
        import grokkit  # its version is made after this module

        captures = [
            {
                "name": c.key, "site": c.site, "positions": repr(c.positions),
                "layers": "all" if c.layers is None else repr(c.layers),
                "reduce": c.reduce and getattr(c.reduce, "__qualname__", type(c.reduce).__name__),
            }
            for c in self.captures
        ]  # fmt: skip
        arrays = [np.asarray(a) for a in jax.tree.leaves(self.edits)]
        return {
            "prompts": f"{len(self.tokens)} of {self.tokens.shape[1]} tokens, "
                       f"{_digest(self.tokens, self.lengths)}",
            "captures": captures,
            "edits": [type(e).__name__ for e in self.edits] + ([_digest(*arrays)] if arrays else []),
            "checkpoint": self.model.digest(),
            "prompts at once": self.rows,
            "mesh": " x ".join(f"{axis}={n}" for axis, n in self.mesh.shape.items())
                    + f" of {self.mesh.devices.flat[0].device_kind}"
                    + (f", {jax.process_count()} processes" if self.together else ""),
            "dtype": jnp.dtype(self.model.dtype).name,
            "versions": f"grokkit {grokkit.__version__}, jax {jax.__version__}",
            # Which tells apart what has no name: reductions, and functions of an edit.
            "program": hashlib.sha256("".join(p.as_text() for p in self.programs).encode()).hexdigest()[:32],
        }  # fmt: skip

    # The sweep

    def run(self, store: Store, first: int, there: list[str], progress: bool) -> None:
        """Write every file that is not among those `there`, from layer `first` on.

        Of several processes all compute, and the first writes.

        **Raises:** `CaptureError` if there is no room for them.
        """
        n = len(self.tokens)
        needed = 4 * self.tokens.size * self.model.config.d_model
        self._by_first(lambda: store.check_space(needed))
        due = set(store.files) - set(there)
        rows, stream = self._enter(store, due, first)
        with (
            closing(self.model.layers(first, self.stop)) as blocks,
            tqdm(
                total=self.stop * n, initial=first * n, unit="prompt", desc="capturing",
                disable=not progress,
            ) as bar,
        ):  # fmt: skip
            layer = first
            for block in blocks:  # enumerate would hold on to the last one
                bar.set_postfix_str(f"layer {layer} of {self.stop}")
                with self._writing(store, due, layer_name(layer)) as put:
                    for at, its_rows in zip(self._chunks(), rows, strict=True):
                        x, *_, kept = run_layer(
                            block, self._on_rows(stream[at]), its_rows, None, jnp.int32(layer),
                            self.model.dtype, self.of_layer[layer], self.edits,
                        )  # fmt: skip
                        put(kept, at)
                        stream[at] = to_host(x)
                        bar.update(int(at[-1] - at[0]) + 1)
                del block  # a layer's memory is that of the next but one
                layer += 1
                self._by_first(functools.partial(store.keep_stream, layer, stream))
        with self._writing(store, due, AFTER) as put:
            for at, its_rows in zip(self._chunks() if self.after else [], rows, strict=False):
                x = self._on_rows(stream[at])
                put(leave(self.model.ends, x, its_rows, False, self.after, self.edits)[1], at)
        self._by_first(store.finish)

    def _by_first(self, act: Callable[[], Any]) -> None:
        by_first(act, self.together)

    def _chunks(self) -> list[np.ndarray]:
        """Which prompts run at once; the last one fills the last chunk up."""
        n = len(self.tokens)
        starts = range(0, n, self.rows)
        return [np.minimum(np.arange(start, start + self.rows), n - 1) for start in starts]

    def _enter(self, store: Store, due: set[str], first: int) -> tuple[list[Rows], np.ndarray]:
        """What layers need besides the stream, for each chunk; and the stream that enters `first`."""
        stream = np.empty((*self.tokens.shape, self.model.config.d_model), np.float32)
        rows = []
        with self._writing(store, due, BEFORE) as put:
            for at in self._chunks():
                ids, lengths = self._on_rows(self.tokens[at]), self._on_rows(self.lengths[at])
                x, its_rows, kept = enter(
                    self.model.ends, ids, None, lengths, self.before, self.edits
                )
                stream[at] = to_host(x)
                put(kept, at)
                rows.append(its_rows)
        if first:
            self._by_first(lambda: np.copyto(stream, store.stream(first)))
            for at in self._chunks():
                stream[at] = from_first(stream[at], self.together)
        return rows, stream

    @contextmanager
    def _writing(
        self, store: Store, due: set[str], name: str
    ) -> Iterator[Callable[[_Kept, np.ndarray], None]]:
        """A function that writes what some prompts show into a file, if the file is due."""
        if (
            name not in due
        ):  # nothing is captured there, or it was complete when the sweep was cut off
            yield lambda kept, at: None
            return
        stack, opened = ExitStack(), []

        def write(found: dict[str, np.ndarray], at: np.ndarray) -> None:
            new = int(at[-1] - at[0]) + 1  # the last chunk may repeat its last prompt
            for key, value in found.items():
                part = value[:new] if self.rows < len(self.tokens) else value
                opened[0].put(key, part, int(at[0]))

        with stack:
            self._by_first(lambda: opened.append(stack.enter_context(store.writing(name))))
            yield lambda kept, at: self._by_first(functools.partial(write, to_host(kept), at))
            self._by_first(stack.close)

    def _on_rows(self, a: np.ndarray) -> Array:
        # A copy: the stream is used up by the layer, and its memory is ours.
        return jax.device_put(a, NamedSharding(self.mesh, P("data")), may_alias=False)


def _rows(mesh: Mesh, tokens: np.ndarray, edits: tuple[Change, ...], rows: int | None) -> int:
    """How many prompts run at once. **Raises:** `PromptError`."""
    n, data = len(tokens), mesh.shape["data"]
    if rows is None:
        rows = n if edits else min(n, max(PREFILL_PART // tokens.shape[1] // data, 1) * data)
    if not 1 <= rows <= n or rows % data:
        raise PromptError(
            f"rows must be from 1 to the {n} prompts and divide over the mesh's {data} 'data' "
            f"devices, found {rows}"
        )
    if edits and rows < n:
        raise PromptError(
            f"rows: edits may be of single prompts, so that with edits all {n} run at once; found "
            f"{rows}. Leave it out, or capture fewer prompts into a directory"
        )
    return rows


def _digest(*arrays: np.ndarray) -> str:
    """Of the arrays' dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for a in arrays:
        digest.update(f"{a.dtype} {a.shape}\n".encode())
        digest.update(np.ascontiguousarray(a).tobytes())
    return digest.hexdigest()[:32]


def _digest_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
