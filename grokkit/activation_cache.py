"""The activations that captures kept: found by name, sliced, saved, shown as a table."""

import dataclasses
import html
import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PyTree
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from grokkit.errors import SiteError
from grokkit.processes import to_host
from grokkit.runtime import files
from grokkit.taps import SITES, Capture

_HOOKS = {
    re.compile("^" + re.escape(s.hook).replace(r"\{\}", r"(\d+)") + "$"): s.name
    for s in SITES.values()
}


class Layers:
    """An activation of several layers that lie apart, on disk: [layer, ...], read when asked for."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        """Put together `parts`, mapped into memory: one a layer, all of one shape and dtype."""
        self.parts = list(parts)

    @property
    def shape(self) -> tuple[int, ...]:
        """As an array has it."""
        return (len(self.parts), *self.parts[0].shape)

    @property
    def dtype(self) -> np.dtype:
        """As an array has it."""
        return self.parts[0].dtype

    @property
    def nbytes(self) -> int:
        """As an array has it."""
        return sum(part.nbytes for part in self.parts)

    def __getitem__(self, index: Any) -> Any:
        """Of an index of the first axis alone the layers, unread; otherwise what it selects."""
        first, *rest = index if isinstance(index, tuple) else (index,)
        if isinstance(first, int | np.integer):
            return self.parts[first][tuple(rest)] if rest else self.parts[first]
        layers = Layers([self.parts[i] for i in np.arange(len(self.parts))[first].tolist()])
        if not rest:
            return layers
        return np.stack([part[tuple(rest)] for part in layers.parts])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All of it, in memory."""
        if copy is False:
            raise ValueError("layers that lie apart are one array only once they are copied")
        return np.stack(self.parts).astype(self.dtype if dtype is None else dtype, copy=False)


def _in_memory(value: Any) -> Any:
    return np.asarray(value) if isinstance(value, Layers) else value


