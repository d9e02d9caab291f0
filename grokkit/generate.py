"""Prefill and decode: from prompts' token ids to new ones.

The decode loop runs on the device in blocks of tokens; the host reads one block's tokens while
the next is computed. Prompts are padded on the right to a few lengths, so that a new length
rarely compiles anything.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int, PyTree

from grokkit.abstract_model import PREFILL_PART, Model
from grokkit.config import GrokConfig
from grokkit.errors import PromptError
from grokkit.kv_cache import KVCache, put_row, put_rows
from grokkit.sampling import Draw, Rows, Sampling, mark_seen, sample
from grokkit.taps import Capture, Change

_ROWS = P("data")


class State(NamedTuple):
    """Sequences under way."""

    cache: KVCache
    token: Int[Array, " batch"]
    """The token of each that is drawn and not yet fed."""
    seen: Bool[Array, "batch vocab"] | None
    """Which tokens each has been fed, where a setting asks for it."""


@functools.partial(jax.jit, static_argnames=("captures",), donate_argnames=("cache", "seen"))
def prefill(
    model: Model,
    tokens: Array,
    lengths: Array,
    cache: KVCache,
    rows: Rows,
    captures: tuple[Capture, ...],
    edits: tuple[Change, ...],
    seen: Array | None = None,
) -> tuple[State, Draw, dict[str, Any]]:
    # A capture of every position's logits needs them all; otherwise only the last are computed.
    last_only = not any(c.site in ("final_norm", "logits") for c in captures)
    out = model(
        tokens, cache=cache, lengths=lengths, last_only=last_only, captures=captures, edits=edits
    )
    logits = out.logits
    if not last_only:
        logits = jnp.take_along_axis(logits, (lengths - 1)[:, None, None], axis=1)
    assert out.cache is not None
    seen = None if seen is None else mark_seen(seen, tokens, lengths)
    drawn = sample(logits[:, 0], rows, out.cache.length, seen)
    return State(out.cache, drawn.token, seen), drawn, out.captured


def prefill_in_parts(
    model: Model,
    tokens: np.ndarray,
    lengths: np.ndarray,
    cache: KVCache,
    rows: Rows,
    captures: tuple[Capture, ...] = (),
    edits: tuple[Change, ...] = (),
) -> tuple[State, Draw, dict[str, Any]]:
    """`prefill` of long prompts part by part, so that memory does not grow with their length.

    What is captured is one array for the whole prompt, so that then there is one part.
    """
    # Nor is there more than one pass where passes are dear: it cuts the prompts by itself.
    part = tokens.shape[1]
    if not captures and not model.shares_passes:
        part = min(PREFILL_PART, part)
    draw, captured = None, {}
    seen = None
    if rows.constraints is not None:
        seen = jnp.zeros_like(rows.constraints.allowed)
    for start in range(0, tokens.shape[1], part):
        counts = np.clip(lengths - start, 0, part).astype(np.int32)
        if start and not counts.any():
            break
        piece, counts_on_rows = (
            jax.device_put(a, P("data")) for a in (tokens[:, start : start + part], counts)
        )
        (cache, _, seen), drawn, captured = model.run(
            prefill, piece, counts_on_rows, cache, rows, captures, edits, seen
        )
        # A row's draw is that of the part in which it ends.
        draw = drawn if draw is None else _keep(counts_on_rows > 0, drawn, draw)
    assert draw is not None
    # A copy, since a state is donated to the next step and its draw is still to be read.
    return State(cache, jnp.copy(draw.token), seen), draw, captured


@jax.jit
def _keep(new: Bool[Array, " batch"], drawn: Draw, draw: Draw) -> Draw:
    def pick(a: Array, b: Array) -> Array:
        return jnp.where(new.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(pick, drawn, draw)


@functools.partial(jax.jit, static_argnames=("n", "captures"), donate_argnames=("state",))
def decode(
    model: Model,
    state: State,
    rows: Rows,
    n: int,
    captures: tuple[Capture, ...] = (),
    edits: tuple[Change, ...] = (),
    active: Bool[Array, " batch"] | None = None,
) -> tuple[State, Draw, dict[str, Any]]:
    """Feed each sequence's token, draw the next, and so on `n` times.

    **Arguments:** as `generate_tokens`'; and `active`: which rows of the batch hold a sequence, all
    by default. The others are kept empty, and all take the same way through the model.

    **Returns:** the state after; draws and captures with a leading step axis.
    """
    if active is not None:
        visible = state.cache.visible & active[:, None]
        cache = eqx.tree_at(lambda c: c.visible, state.cache, visible)
        state = state._replace(cache=cache)

    def step(state: State) -> tuple[State, tuple[Draw, dict[str, Any]]]:
        cache, token, seen = state
        counts = None
        if active is not None:
            counts = active.astype(jnp.int32)
            token = jnp.where(active, token, model.config.pad_token)
        out = model(token[:, None], cache=cache, lengths=counts, captures=captures, edits=edits)
        assert out.cache is not None
        if seen is not None:
            seen = mark_seen(seen, token[:, None], jnp.ones_like(token))
        draw = sample(out.logits[:, 0], rows, out.cache.length, seen)
        return State(out.cache, draw.token, seen), (draw, out.captured)

    state, (draws, captured) = model.repeat(step, state, n)
    return state, draws, captured


@functools.partial(jax.jit, donate_argnames=("state",))
def join(state: State, new: State, at: Int[Array, " row"]) -> State:
    """Put new sequences over rows of a batch.

    **Arguments:**

    - `state`: the batch's, written in place. If it keeps no `seen`, that of `new` is left out.
    - `new`, `at`: as for `put_rows`.
    """

    def local(whole: Array, part: Array, at: Array) -> Array:
        for row in range(at.shape[0]):
            whole = put_row(whole, part, 0, row, at[row])
        return whole

    def put(whole: Array, part: Array) -> Array:
        return jax.shard_map(local, in_specs=(_ROWS,) * 3, out_specs=_ROWS)(whole, part, at)

    seen = state.seen
    if seen is not None and new.seen is not None:
        seen = put(seen, new.seen)
    return State(put_rows(state.cache, new.cache, at), put(state.token, new.token), seen)


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one round of generation gave: draws with leading (step, batch) axes, on the host."""

    draws: Draw
    captured: dict[str, Any]
    """Captures of the tokens fed in this round: the prompts' in the first."""


