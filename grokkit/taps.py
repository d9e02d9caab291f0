"""The activation sites, and the one call by which a layer shows and hands over an activation.

A layer writes `q = tap("q", q)`. What the tap does is decided by two values given to the forward
pass: `Capture`s say what to keep, edits (`grokkit.edits`) say what to change. With neither, the
tap is the identity and leaves no trace in the compiled program.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from grokkit.errors import SiteError


@dataclasses.dataclass(frozen=True)
class Site:
    """A named activation: its axes (of one layer) and what it is."""

    name: str
    axes: tuple[str, ...]
    meaning: str
    hook: str
    """TransformerLens's name, with `{}` for the layer; ours where it has none."""

    @property
    def in_layer(self) -> bool:
        """Whether every layer has one."""
        return "{}" in self.hook


_ROW = ("batch", "position")
_STREAM = (*_ROW, "d_model")
_SCORES = ("batch", "head", "query", "key")
_CHOICE = (*_ROW, "choice")
_ALL = (
    Site("embed", _STREAM, "embedding as it enters the stream", "hook_embed"),
    Site("resid_pre", _STREAM, "residual stream before the layer", "blocks.{}.hook_resid_pre"),
    Site("attn_in", _STREAM, "normalised input of attention", "blocks.{}.ln1.hook_normalized"),
    Site("q", (*_ROW, "head", "d_head"), "queries before rotation", "blocks.{}.attn.hook_q"),
    Site("k", (*_ROW, "kv_head", "d_head"), "keys before rotation", "blocks.{}.attn.hook_k"),
    Site("v", (*_ROW, "kv_head", "d_head"), "values", "blocks.{}.attn.hook_v"),
    Site("attn_scores", _SCORES, "soft-capped scores, -inf where masked",
         "blocks.{}.attn.hook_attn_scores"),
    Site("pattern", _SCORES, "attention weights", "blocks.{}.attn.hook_pattern"),
    Site("z", (*_ROW, "head", "d_head"), "each head's weighted values", "blocks.{}.attn.hook_z"),
    Site("attn_out_pre_norm", _STREAM, "attention's output before its closing norm",
         "blocks.{}.attn.hook_out"),
    Site("attn_out", _STREAM, "what attention adds to the stream", "blocks.{}.hook_attn_out"),
    Site("resid_mid", _STREAM, "stream between attention and experts", "blocks.{}.hook_resid_mid"),
    Site("moe_in", _STREAM, "normalised input of router and experts",
         "blocks.{}.ln2.hook_normalized"),
    Site("router_logits", (*_ROW, "expert"), "router's scores of all experts",
         "blocks.{}.mlp.hook_router_logits"),
    Site("router_probs", (*_ROW, "expert"), "softmax over all experts",
         "blocks.{}.mlp.hook_router_probs"),
    Site("expert_indices", _CHOICE, "chosen experts, most probable first",
         "blocks.{}.mlp.hook_expert_indices"),
    Site("expert_weights", _CHOICE, "chosen experts' weights, not renormalised",
         "blocks.{}.mlp.hook_expert_weights"),
    Site("expert_outputs", (*_CHOICE, "d_model"), "chosen experts' outputs, unweighted",
         "blocks.{}.mlp.hook_expert_outputs"),
    Site("moe_out_pre_norm", _STREAM, "weighted sum of experts before its closing norm",
         "blocks.{}.mlp.hook_out"),
    Site("moe_out", _STREAM, "what the experts add to the stream", "blocks.{}.hook_mlp_out"),
    Site("resid_post", _STREAM, "residual stream after the layer", "blocks.{}.hook_resid_post"),
    Site("final_norm", _STREAM, "normalised stream that is unembedded", "ln_final.hook_normalized"),
    Site("logits", (*_ROW, "vocab"), "next-token logits", "hook_logits"),
)  # fmt: skip
SITES: dict[str, Site] = {s.name: s for s in _ALL}
"""Every site, in the order in which the forward pass reaches them."""


def site(name: str) -> Site:
    """The site called `name`. **Raises:** `SiteError` naming those that exist."""
    if name not in SITES:
        raise SiteError(f"no activation site {name!r}; the sites are {', '.join(SITES)}")
    return SITES[name]


