"""Where an edit acts: layers, positions, heads, experts and batch rows, as masks."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool

from grokkit.config import GrokConfig
from grokkit.errors import SiteError
from grokkit.taps import SITES, At

Selector = int | Sequence[int] | slice | range | np.ndarray | Array | None
"""Indices, negative ones from the end; or booleans [index], or [batch, index] to select
differently for each sequence of the batch. `None` selects all."""


class Where(eqx.Module):
    """On which layers, positions, heads, experts and batch rows an edit acts.

    As written by a user the fields are `Selector`s; `resolve` makes masks of them.
    """

    layers: Any = None
    positions: Any = None
    """Negative ones count from the end of each sequence's prompt. An open-ended slice goes on
    over the generated tokens."""
    heads: Any = None
    experts: Any = None
    rows: Any = None

    def resolve(self, config: GrokConfig, lengths: np.ndarray, what: str) -> "Where":
        """The same as boolean masks, checked against the model and the prompts' lengths."""
        n_rows = len(lengths)

        def mask(name: str, selector: Selector, size: int) -> Any:
            if selector is None:
                return None
            return jnp.asarray(_mask(selector, size, n_rows, f"{what}: {name}"))

        return Where(
            layers=mask("layers", self.layers, config.n_layers),
            positions=None
            if self.positions is None
            else jnp.asarray(_position_mask(self.positions, lengths, config.context_length, what)),
            heads=mask("heads", self.heads, config.n_heads),
            experts=mask("experts", self.experts, config.n_experts),
            rows=mask("rows", self.rows, n_rows),
        )

    def mask(self, name: str, value: Array, at: At) -> Bool[Array, "..."] | None:
        """Which entries of a site's activation are selected, `None` for all."""
        axes = SITES[name].axes
        masks = []
        if self.layers is not None:
            masks.append(_lead(self.layers[..., at.layer], value.ndim))
        if self.rows is not None:
            masks.append(_lead(self.rows, value.ndim))
        if self.positions is not None:
            place = axes.index("query" if "query" in axes else "position")
            positions = jax.reshard(at.positions, P())
            chosen = jnp.take_along_axis(
                jnp.broadcast_to(self.positions, (positions.shape[0], self.positions.shape[-1])),
                jnp.minimum(positions, self.positions.shape[-1] - 1),
                axis=1,
            )
            masks.append(at_axis(chosen, place, value.ndim))
        if self.heads is not None:
            masks.append(at_axis(self.heads, axes.index("head"), value.ndim))
        if self.experts is not None and "expert" in axes:
            masks.append(at_axis(self.experts, axes.index("expert"), value.ndim))
        elif self.experts is not None:
            chosen_experts = jax.reshard(at.seen["expert_indices"], P())
            table = jnp.broadcast_to(
                self.experts, (chosen_experts.shape[0], self.experts.shape[-1])
            )
            hit = jax.vmap(lambda t, e: t[e])(table, chosen_experts)
            masks.append(hit.reshape(*hit.shape, *(1,) * (value.ndim - hit.ndim)))
        if not masks:
            return None
        out = masks[0]
        for m in masks[1:]:
            out = out & m
        return out


def _mask(selector: Selector, size: int, n_rows: int, what: str) -> np.ndarray:
    """Indices or booleans as a boolean mask [index] or [batch, index]."""
    if isinstance(selector, slice):
        selector = range(*selector.indices(size))
    array = np.asarray(selector)
    if array.dtype == bool:
        if array.shape not in ((size,), (n_rows, size)):
            raise SiteError(
                f"{what}: a boolean selection must have shape ({size},) or ({n_rows}, {size}), "
                f"found {array.shape}"
            )
        out = array
    else:
        array = np.atleast_1d(array)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise SiteError(f"{what}: expected integers, found {selector!r}")
        for i in array.tolist():
            if not -size <= i < size:
                raise SiteError(f"{what}: there is no {i}; there are {size}, 0 to {size - 1}")
        out = np.zeros(size, bool)
        out[array.astype(int)] = True
    if not out.any():
        raise SiteError(f"{what}: the selection is empty, so the edit would do nothing")
    return out


def _position_mask(selector: Selector, lengths: np.ndarray, context: int, what: str) -> np.ndarray:
    """Positions as a mask over the whole context, for each row if its length matters."""
    what = f"{what}: positions"
    array = np.asarray(0 if isinstance(selector, slice) else selector)
    if array.dtype == bool:
        if array.ndim not in (1, 2) or array.shape[-1] > context:
            raise SiteError(f"{what}: a boolean selection must be [position] or [batch, position] "
                            f"of at most {context}, found {array.shape}")  # fmt: skip
        if not array.any():
            raise SiteError(f"{what}: the selection is empty, so the edit would do nothing")
        padding = [(0, 0)] * (array.ndim - 1) + [(0, context - array.shape[-1])]
        return np.pad(array, padding)
    out = np.zeros((len(lengths), context), bool)
    for row, length in zip(out, lengths.tolist(), strict=True):
        if isinstance(selector, slice):
            start, stop, step = selector.start, selector.stop, selector.step
            from_end = [i + length if i is not None and i < 0 else i for i in (start, stop)]
            row[slice(from_end[0], from_end[1], step)] = True
        else:
            indices = np.atleast_1d(array).tolist()
            from_start = [i % length if -length <= i < 0 else i for i in indices]
            row |= _mask(from_start, context, 1, what)
    if not out.any():
        raise SiteError(f"{what}: the selection is empty, so the edit would do nothing")
    return out


def _lead(mask: Array, ndim: int) -> Array:
    """A mask over the batch (or over nothing) with the axes of an activation."""
    return mask.reshape(*mask.shape, *(1,) * (ndim - mask.ndim)) if mask.ndim else mask


def at_axis(mask: Array, place: int, ndim: int) -> Array:
    """A mask [index] or [batch, index] with the index on axis `place` of an activation."""
    batch = mask.shape[0] if mask.ndim == 2 else 1
    shape = [1] * ndim
    shape[0], shape[place] = batch, mask.shape[-1]
    return mask.reshape(shape)