def generate_tokens(
    model: Model,
    mesh: Mesh,
    prompts: Sequence[Sequence[int]],
    max_len: int,
    sampling: Sampling,
    block: int = 16,
    captures: tuple[Capture, ...] = (),
    edits: tuple[Change, ...] = (),
) -> Iterator[Piece]:
    """Continue every prompt by `max_len` tokens, in rounds: one token, then `block` at a time.

    Nothing stops at an end-of-text token here: the caller stops reading.

    **Arguments:**

    - `model`, `mesh`: the model and the mesh it lies on.
    - `prompts`: token ids of each prompt, none empty.
    - `max_len`: new tokens, at least 1.
    - `sampling`: how they are drawn.
    - `block`: steps that run on the device between two looks at the results; 1 where each costs so
        much that none is made before it is asked for.
    - `captures`, `edits`: resolved against the model; see `Model.__call__`.

    **Raises:** `PromptError` before anything is computed.
    """
    check_max_len(max_len)
    check_prompts(model.config, mesh, prompts, max_len)
    rows = sampling.rows(len(prompts), model.config.vocab_size)
    return _rounds(model, mesh, prompts, max_len, rows, block, captures, edits)


def _rounds(
    model: Model,
    mesh: Mesh,
    prompts: Sequence[Sequence[int]],
    max_len: int,
    rows: Rows,
    block: int,
    captures: tuple[Capture, ...],
    edits: tuple[Change, ...],
) -> Iterator[Piece]:
    config = model.config
    longest = max(map(len, prompts))
    with jax.set_mesh(mesh):
        on_rows = jax.tree.map(lambda a: jax.device_put(a, P("data")), rows)
        padded = (
            bucket(longest, config.context_length)
            if captures
            else padded_length(longest, config.context_length)
        )
        tokens = pad_right(prompts, padded, config.pad_token)
        # A whole block always fits, so that a last, part-used block needs no other program.
        capacity = bucket(max(longest + max_len + block, tokens.shape[1]), steps=8)
        cache = KVCache.empty(config, len(prompts), capacity, model.dtype, mesh)
        lengths = np.array([len(p) for p in prompts], np.int32)
        state, draw, captured = prefill_in_parts(
            model, tokens, lengths, cache, on_rows, captures, edits
        )
    draws = jax.tree.map(lambda a: a[None], to_host_async(draw))
    yield Piece(draws, captured)  # at once: the first token need not wait for the decode's program
    block = block if model.runs_ahead else 1
    pending, done = [], 1
    while done < max_len:
        with jax.set_mesh(mesh):
            state, draws, captured = model.run(decode, state, on_rows, block, captures, edits)
        pending.append(Piece(to_host_async(draws), captured))
        done += block
        # The next block is under way on the device while this one's tokens are read.
        if len(pending) > model.runs_ahead:
            yield pending.pop(0)
    yield from pending


