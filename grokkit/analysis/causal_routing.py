"""What routing does to the loss: every choice a router could have made, and experts taken away.

Sending the token at position t elsewhere in layer l changes nothing before t, and what comes
after t does not touch the loss of the prediction made at t. So each case is one token decoded
against the keys and values of its unchanged prefix, and cases of all tokens, layers and choices
are rows of one batch. The result is exact: it equals a full forward pass with the same
`ForceExperts` (a test holds that).
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int
from tqdm.auto import tqdm

from grokkit.abstract_model import Model
from grokkit.config import GrokConfig
from grokkit.edits import Edit, ForbidExperts, ForceExperts, Replace
from grokkit.edits.routing import GatePolicy
from grokkit.errors import GrokkitError, SiteError
from grokkit.kv_cache import KVCache
from grokkit.language_model import LanguageModel, Tokens
from grokkit.processes import is_first, to_host
from grokkit.taps import Change


def expert_sets(config: GrokConfig) -> Int[np.ndarray, "set choice"]:
    """Every set of experts that a token can go to, in lexical order: 28 pairs of 8."""
    chosen = itertools.combinations(range(config.n_experts), config.n_experts_per_token)
    return np.array(list(chosen), np.int32)


def set_probability(
    probs: Float[np.ndarray, "*lead expert"], sets: Int[np.ndarray, "set choice"]
) -> Float[np.ndarray, "*lead set"]:
    """The router's probability of each set: the sum over its experts, by which it ranks them."""
    return probs[..., sets].sum(axis=-1)


def chosen_set(
    experts: Int[np.ndarray, "*lead choice"], sets: Int[np.ndarray, "set choice"]
) -> Int[np.ndarray, "*lead"]:
    """Index of the set that was chosen."""
    equal = (np.sort(experts, axis=-1)[..., None, :] == sets).all(axis=-1)
    if not equal.any(axis=-1).all():
        raise GrokkitError("experts: some choice is not among the sets")
    return equal.argmax(axis=-1)


def next_token_losses(
    lm: LanguageModel, tokens: Tokens, edits: Sequence[Edit] = ()
) -> Float[np.ndarray, "batch position"]:
    """Cross-entropy in nats of the token after each position.

    **Arguments:**

    - `lm`: the model.
    - `tokens`: texts or ids, as for calling `lm`.
    - `edits`: changes to make inside.

    **Returns:** one position fewer than there are tokens; NaN where the next token is a pad or
    beyond a text's end.
    """
    ids, lengths = lm.prepare(tokens)
    with jax.set_mesh(lm.mesh):
        losses = lm.runnable.run(_losses, ids, lengths, lm.resolve(edits, lengths.tolist()))
    return np.where(_scored(lm, ids, lengths), to_host(losses), np.nan)


@dataclasses.dataclass(frozen=True)
class ForcedChoices:
    """Next-token loss with the token at one position, in one layer, sent to each set of experts."""

    sets: Int[np.ndarray, "set choice"]
    layers: tuple[int, ...]
    clean: Float[np.ndarray, "batch position"]
    """Loss without any change; NaN where there is none, or it was not asked for."""
    loss: Float[np.ndarray, "batch position layer set"]
    """Loss when forced; NaN in the same places."""

    @property
    def effect(self) -> Float[np.ndarray, "batch position layer set"]:
        """Change of the loss, in nats: positive where the forced choice is worse."""
        return self.loss - self.clean[..., None, None]

    def __repr__(self) -> str:
        measured = int((~np.isnan(self.clean)).sum())
        return (f"ForcedChoices({measured} tokens x {len(self.layers)} layers x {len(self.sets)} "
                f"sets; mean effect {np.nanmean(self.effect):+.4f} nats)")  # fmt: skip


