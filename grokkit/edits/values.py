"""Edits that compute a new value for an activation: replace, add, scale, any function."""

import abc
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from grokkit.config import GrokConfig
from grokkit.edits.selection import Selector, Where, at_axis
from grokkit.errors import SiteError
from grokkit.taps import SITES, At, site


def _like(array: Array, value: Array) -> Array:
    """`array` broadcast to an activation's shape and laid out as it is."""
    array = jnp.broadcast_to(array, value.shape)
    return jax.reshard(array, jax.typeof(value).sharding.spec)


def as_array(value: Any) -> Any:
    return jnp.asarray(value, jnp.float32) if isinstance(value, int | float) else jnp.asarray(value)


def aligned(new: Array, name: str, value: Array, at: At) -> tuple[Array, Array | None]:
    """A replacement brought to an activation's shape, and where it has values.

    An axis more than the site has is the layers. A position axis longer than one holds absolute
    positions from 0, and keys beyond a pattern's end count as zero.
    """
    axes = SITES[name].axes
    if new.ndim == value.ndim + 1:
        new = jax.lax.dynamic_index_in_dim(new, at.layer, keepdims=False)
    new = new.reshape(*(1,) * (value.ndim - new.ndim), *new.shape)
    if axes[-1] == "key" and 1 < new.shape[-1] != value.shape[-1]:
        missing = max(value.shape[-1] - new.shape[-1], 0)
        new = jnp.pad(new[..., : value.shape[-1]], [(0, 0)] * (new.ndim - 1) + [(0, missing)])
    place = axes.index("query" if "query" in axes else "position")
    length = new.shape[place]
    if length == 1:
        return new, None
    positions = jax.reshard(at.positions, P())
    new = jnp.broadcast_to(new, (positions.shape[0], *new.shape[1:]))
    taken = jax.vmap(lambda row, i: jnp.take(row, i, axis=place - 1))(
        new, jnp.minimum(positions, length - 1)
    )
    return taken, at_axis(positions < length, place, value.ndim)


class Edit(eqx.Module):
    """What all edits share: a site, where to act, and a new value for the activation there."""

    site: eqx.AbstractVar[str]
    where: eqx.AbstractVar[Where]

    @property
    def acts_on(self) -> tuple[str, ...]:
        """The sites that the edit changes."""
        return (self.site,)

    @abc.abstractmethod
    def change(self, name: str, value: Array, at: At) -> tuple[Array, Array | None]:
        """The new activation, and a mask of where it holds (`None`: everywhere)."""

    def check(self, config: GrokConfig, lengths: np.ndarray) -> None:
        """**Raises:** `SiteError` if the edit does not fit the model or the prompts."""

    def __call__(self, name: str, value: Array, at: At) -> Array:
        """The activation after this edit."""
        new, holds = self.change(name, value, at)
        new = _like(new.astype(value.dtype), value)
        for mask in (self.where.mask(name, value, at), holds):
            if mask is not None:
                new = jnp.where(_like(mask, value), new, value)
        return new


def resolve(
    edits: Sequence[Edit], config: GrokConfig, lengths: Sequence[int] | np.ndarray
) -> tuple[Edit, ...]:
    """Check edits against a model and its prompts, and turn their selections into masks.

    **Arguments:**

    - `edits`: as the user wrote them.
    - `config`: the model's.
    - `lengths`: tokens in each prompt.

    **Raises:** `SiteError` naming what does not exist or fit.
    """
    lengths = np.asarray(lengths)
    resolved = []
    for i, edit in enumerate(edits):
        what = f"edit {i} ({type(edit).__name__} of {edit.site!r})"
        found, where = site(edit.site), edit.where
        for field, axis in (("heads", "head"), ("experts", "expert")):
            fits = axis in found.axes or (axis == "expert" and "choice" in found.axes)
            if getattr(where, field) is not None and not fits:
                raise SiteError(f"{what}: `{field}` does not apply; the site's axes are "
                                f"{', '.join(found.axes)}")  # fmt: skip
        if where.layers is not None and not found.in_layer:
            raise SiteError(f"{what}: this site is not in a layer, so `layers` does not apply")
        edit.check(config, lengths)
        mask = where.resolve(config, lengths, what)
        resolved.append(
            eqx.tree_at(lambda e: e.where, edit, mask, is_leaf=lambda x: isinstance(x, Where))
        )
    return tuple(resolved)