def to_host_async(tree: PyTree[Array]) -> PyTree[Array]:
    for a in jax.tree.leaves(tree):
        if a.is_fully_addressable:
            a.copy_to_host_async()
    return tree


def padded_length(n: int, context_length: int) -> int:
    """What a prompt of `n` tokens is padded to: its bucket, in whole parts if it takes several."""
    padded = bucket(n, context_length)
    return padded if padded <= PREFILL_PART else -(-padded // PREFILL_PART) * PREFILL_PART


def bucket(n: int, limit: int | None = None, steps: int = 1) -> int:
    """The length, at least `n` and 16, that a sequence of `n` tokens is padded to.

    There are `steps` lengths for each doubling, so that few programs are compiled. `limit` is the
    longest of all.
    """
    size = max(16, 1 << (n - 1).bit_length())
    part = max(size // (2 * steps), 16)
    size = -(-n // part) * part
    return size if limit is None else max(n, min(size, limit))


def pad_right(
    prompts: Sequence[Sequence[int]], length: int, pad_token: int
) -> Int[np.ndarray, "batch position"]:
    """The prompts as rows of one array, filled up with pad tokens."""
    tokens = np.full((len(prompts), length), pad_token, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens


def check_max_len(max_len: Any) -> None:
    """Refuse what is no number of new tokens. **Raises:** `PromptError`."""
    if not isinstance(max_len, int | np.integer):
        raise PromptError(f"max_len must be an integer, found {max_len!r}")
    if max_len < 1:
        raise PromptError(f"max_len must be at least 1, found {max_len}")


def check_prompts(
    config: GrokConfig, mesh: Mesh, prompts: Sequence[Sequence[int]], max_len: int
) -> None:
    """Refuse prompts that cannot be run with `max_len` more tokens. **Raises:** `PromptError`."""
    if not prompts:
        raise PromptError("expected at least one prompt, found none")
    if len(prompts) % mesh.shape["data"]:
        raise PromptError(
            f"the number of prompts must divide over the mesh's {mesh.shape['data']} 'data' "
            f"devices, found {len(prompts)}; add prompts or use a mesh with data=1"
        )
    for i, prompt in enumerate(prompts):
        check_prompt(config, prompt, max_len, f"prompt {i}")


def check_prompt(
    config: GrokConfig, prompt: Sequence[int], max_len: int, name: str = "the prompt"
) -> None:
    """Refuse a prompt that cannot be run with `max_len` more tokens. **Raises:** `PromptError`."""
    if not len(prompt):
        raise PromptError(f"{name} is empty; it must hold at least one token")
    if len(prompt) + max_len > config.context_length:
        raise PromptError(
            f"{name} has {len(prompt)} tokens and max_len is {max_len}: "
            f"{len(prompt) + max_len} do not fit in the context of {config.context_length}. "
            f"Shorten the prompt or lower max_len"
        )
    for token in prompt:
        if not 0 <= token < config.vocab_size:
            raise PromptError(
                f"{name} holds token id {token}; ids go from 0 to {config.vocab_size - 1}"
            )