def forced_choices(
    lm: LanguageModel,
    tokens: Tokens,
    gates: GatePolicy | Any = "keep",
    layers: Sequence[int] | None = None,
    positions: Bool[np.ndarray, "batch position"] | None = None,
    rows: int = 64,
    progress: bool = True,
) -> ForcedChoices:
    """The exact effect on the next-token loss of each choice that a router could have made.

    One program is compiled whatever the number of cases. It holds `rows` copies of a sequence's
    keys and values: for Grok-1 in bfloat16 0.26 MB a token and row.

    **Arguments:**

    - `lm`: the model.
    - `tokens`: texts or ids, as for calling `lm`; a multiple of the mesh's `data` axis.
    - `gates`: weights of the forced experts; see `grokkit.edits.ForceExperts`. Grok-1 normalises
        the sum of the experts' outputs, so that a common factor of the weights does nothing:
        `keep` and `renormalise` differ only by the norm's epsilon.
    - `layers`: which layers, all by default; negative ones count from the last.
    - `positions`: which positions' next-token losses to measure; all by default. The last
        column stands for the last token, which has no next one, and may be left out.
    - `rows`: cases run at once; a multiple of the mesh's `data` axis.
    - `progress`: show a bar, in cases.

    **Raises:** `SiteError` for a layer that does not exist, `GrokkitError` for positions or rows
    that do not fit.
    """
    config = lm.config
    wanted = _layers(config, layers)
    ids, lengths = lm.prepare(tokens)
    scored = _scored(lm, ids, lengths)
    if positions is not None:
        positions = np.asarray(positions, bool)[:, : scored.shape[1]]
        if positions.shape != scored.shape:
            raise GrokkitError(f"positions: expected booleans of shape {scored.shape}, found "
                               f"{positions.shape}")  # fmt: skip
        scored = scored & positions
    if not scored.any():
        raise GrokkitError("no position is left whose next token could be predicted")
    _check_rows(lm, rows)

    sets = expert_sets(config)
    with jax.set_mesh(lm.mesh):
        empty = KVCache.empty(config, len(ids), ids.shape[1], lm.runnable.dtype, lm.mesh)
        cache, clean = lm.runnable.run(_prefill, ids, lengths, empty)
        clean = np.where(scored, to_host(clean), np.nan)
        loss = np.full((*scored.shape, len(wanted), len(sets)), np.nan)
        places = np.argwhere(scored)
        n_cases = len(places) * loss[0, 0].size
        bar = tqdm(
            total=n_cases, desc="forced choices", unit="case", disable=not (progress and is_first())
        )
        with bar:
            for batch, position, i_layer, i_set in _chunks(places, len(wanted), len(sets), rows):
                n = len(batch)
                full = np.minimum(np.arange(rows), n - 1)
                on = np.asarray(wanted)[i_layer[full], None] == np.arange(config.n_layers)
                edit = ForceExperts(sets[i_set[full], None], gates, layers=on)
                found = lm.runnable.run(
                    _decode, cache, batch[full], position[full], ids[batch, position][full],
                    ids[batch, position + 1][full], lm.resolve([edit], [1] * rows),
                )  # fmt: skip
                loss[batch, position, i_layer, i_set] = to_host(found)[:n]
                bar.update(n)
    return ForcedChoices(sets, wanted, clean, loss)


@dataclasses.dataclass(frozen=True)
class Removal:
    """Mean next-token loss of each sequence with one expert of one layer (or of all) removed."""

    layers: tuple[int, ...] | None
    """Which layers, each by itself; `None`: one entry, the expert removed from all at once."""
    tokens: Int[np.ndarray, " batch"]
    """Predicted tokens of each sequence."""
    clean: Float[np.ndarray, " batch"]
    loss: Float[np.ndarray, "layer expert batch"]

    def effect(
        self, domains: Int[np.ndarray, " batch"], units: Int[np.ndarray, " unit"] | None = None
    ) -> Float[np.ndarray, "layer expert domain"]:
        """Change of each domain's mean loss, in nats a token: positive where removal hurts.

        **Arguments:**

        - `domains`: domain of each sequence, from 0.
        - `units`: which sequences to take, with repeats: for a bootstrap. All by default.

        **Raises:** `GrokkitError` for a domain without sequences.
        """
        if domains.shape != self.tokens.shape:
            raise GrokkitError(f"domains: expected one for each of {len(self.tokens)} sequences, "
                               f"found shape {domains.shape}")  # fmt: skip
        units = np.arange(len(self.tokens)) if units is None else units
        member = domains[units, None] == np.arange(domains.max() + 1)
        weights = member * self.tokens[units, None]
        total = weights.sum(axis=0)
        if (total == 0).any():
            raise GrokkitError(f"domains {np.flatnonzero(total == 0).tolist()} have no sequences")
        return ((self.loss - self.clean)[..., units] @ weights) / total


def remove_experts(
    lm: LanguageModel,
    tokens: Tokens,
    method: Literal["forbid", "zero"] = "forbid",
    gates: GatePolicy = "keep",
    layers: Sequence[int] | Literal["together"] | None = None,
    rows: int = 16,
    progress: bool = True,
) -> Removal:
    """Each expert removed in turn, from each layer by itself or from all together.

    **Arguments:**

    - `lm`: the model.
    - `tokens`: texts or ids, as for calling `lm`.
    - `method`: `"forbid"` lets the router take the next best expert in its place; `"zero"` keeps
        the choice and sets the expert's output to zero, so that the others remain alone.
    - `gates`: weights after forbidding; see `grokkit.edits.ForbidExperts`.
    - `layers`: which layers, each by itself, all by default; `"together"` removes expert e from
        every layer at once.
    - `rows`: sequences run at once; a multiple of the mesh's `data` axis.
    - `progress`: show a bar, in removals.
    """
    config = lm.config
    wanted = None if layers == "together" else _layers(config, layers)  # type: ignore[arg-type]
    if method not in ("forbid", "zero"):
        raise GrokkitError(f"method must be 'forbid' or 'zero', found {method!r}")
    ids, lengths = lm.prepare(tokens)
    _check_rows(lm, rows)
    scored = _scored(lm, ids, lengths)
    if not scored.any(axis=1).all():
        raise GrokkitError("every sequence needs at least two tokens that are no pads")

    def means(edits: list[Edit]) -> np.ndarray:
        parts = []
        for start in range(0, len(ids), rows):
            taken = np.minimum(np.arange(start, start + rows), len(ids) - 1)
            found = lm.runnable.run(_losses, ids[taken], lengths[taken],
                            lm.resolve(edits, lengths[taken].tolist()))  # fmt: skip
            parts.append(to_host(found)[: len(ids) - start])
        return np.where(scored, np.concatenate(parts), 0).sum(axis=1) / scored.sum(axis=1)

    def removal(layer: int | None, expert: int) -> Edit:
        where = range(config.n_layers) if layer is None else [layer]
        if method == "forbid":
            return ForbidExperts(expert, gates, layers=where)
        return Replace("expert_outputs", 0.0, layers=where, experts=[expert])

    entries = (None,) if wanted is None else wanted
    loss = np.empty((len(entries), config.n_experts, len(ids)))
    with jax.set_mesh(lm.mesh):
        clean = means([])
        with tqdm(
            total=loss[..., 0].size, desc=f"{method} experts", disable=not (progress and is_first())
        ) as bar:
            for i, layer in enumerate(entries):
                for expert in range(config.n_experts):
                    loss[i, expert] = means([removal(layer, expert)])
                    bar.update()
    return Removal(wanted, scored.sum(axis=1), clean, loss)