def site_shape(name: str, config: GrokConfig, batch: int, n: int) -> tuple[int, ...]:
    """Shape of one layer's activation for `batch` sequences of `n` tokens."""
    sizes = {
        "batch": batch, "position": n, "query": n, "key": n, "d_model": config.d_model,
        "head": config.n_heads, "kv_head": config.n_kv_heads, "d_head": config.d_head,
        "expert": config.n_experts, "choice": config.n_experts_per_token,
        "vocab": config.vocab_size,
    }  # fmt: skip
    return tuple(sizes[axis] for axis in SITES[name].axes)


def check_value(name: str, value: Any, config: GrokConfig, lengths: np.ndarray, what: str) -> None:
    """Refuse a value whose shape cannot be brought to the site's."""
    shape = jnp.shape(value)
    expected = site_shape(name, config, len(lengths), int(max(lengths)))
    axes = SITES[name].axes
    if len(shape) == len(expected) + 1 and SITES[name].in_layer and shape[0] == config.n_layers:
        shape = shape[1:]
    free = ("position", "query", "key")
    ok = len(shape) <= len(expected) and all(
        size in (1, full) or axis in free
        for size, full, axis in zip(shape[::-1], expected[::-1], axes[::-1], strict=False)
    )
    if not ok:
        raise SiteError(
            f"{what} of {name!r}: a value of shape {jnp.shape(value)} does not fit the site's "
            f"{' x '.join(axes)} = {expected}, nor that with {config.n_layers} layers in front"
        )


class Replace(Edit):
    """Put a value in an activation's place: patching, or ablation to zero or to a mean.

    `value` broadcasts to the site's axes from the right; with one axis more, the first is the
    layer, so that `Replace("resid_post", cache["resid_post"], layers=[3])` patches from a cache.
    A position axis longer than one holds absolute positions from 0.
    """

    site: str = eqx.field(static=True)
    value: Float[Array, "..."] | Int[Array, "..."]
    where: Where

    def __init__(self, site: str, value: Any, **where: Selector) -> None:
        self.site, self.value, self.where = site, as_array(value), Where(**where)

    def check(self, config: GrokConfig, lengths: np.ndarray) -> None:
        check_value(self.site, self.value, config, lengths, "Replace")

    def change(self, name: str, value: Array, at: At) -> tuple[Array, Array | None]:
        return aligned(self.value, name, value, at)


class Add(Edit):
    """Add a value to an activation: steering. `value` is shaped as in `Replace`."""

    site: str = eqx.field(static=True)
    value: Float[Array, "..."]
    scale: Float[Array, ""]
    where: Where

    def __init__(self, site: str, value: Any, scale: Any = 1.0, **where: Selector) -> None:
        self.site, self.value, self.scale = site, as_array(value), as_array(scale)
        self.where = Where(**where)

    def check(self, config: GrokConfig, lengths: np.ndarray) -> None:
        check_value(self.site, self.value, config, lengths, "Add")

    def change(self, name: str, value: Array, at: At) -> tuple[Array, Array | None]:
        new, holds = aligned(self.value, name, value, at)
        return value + _like(new * self.scale, value), holds


class Scale(Edit):
    """Multiply an activation by a factor, shaped as `value` in `Replace`; 0 ablates."""

    site: str = eqx.field(static=True)
    factor: Float[Array, "..."]
    where: Where

    def __init__(self, site: str, factor: Any, **where: Selector) -> None:
        self.site, self.factor, self.where = site, as_array(factor), Where(**where)

    def check(self, config: GrokConfig, lengths: np.ndarray) -> None:
        check_value(self.site, self.factor, config, lengths, "Scale")

    def change(self, name: str, value: Array, at: At) -> tuple[Array, Array | None]:
        new, holds = aligned(self.factor, name, value, at)
        return value * _like(new, value), holds


class Apply(Edit):
    """Any function of the activation: `function(value, *arguments)`, of the same shape.

    The function is part of the compiled program; `arguments` (arrays) are inputs of it.
    """

    site: str = eqx.field(static=True)
    function: Callable[..., Array] = eqx.field(static=True)
    arguments: tuple[Any, ...]
    where: Where

    def __init__(
        self, site: str, function: Callable[..., Array], *arguments: Any, **where: Selector
    ) -> None:
        self.site, self.function, self.where = site, function, Where(**where)
        self.arguments = tuple(jax.tree.map(as_array, a) for a in arguments)

    def change(self, name: str, value: Array, at: At) -> tuple[Array, Array | None]:
        new = self.function(value, *self.arguments)
        if new.shape != value.shape:
            raise SiteError(f"Apply of {name!r}: the function returned shape {new.shape} for an "
                            f"activation of shape {value.shape}")  # fmt: skip
        return new, None