@dataclasses.dataclass(frozen=True)
class Capture:
    """What to keep of one site.

    The selection and the reduction are part of the compiled program, so that what is not asked
    for is never stored. Captures are hashable; a new one compiles a new program.
    """

    site: str
    """Name of the site; see `SITES`."""
    layers: int | np.integer | Sequence[int] | np.ndarray | None = None
    """Which layers, negative ones from the last; all by default."""
    positions: int | np.integer | Sequence[int] | np.ndarray | slice | None = None
    """Which positions (queries, for attention); an int drops the axis, as in numpy."""
    reduce: Callable[[Array], Any] | None = None
    """Applied to one layer's selected activation before it is kept; may return any pytree."""
    name: str | None = None
    """Key in the cache; the site's name by default."""

    def __post_init__(self) -> None:
        found = site(self.site)
        layers = (self.layers,) if isinstance(self.layers, int | np.integer) else self.layers
        object.__setattr__(self, "layers", _as_tuple(layers, self.site, "layers"))
        if isinstance(self.positions, np.integer):
            object.__setattr__(self, "positions", int(self.positions))
        elif not isinstance(self.positions, int | slice):
            positions = _as_tuple(self.positions, self.site, "positions")
            object.__setattr__(self, "positions", positions)
        if self.layers is not None and not found.in_layer:
            raise SiteError(f"capture of {self.site!r}: this site is not in a layer, so `layers` "
                            f"does not apply")  # fmt: skip

    def __hash__(self) -> int:
        positions = self.positions
        if isinstance(positions, slice):  # which Python 3.11 cannot hash
            positions = (positions.start, positions.stop, positions.step)
        return hash((self.site, self.layers, positions, self.reduce, self.name))

    @property
    def key(self) -> str:
        """Name under which the result is found."""
        return self.name or self.site

    @property
    def layer_numbers(self) -> tuple[int, ...] | None:
        """Which layers, as given; `None` for all."""
        return cast("tuple[int, ...] | None", self.layers)

    def is_in(self, layer: int) -> bool:
        """Whether it keeps something of a layer."""
        return self.layer_numbers is None or layer in self.layer_numbers

    def resolve(self, n_layers: int, n_positions: int) -> "Capture":
        """The same with every layer and position counted from 0 and checked against the model."""
        layers = self.layer_numbers
        if layers is not None:
            layers = tuple(_from_zero(i, n_layers, self.site, "layer") for i in layers)
            if len(set(layers)) < len(layers):
                raise SiteError(f"capture of {self.site!r}: a layer is named twice in layers "
                                f"{self.layers}")  # fmt: skip
        positions = self.positions
        if isinstance(positions, int):
            positions = _from_zero(positions, n_positions, self.site, "position")
        elif isinstance(positions, tuple):
            positions = tuple(_from_zero(i, n_positions, self.site, "position") for i in positions)
        elif isinstance(positions, slice) and not range(*positions.indices(n_positions)):
            raise SiteError(f"capture of {self.site!r}: positions {positions} match none of "
                            f"{n_positions}")  # fmt: skip
        return dataclasses.replace(self, layers=layers, positions=positions)

    def select(self, value: Array) -> Any:
        """One layer's activation, cut to the positions asked for and reduced."""
        if self.positions is not None:
            axes = SITES[self.site].axes
            axis = axes.index("query" if "query" in axes else "position")
            chosen = self.positions
            if isinstance(chosen, tuple):
                value = jnp.stack(
                    [jax.lax.index_in_dim(value, i, axis, keepdims=False) for i in chosen], axis
                )
            elif isinstance(chosen, int):
                value = jax.lax.index_in_dim(value, chosen, axis, keepdims=False)
            else:
                value = value[(slice(None),) * axis + (chosen,)]
        return value if self.reduce is None else self.reduce(value)


def _as_tuple(indices: Any, where: str, what: str) -> tuple[int, ...] | None:
    """Indices in a hashable form."""
    if indices is None:
        return None
    found = tuple(int(i) for i in indices)
    if not found:
        raise SiteError(f"capture of {where!r}: {what} is empty, so it would match nothing; leave "
                        f"it out to keep all")  # fmt: skip
    return found


def _from_zero(i: int, size: int, where: str, what: str) -> int:
    if not -size <= i < size:
        raise SiteError(f"{where!r}: there is no {what} {i}; there are {size}, 0 to {size - 1}")
    return i % size


@runtime_checkable
class Change(Protocol):
    """What the tap needs of an edit: where it acts, and the new value there."""

    @property
    def acts_on(self) -> tuple[str, ...]: ...

    def __call__(self, site: str, value: Array, at: "At") -> Array: ...


@dataclasses.dataclass(frozen=True)
class At:
    """Where in the forward pass a tap is: what an edit may consult."""

    layer: Int[Array, ""] | None
    """Index of the layer; `None` outside the layers."""
    positions: Int[Array, "batch position"]
    """Absolute position of each token."""
    seen: dict[str, Array]
    """This layer's activations so far, by site, edits included."""


class Tap:
    """One layer's view of the captures and edits; lives only while that layer is traced."""

    def __init__(
        self,
        captures: tuple[Capture, ...] = (),
        edits: tuple[Change, ...] = (),
        layer: Int[Array, ""] | None = None,
        positions: Int[Array, "batch position"] | None = None,
    ) -> None:
        self._captures = captures
        self._edits = edits
        self._at = At(layer, jnp.zeros((1, 1), jnp.int32) if positions is None else positions, {})
        self.captured: dict[str, Any] = {}
        """What the captures kept, by their key."""

    def move_to(self, positions: Int[Array, "batch position"]) -> None:
        """Say that the activations that follow are of these absolute positions."""
        self._at = dataclasses.replace(self._at, positions=positions)

    def wants(self, name: str) -> bool:
        """Whether anything looks at or changes this site."""
        return any(c.site == name for c in self._captures) or any(
            name in e.acts_on for e in self._edits
        )

    def __call__(self, name: str, value: Array) -> Array:
        """Show `value` to the edits, in order, then to the captures; return what it became."""
        for edit in self._edits:
            if name in edit.acts_on:
                value = edit(name, value, self._at)
        if self._edits:
            self._at.seen[name] = value
        for capture in self._captures:
            if capture.site == name:
                self.captured[capture.key] = capture.select(value)
        return value