# The compiled parts


@jax.jit
def _cross_entropy(logits: Array, targets: Array) -> Array:
    logits = jax.reshard(logits, P("data", None, None))
    targets = jax.reshard(targets, P("data", None))
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


@jax.jit
def _losses(model: Model, ids: Array, lengths: Array, edits: tuple[Change, ...]) -> Array:
    out = model(ids, lengths=lengths, edits=edits)
    return _cross_entropy(out.logits[:, :-1], ids[:, 1:])


@functools.partial(jax.jit, donate_argnames="cache")
def _prefill(
    model: Model, ids: Array, lengths: Array, cache: KVCache
) -> tuple[KVCache | None, Array]:
    out = model(ids, cache=cache, lengths=lengths)
    return out.cache, _cross_entropy(out.logits[:, :-1], ids[:, 1:])


@jax.jit
def _decode(
    model: Model,
    cache: KVCache,
    sequence: Int[Array, " row"],
    position: Int[Array, " row"],
    token: Int[Array, " row"],
    target: Int[Array, " row"],
    edits: tuple[Change, ...],
) -> Float[Array, " row"]:
    """The loss of `target` after `token`, fed again at `position` of the cached `sequence`.

    The slot at `position` is written over, and those after it are in the future.
    """
    prefix = KVCache(
        keys=_take_rows(cache.keys, 1, sequence),
        values=_take_rows(cache.values, 1, sequence),
        visible=_take_rows(cache.visible, 0, sequence),
        length=position,
    )
    out = model(token[:, None], cache=prefix, edits=edits)
    return _cross_entropy(out.logits, target[:, None])[:, 0]


def _take_rows(a: Any, axis: int, rows: Array) -> Array:
    """Rows of a batch axis, which may be cut over devices, in any order."""
    spec = list(jax.typeof(a).sharding.spec)
    spec += [None] * (a.ndim - len(spec))
    whole = jax.reshard(a, P(*spec[:axis], None, *spec[axis + 1 :]))
    where = (slice(None),) * axis + (jax.reshard(rows, P("data")),)
    return whole.at[where].get(out_sharding=P(*spec[:axis], "data", *spec[axis + 1 :]))


# Arguments


def _scored(lm: LanguageModel, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Which positions predict a token: the next one is real and no pad."""
    real = (np.arange(ids.shape[1]) < lengths[:, None]) & (ids != lm.config.pad_token)
    return real[:, :-1] & real[:, 1:]


def _check_rows(lm: LanguageModel, rows: int) -> None:
    n_data = lm.mesh.shape["data"]
    if rows < 1 or rows % n_data:
        raise GrokkitError(f"rows must be a positive multiple of the mesh's {n_data} 'data' "
                           f"devices, found {rows}")  # fmt: skip


def _layers(config: GrokConfig, layers: Sequence[int] | None) -> tuple[int, ...]:
    wanted = range(config.n_layers) if layers is None else layers
    if len(wanted) == 0:
        raise SiteError("layers: expected at least one, found none")
    for i in wanted:
        if not -config.n_layers <= i < config.n_layers:
            raise SiteError(f"layers: there is no {i}; there are {config.n_layers}, 0 to "
                            f"{config.n_layers - 1}")  # fmt: skip
    return tuple(int(i) % config.n_layers for i in wanted)


def _chunks(
    places: np.ndarray, n_layers: int, n_sets: int, rows: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Cases in chunks of `rows`, the last shorter: sequence, position, layer and set of each."""
    n = len(places) * n_layers * n_sets
    for start in range(0, n, rows):
        case = np.arange(start, min(start + rows, n))
        place, i_layer, i_set = np.unravel_index(case, (len(places), n_layers, n_sets))
        yield places[place, 0], places[place, 1], i_layer, i_set