@dataclasses.dataclass(frozen=True)
class Activation:
    """One capture's result, and what its axes are."""

    value: PyTree[Array | np.ndarray | Layers]
    site: str
    axes: tuple[str, ...] | None
    """Names of the axes; `None` after a reduction, whose axes only its author knows."""
    layers: tuple[int, ...] | None
    """Number of the layer at each index of the first axis; `None` outside the layers."""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole value, all devices together, each part counted once."""
        return sum(a.nbytes for a in jax.tree.leaves(self.value))

    def map(self, f: Any, **changes: Any) -> "Activation":
        """The same with `f` applied to the arrays."""
        return dataclasses.replace(self, value=jax.tree.map(f, self.value), **changes)


def activation(capture: Capture, value: Any, n_layers: int) -> Activation:
    """Name the axes of what a resolved capture kept."""
    axes, layers = described(capture, n_layers)
    return Activation(value, capture.site, axes, layers)


def described(
    capture: Capture, n_layers: int
) -> tuple[tuple[str, ...] | None, tuple[int, ...] | None]:
    """Axes and layers of what a resolved capture keeps, as `Activation` has them."""
    found = SITES[capture.site]
    layers = None
    if found.in_layer:
        layers = tuple(range(n_layers)) if capture.layers is None else capture.layer_numbers
    axes = None
    if capture.reduce is None:
        dropped = "query" if "query" in found.axes else "position"
        kept = tuple(
            a for a in found.axes if not (isinstance(capture.positions, int) and a == dropped)
        )
        axes = ("layer", *kept) if found.in_layer else kept
    return axes, layers


class ActivationCache:
    """Activations by name.

    `cache["pattern"]` is [layer, batch, head, query, key]; `cache["pattern", 3]` is layer 3's;
    `cache["blocks.3.attn.hook_pattern"]`, TransformerLens's name, is the same.
    """

    def __init__(self, entries: dict[str, Activation]) -> None:
        """Hold `entries`; `LanguageModel.run_with_cache` makes them."""
        self.entries = dict(entries)

    def __getitem__(self, key: str | tuple[str, int]) -> Any:
        """The array of a capture, or one layer of it. **Raises:** `SiteError` naming what is."""
        name, layer = (key, None) if isinstance(key, str) else key
        if name not in self.entries and layer is None:
            for pattern, site in _HOOKS.items():
                match = pattern.match(name)
                if match:
                    name = site
                    layer = int(match[1]) if match.groups() else None
                    break
        if name not in self.entries:
            raise SiteError(
                f"this cache has no {key!r}; it has {', '.join(self.entries) or 'nothing'}"
            )
        entry = self.entries[name]
        if layer is None:
            return _in_memory(entry.value)
        if entry.layers is None:
            raise SiteError(f"{name!r} is not in a layer; ask for cache[{name!r}]")
        total = max(entry.layers) + 1
        wanted = layer + total if layer < 0 else layer
        if wanted not in entry.layers:
            raise SiteError(f"{name!r} was captured in layers {list(entry.layers)}, not {layer}")
        i = entry.layers.index(wanted)
        return jax.tree.map(lambda a: a[i], entry.value)

    def __contains__(self, key: object) -> bool:
        """Whether a capture of this name was kept."""
        return key in self.entries

    def __iter__(self) -> Iterator[str]:
        """Names of the captures."""
        return iter(self.entries)

    def __len__(self) -> int:
        """How many captures there are."""
        return len(self.entries)

    def keys(self) -> list[str]:
        """Names of the captures."""
        return list(self.entries)

    def items(self) -> list[tuple[str, Any]]:
        """Names and arrays."""
        return [(name, _in_memory(entry.value)) for name, entry in self.entries.items()]

    @property
    def nbytes(self) -> int:
        """Bytes of all activations."""
        return sum(entry.nbytes for entry in self.entries.values())

    def slice(self, axis: str, index: int | slice | Sequence[int]) -> "ActivationCache":
        """Cut every activation that has `axis` along it; the others stay.

        **Arguments:**

        - `axis`: an axis name of `grokkit.axes`; `"position"` cuts queries too.
        - `index`: an int drops the axis, a slice or a list keeps it. For `"layer"`, indices are
            layer numbers.

        **Raises:** `SiteError` if no activation has the axis, or an index does not exist.
        """
        names = ("position", "query") if axis == "position" else (axis,)
        cut, entries = 0, {}
        for name, entry in self.entries.items():
            place = next((entry.axes.index(a) for a in names if a in entry.axes), None) if (
                entry.axes) else None  # fmt: skip
            if place is None:
                entries[name] = entry
                continue
            cut += 1
            entries[name] = _cut(name, entry, place, index)
        if not cut:
            raise SiteError(f"no activation in this cache has an axis {axis!r}")
        return ActivationCache(entries)

    def to_host(self) -> "ActivationCache":
        """The same as numpy arrays, freeing the devices once this cache is dropped.

        What lies on several processes is gathered: all of them must call this, and each gets
        everything.
        """
        return ActivationCache(
            {k: e.map(lambda a: to_host(_in_memory(a))) for k, e in self.entries.items()}
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, with sites, axes and layers in its metadata.

        Of a cache on several processes, gather it first with `to_host`, and let one process save.

        **Raises:** `SiteError` if a reduction returned something other than one array.
        """
        arrays = {}
        for name, entry in self.entries.items():
            if not hasattr(entry.value, "shape"):
                raise SiteError(f"{name!r}: only single arrays can be saved, and its reduction "
                                f"returned a {type(entry.value).__name__}")  # fmt: skip
            arrays[name] = np.ascontiguousarray(entry.value)
        notes = {
            name: {"site": e.site, "axes": e.axes, "layers": e.layers}
            for name, e in self.entries.items()
        }
        with files.replacing(path) as temporary:
            save_file(arrays, temporary, metadata={"grokkit": json.dumps(notes)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ActivationCache":
        """Read what `save` wrote. **Raises:** `SiteError` for any other file."""
        try:
            with safe_open(path, framework="numpy") as file:
                notes = json.loads((file.metadata() or {})["grokkit"])
                entries = {
                    name: Activation(
                        file.get_tensor(name),
                        note["site"],
                        None if note["axes"] is None else tuple(note["axes"]),
                        None if note["layers"] is None else tuple(note["layers"]),
                    )
                    for name, note in notes.items()
                }
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as e:
            raise SiteError(
                f"{path}: expected a safetensors file that ActivationCache.save wrote, found "
                f"something else ({type(e).__name__}: {e})"
            ) from e
        return cls(entries)

    def table(self) -> list[tuple[str, str, str, str]]:
        """For each activation: name, axes, shape and bytes, as text."""
        return [
            (name, " ".join(e.axes or ("reduced",)), _shapes(e.value), f"{e.nbytes:,}")
            for name, e in self.entries.items()
        ]

    def __repr__(self) -> str:
        rows = [("site", "axes", "shape", "bytes"), *self.table()]
        widths = [max(len(r[i]) for r in rows) for i in range(4)]
        lines = [
            "  " + "  ".join(c.ljust(w) for c, w in zip(row[:3], widths, strict=False))
            + "  " + row[3].rjust(widths[3])
            for row in rows
        ]  # fmt: skip
        return "\n".join([f"ActivationCache, {self.nbytes:,} bytes", *lines])

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><td><code>{html.escape(name)}</code></td><td>{html.escape(axes)}</td>"
            f"<td>{html.escape(shape)}</td><td style='text-align:right'>{size}</td></tr>"
            for name, axes, shape, size in self.table()
        )
        head = "<tr><th>site</th><th>axes</th><th>shape</th><th>bytes</th></tr>"
        return (
            f"<table><caption>ActivationCache, {self.nbytes:,} bytes</caption>"
            f"<thead>{head}</thead><tbody>{cells}</tbody></table>"
        )


def _shapes(value: PyTree[Array | np.ndarray | Layers]) -> str:
    return ", ".join(" x ".join(map(str, a.shape)) or "scalar" for a in jax.tree.leaves(value))


def _cut(name: str, entry: Activation, place: int, index: Any) -> Activation:
    """One activation cut along one axis."""
    assert entry.axes is not None
    axis = entry.axes[place]
    size = entry.value.shape[place]
    layers = entry.layers
    wanted: Any = index
    if not isinstance(index, slice):
        single = isinstance(index, int)
        items = [index] if isinstance(index, int) else [int(i) for i in index]
        known = list(layers) if axis == "layer" and layers is not None else list(range(size))
        for i in items:
            if (i if i >= 0 else i + max(known) + 1) not in known:
                raise SiteError(f"{name!r} has no {axis} {i}; it has {known}")
        items = [known.index(i if i >= 0 else i + max(known) + 1) for i in items]
        wanted = items[0] if single else np.asarray(items)
    if axis == "layer" and layers is not None:
        chosen = np.asarray(layers)[wanted]
        layers = tuple(np.atleast_1d(chosen).tolist())
    axes = entry.axes
    if isinstance(wanted, int):
        axes = axes[:place] + axes[place + 1 :]
        layers = None if axis == "layer" else layers
    where = (slice(None),) * place + (wanted,)
    return entry.map(lambda a: a[where], axes=axes, layers=layers)
