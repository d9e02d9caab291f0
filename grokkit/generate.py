"""Prefill, decode and sampling: from prompts' token ids to new ones.

The decode loop runs on the device in blocks of tokens; the host reads one block's tokens while
the next is computed. Prompts are padded on the right to a few lengths, so that a new length
rarely compiles anything.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt32

from grokkit.config import GrokConfig
from grokkit.errors import PromptError
from grokkit.kv_cache import KVCache
from grokkit.model import Grok
from grokkit.taps import Capture, Change

N_ALTERNATIVES = 8
PREFILL_PART = 1024
"""Tokens of a prompt that are run at once."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; one value for all sequences, or one for each."""

    temperature: float | int | Sequence[float] = 1.0
    """The logits are divided by it; 0 takes the most probable token."""
    top_p: float | int | Sequence[float] = 1.0
    """Draw from the fewest most probable tokens that together reach this probability (nucleus
    sampling, Holtzman et al., arXiv 1904.09751)."""
    seed: int | Sequence[int] = 0
    """The draws of sequence i of a batch come from `seed + i`, or from its own seed. They depend
    on it and on the token's position only, not on what else is in the batch."""

    def rows(self, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Temperature, top_p and seed of each of `n` sequences.

        **Raises:** `PromptError` for a value out of range, or not one for each sequence.
        """
        temperature = _each("temperature", self.temperature, n, np.float32)
        if not (np.isfinite(temperature).all() and (temperature >= 0).all()):
            raise PromptError(f"temperature must be 0 or more, found {self.temperature}")
        top_p = _each("top_p", self.top_p, n, np.float32)
        if not ((top_p > 0) & (top_p <= 1)).all():
            raise PromptError(f"top_p must be above 0 and at most 1, found {self.top_p}")
        seed = np.asarray(self.seed)
        if seed.dtype.kind not in "iu" or (seed < 0).any() or (seed >= 2**32).any():
            raise PromptError(f"seed must be an integer from 0 to 2**32 - 1, found {self.seed}")
        seeds = (int(seed) + np.arange(n)) % 2**32 if seed.ndim == 0 else seed
        return temperature, top_p, _each("seed", seeds, n, np.uint32)


def _each(name: str, value: Any, n: int, dtype: Any) -> np.ndarray:
    values = np.asarray(value, dtype)
    if values.ndim > 1 or values.ndim == 1 and values.shape[0] != n:
        raise PromptError(f"{name}: expected one value, or one for each of {n} prompts, found "
                          f"{values.size}")  # fmt: skip
    return np.broadcast_to(values, (n,))


class Draw(eqx.Module):
    """The tokens drawn at one step, and how probable the model held them to be.

    Probabilities are the model's own: softmax of the logits, before temperature and nucleus.
    """

    token: Int[Array, " *batch"]
    prob: Float[Array, " *batch"]
    top_tokens: Int[Array, "*batch alternative"]
    """The most probable tokens, best first."""
    top_probs: Float[Array, "*batch alternative"]


def sample(
    logits: Float[Array, "batch vocab"],
    temperature: Float[Array, " batch"],
    top_p: Float[Array, " batch"],
    seed: UInt32[Array, " batch"],
    position: Int[Array, " batch"],
) -> Draw:
    """Draw each sequence's next token.

    **Arguments:**

    - `logits`: of the sequence's last token.
    - `temperature`, `top_p`, `seed`: see `Sampling`.
    - `position`: that the new token will have; with the seed it determines the draw.
    """

    def local(logits, temperature, top_p, seed, position):
        greedy = temperature == 0
        # Zero at the largest, so that the smallest temperature cannot make that infinite.
        largest = jnp.max(logits, axis=-1, keepdims=True)
        scaled = (logits - largest) / jnp.where(greedy, 1, temperature)[:, None]
        kept = jax.lax.cond(
            jnp.any(top_p < 1), lambda: nucleus(scaled, top_p), lambda: jnp.ones_like(scaled, bool)
        )
        noise = jax.vmap(lambda s, p: jax.random.gumbel(
            jax.random.fold_in(jax.random.key(s), p), logits.shape[1:]
        ))(seed, position)  # fmt: skip
        # The largest of logit + Gumbel noise is a draw from the softmax.
        drawn = jnp.argmax(jnp.where(kept, scaled + noise, -jnp.inf), axis=-1)
        token = jnp.where(greedy, jnp.argmax(logits, axis=-1), drawn).astype(jnp.int32)
        probs = jax.nn.softmax(logits, axis=-1)
        top_probs, top_tokens = jax.lax.top_k(probs, min(N_ALTERNATIVES, probs.shape[1]))
        prob = jnp.take_along_axis(probs, token[:, None], axis=1)[:, 0]
        return Draw(token, prob, top_tokens, top_probs)

    rows = P("data")
    return jax.shard_map(local, in_specs=(rows,) * 5, out_specs=rows)(
        jax.reshard(logits, P("data", None)), temperature, top_p, seed, position
    )


def nucleus(
    logits: Float[Array, "batch vocab"], top_p: Float[Array, " batch"]
) -> Bool[Array, "batch vocab"]:
    """The fewest most probable tokens whose probabilities together reach `top_p`.

    A token is kept if those more probable than it do not reach `top_p`; so one always is. Of
    equally probable tokens the lower id counts as the more probable.
    """
    probs = jax.nn.softmax(logits, axis=-1)
    order = jnp.argsort(-probs, axis=-1, stable=True)
    ordered = jnp.take_along_axis(probs, order, axis=-1)
    before = jnp.cumsum(ordered, axis=-1) - ordered
    # At top_p = 1 rounding of the sum must not cut a token off.
    kept = (before < top_p[:, None]) | (top_p[:, None] >= 1)
    return jnp.put_along_axis(jnp.zeros_like(kept), order, kept, axis=-1, inplace=False)


@functools.partial(jax.jit, static_argnames=("captures",), donate_argnames=("cache",))
def _prefill(
    model: Grok,
    tokens: Array,
    lengths: Array,
    cache: KVCache,
    rows: tuple[Array, Array, Array],
    captures: tuple[Capture, ...],
    edits: tuple[Change, ...],
) -> tuple[KVCache, Draw, dict[str, Any]]:
    # A capture of every position's logits needs them all; otherwise only the last are computed.
    last_only = not any(c.site in ("final_norm", "logits") for c in captures)
    out = model(
        tokens, cache=cache, lengths=lengths, last_only=last_only, captures=captures, edits=edits
    )
    logits = out.logits
    if not last_only:
        logits = jnp.take_along_axis(logits, (lengths - 1)[:, None, None], axis=1)
    assert out.cache is not None
    drawn = sample(logits[:, 0], rows[0], rows[1], rows[2], out.cache.length)
    return out.cache, drawn, out.captured


def _prefill_in_parts(
    model: Grok,
    tokens: np.ndarray,
    lengths: np.ndarray,
    cache: KVCache,
    rows: tuple[Array, Array, Array],
    captures: tuple[Capture, ...],
    edits: tuple[Change, ...],
) -> tuple[KVCache, Draw, dict[str, Any]]:
    """`_prefill` of long prompts part by part, so that memory does not grow with their length.

    What is captured is one array for the whole prompt, so that then there is one part.
    """
    part = tokens.shape[1] if captures else min(PREFILL_PART, tokens.shape[1])
    draw, captured = None, {}
    for start in range(0, tokens.shape[1], part):
        counts = np.clip(lengths - start, 0, part).astype(np.int32)
        if start and not counts.any():
            break
        piece, counts_on_rows = (
            jax.device_put(a, P("data")) for a in (tokens[:, start : start + part], counts)
        )
        cache, drawn, captured = _prefill(
            model, piece, counts_on_rows, cache, rows, captures, edits
        )
        # A row's draw is that of the part in which it ends.
        draw = drawn if draw is None else _keep(counts_on_rows > 0, drawn, draw)
    assert draw is not None
    return cache, draw, captured


@jax.jit
def _keep(new: Bool[Array, " batch"], drawn: Draw, draw: Draw) -> Draw:
    def pick(a: Array, b: Array) -> Array:
        return jnp.where(new.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(pick, drawn, draw)


@functools.partial(jax.jit, static_argnames=("n", "captures"), donate_argnames=("cache",))
def _decode(
    model: Grok,
    cache: KVCache,
    token: Array,
    rows: tuple[Array, Array, Array],
    n: int,
    captures: tuple[Capture, ...],
    edits: tuple[Change, ...],
) -> tuple[KVCache, Array, Draw, dict[str, Any]]:
    """Feed `token`, draw the next, and so on `n` times. Draws come with a leading step axis."""

    def step(carry, _):
        cache, token = carry
        out = model(token[:, None], cache=cache, captures=captures, edits=edits)
        assert out.cache is not None
        draw = sample(out.logits[:, 0], rows[0], rows[1], rows[2], out.cache.length)
        return (out.cache, draw.token), (draw, out.captured)

    (cache, token), (draws, captured) = jax.lax.scan(step, (cache, token), length=n)
    return cache, token, draws, captured


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one round of generation gave: draws with leading (step, batch) axes, on the host."""

    draws: Draw
    captured: dict[str, Any]
    """Captures of the tokens fed in this round: the prompts' in the first."""


def generate_tokens(
    model: Grok,
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
    - `block`: steps that run on the device between two looks at the results.
    - `captures`, `edits`: resolved against the model; see `Grok.__call__`.

    **Raises:** `PromptError` before anything is computed.
    """
    if max_len < 1:
        raise PromptError(f"max_len must be at least 1, found {max_len}")
    check_prompts(model.config, mesh, prompts, max_len)
    rows = sampling.rows(len(prompts))
    return _rounds(model, mesh, prompts, max_len, rows, block, captures, edits)


def _rounds(
    model: Grok,
    mesh: Mesh,
    prompts: Sequence[Sequence[int]],
    max_len: int,
    rows: tuple[np.ndarray, np.ndarray, np.ndarray],
    block: int,
    captures: tuple[Capture, ...],
    edits: tuple[Change, ...],
) -> Iterator[Piece]:
    config = model.config
    longest = max(map(len, prompts))
    with jax.set_mesh(mesh):
        on_rows = jax.tree.map(lambda a: jax.device_put(a, P("data")), rows)
        padded = bucket(longest, config.context_length)
        if padded > PREFILL_PART and not captures:
            padded = -(-padded // PREFILL_PART) * PREFILL_PART
        tokens = pad_right(prompts, padded, config.pad_token)
        # A whole block always fits, so that a last, part-used block needs no other program.
        capacity = bucket(max(longest + max_len + block, tokens.shape[1]), steps=8)
        cache = KVCache.empty(config, len(prompts), capacity, model.dtype, mesh)
        lengths = np.array([len(p) for p in prompts], np.int32)
        cache, draw, captured = _prefill_in_parts(
            model, tokens, lengths, cache, on_rows, captures, edits
        )
        token = draw.token
    pending = Piece(jax.tree.map(lambda a: a[None], _to_host_async(draw)), captured)
    yield pending  # at once: the first token need not wait for the decode step's compilation
    pending, done = None, 1
    while done < max_len:
        with jax.set_mesh(mesh):
            cache, token, draws, captured = _decode(
                model, cache, token, on_rows, block, captures, edits
            )
        # The next block is under way on the device while this one's tokens are read.
        if pending is not None:
            yield pending
        pending = Piece(_to_host_async(draws), captured)
        done += block
    if pending is not None:
        yield pending


def _to_host_async(tree: PyTree[Array]) -> PyTree[Array]:
    for a in jax.tree.leaves(tree):
        a.copy_to_host_async()
    return tree


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
        if not len(prompt):
            raise PromptError(f"prompt {i} is empty; it must hold at least one token")
        if len(prompt) + max_len > config.context_length:
            raise PromptError(
                f"prompt {i} has {len(prompt)} tokens and max_len is {max_len}: "
                f"{len(prompt) + max_len} do not fit in the context of {config.context_length}. "
                f"Shorten the prompt or lower max_len"
            )
        for token in prompt:
            if not 0 <= token < config.vocab_size:
                raise PromptError(
                    f"prompt {i} holds token id {token}; ids go from 0 to {config.vocab_size - 1}"
                )
