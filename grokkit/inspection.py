"""From what a user asks to see to captures of the forward pass, and what they will cost."""

import dataclasses
import html
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from grokkit.activation_cache import ActivationCache, activation
from grokkit.config import GrokConfig
from grokkit.errors import SiteError
from grokkit.processes import to_host
from grokkit.taps import SITES, Capture

Captures = str | Capture | Sequence[str | Capture] | None
"""Sites by name or as `Capture`s; `None` for every site."""


def as_captures(captures: Captures, config: GrokConfig, n_positions: int) -> tuple[Capture, ...]:
    """Resolved captures, checked against the model.

    **Raises:** `SiteError` for an unknown site, layer or position, two captures of one name, or
    none at all.
    """
    if captures is None:
        captures = list(SITES)
    if isinstance(captures, str | Capture):
        captures = [captures]
    wanted = [Capture(c) if isinstance(c, str) else c for c in captures]
    if not wanted:
        raise SiteError("expected at least one capture, found none; leave the argument out to "
                        "capture every site")  # fmt: skip
    keys = [c.key for c in wanted]
    twice = {k for k in keys if keys.count(k) > 1}
    if twice:
        raise SiteError(f"two captures are called {min(twice)!r}; give one a name, as in "
                        f"Capture(site, name=...)")  # fmt: skip
    return tuple(c.resolve(config.n_layers, n_positions) for c in wanted)


def as_cache(
    captures: tuple[Capture, ...], captured: dict[str, Any], config: GrokConfig
) -> ActivationCache:
    """The results of a forward pass, in the order asked for."""
    return ActivationCache(
        {c.key: activation(c, captured[c.key], config.n_layers) for c in captures}
    )


@dataclasses.dataclass(frozen=True)
class Bill:
    """What captures will take, before anything runs."""

    rows: tuple[tuple[str, str, int, int], ...]
    """For each capture: name, shape, bytes in all, bytes on the fullest device."""
    pass_nbytes: int = 0
    """Bytes of layers that a pass reads from disk; 0 for a model in memory."""
    read_rate: float = math.inf
    """Bytes a second at which they are read, as measured."""

    @property
    def seconds(self) -> float:
        """Seconds that a pass takes to read the layers, which computing overlaps."""
        return self.pass_nbytes / self.read_rate

    @property
    def _reading(self) -> str:
        return (f"a pass reads {self.pass_nbytes / 1e9:.3g} GB from disk: {self.seconds:.3g} s at "
                f"{self.read_rate / 1e9:.3g} GB/s")  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes of all captures, each part counted once."""
        return sum(row[2] for row in self.rows)

    @property
    def bytes_per_device(self) -> int:
        """Bytes that one device holds of all captures."""
        return sum(row[3] for row in self.rows)

    def __repr__(self) -> str:
        width = max(len(row[0]) for row in self.rows)
        shape = max(len(row[1]) for row in self.rows)
        lines = [f"  {n:{width}}  {s:{shape}}  {total:>15,} B  {device:>15,} B a device"
                 for n, s, total, device in self.rows]  # fmt: skip
        last = (f"  {'total':{width}}  {'':{shape}}  {self.nbytes:>15,} B  "
                f"{self.bytes_per_device:>15,} B a device")  # fmt: skip
        reading = [f"  {self._reading}"] if self.pass_nbytes else []
        return "\n".join(["Bill of captures", *lines, last, *reading])

    def _repr_html_(self) -> str:
        rows = [*self.rows, ("total", "", self.nbytes, self.bytes_per_device)]
        cells = "".join(
            f"<tr><td><code>{html.escape(n)}</code></td><td>{s}</td>"
            f"<td style='text-align:right'>{total:,}</td>"
            f"<td style='text-align:right'>{device:,}</td></tr>"
            for n, s, total, device in rows
        )
        head = "<tr><th>capture</th><th>shape</th><th>bytes</th><th>bytes a device</th></tr>"
        reading = f"<p>{self._reading}</p>" if self.pass_nbytes else ""
        return f"<table><thead>{head}</thead><tbody>{cells}</tbody></table>{reading}"


def bill(captured: dict[str, PyTree[jax.ShapeDtypeStruct]]) -> Bill:
    """Add up abstract captures, as `jax.eval_shape` gives them."""
    rows = []
    for name, value in captured.items():
        leaves = jax.tree.leaves(value)
        total = sum(math.prod(a.shape) * a.dtype.itemsize for a in leaves)
        local = sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in leaves)
        shapes = ", ".join(" x ".join(map(str, a.shape)) for a in leaves)
        rows.append((name, shapes, total, local))
    return Bill(tuple(rows))


class GenerationRecorder:
    """Puts captures that arrive token by token into the arrays of one full forward pass."""

    def __init__(
        self, captures: tuple[Capture, ...], config: GrokConfig, lengths: Sequence[int]
    ) -> None:
        for c in captures:
            if c.positions is not None or c.reduce is not None:
                raise SiteError(f"capture of {c.site!r}: while generating, captures take every "
                                f"position and are not reduced; select from the cache "
                                f"afterwards")  # fmt: skip
        self._captures, self._config = captures, config
        self._lengths = list(lengths)
        self._rounds: list[dict[str, Any]] = []

    def add(self, captured: dict[str, Any], prefill: bool) -> None:
        """Take one round's captures: the prompts', or a block of single tokens'."""
        host = to_host(captured)
        if prefill:
            host = {k: v[None] for k, v in host.items()}
        self._rounds.append(host)

    def cache(self, n_new: int) -> ActivationCache:
        """Everything, for prompts continued by `n_new` tokens that were fed to the model.

        Rows shorter than the longest are padded with zeros.
        """
        total = max(self._lengths) + n_new
        entries = {}
        for capture in self._captures:
            parts = [r[capture.key] for r in self._rounds]
            value = self._assemble(capture, parts, total, n_new)
            entries[capture.key] = activation(capture, value, self._config.n_layers)
        return ActivationCache(entries)

    def _assemble(
        self, capture: Capture, parts: list[np.ndarray], total: int, n_new: int
    ) -> np.ndarray:
        found = SITES[capture.site]
        axes = (("layer",) if found.in_layer else ()) + found.axes
        batch = axes.index("batch")
        place = axes.index("query" if "query" in axes else "position")
        keys = axes[-1] == "key"
        prompt = parts[0][0]
        steps = [step for part in parts[1:] for step in part][:n_new]
        shape = list(prompt.shape)
        shape[place] = total
        if keys:
            shape[-1] = total
        fill = -np.inf if capture.site == "attn_scores" else 0
        out = np.full(shape, fill, prompt.dtype)

        def put(row: int, start: int, n: int, source: np.ndarray) -> None:
            to: list[Any] = [slice(None)] * len(axes)
            to[batch], to[place] = row, slice(start, start + n)
            of = list(to)
            of[place] = slice(0, n)
            if keys:
                to[-1] = of[-1] = slice(0, min(total, source.shape[-1]))
            out[tuple(to)] = source[tuple(of)]

        for row, length in enumerate(self._lengths):
            put(row, 0, length, prompt)
            for i, step in enumerate(steps):
                put(row, length + i, 1, step)
        return out


def entropy(p: Array) -> Array:
    """Shannon entropy over the last axis, in nats; a ready `reduce` for a capture."""
    return -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0), axis=-1)
