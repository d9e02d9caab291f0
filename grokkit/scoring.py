"""Log-probabilities of given tokens: of a continuation, and of a long text by a sliding window."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int
from tqdm.auto import tqdm

from grokkit.abstract_model import Model
from grokkit.errors import PromptError
from grokkit.generate import PREFILL_PART, check_prompt, pad_right, padded_length
from grokkit.processes import is_first

Text = str | Sequence[str]

_STREAMS = 1 << 30  # bytes of stream that may wait while a layer is used, where rows share a pass


@dataclasses.dataclass(frozen=True, eq=False)
class Score:
    """How probable the model holds one continuation."""

    tokens: tuple[int, ...]
    """The continuation's token ids."""
    logprobs: Float[np.ndarray, " position"]
    """Natural logarithm of each one's probability after all tokens before it."""

    @property
    def total(self) -> float:
        """Log-probability of the whole continuation: the sum."""
        return float(self.logprobs.sum(dtype=np.float64))

    @property
    def mean(self) -> float:
        """Log-probability a token, which compares continuations of different lengths."""
        return self.total / len(self.tokens)

    def __repr__(self) -> str:
        return f"Score(total {self.total:.4f}, {len(self.tokens)} tokens, mean {self.mean:.4f})"


def score(
    model: Model,
    mesh: Mesh,
    encode: Callable[[str], list[int]],
    prompt: Text | Sequence[int],
    continuation: Text | Sequence[int],
) -> Score | list[Score]:
    """Log-probabilities of a continuation, per token and in total.

    **Arguments:**

    - `model`, `mesh`: the model and the mesh it lies on.
    - `encode`: text to token ids.
    - `prompt`: a text, several, or the token ids of one.
    - `continuation`: the same, and of the same kind. One prompt may go with several
        continuations, as the answers of a multiple choice. Texts are encoded together, as the
        model met them in training; where a token spans both, it counts as the continuation's. Give
        token ids to choose the boundary.

    **Returns:** a `Score`; a list of them if either is a list of texts.

    **Raises:** `PromptError` for an empty prompt or continuation, or too long a text.
    """
    several = [not isinstance(t, str) and bool(len(t)) and isinstance(t[0], str)
               for t in (prompt, continuation)]  # fmt: skip
    if not any(several):
        pairs: list[tuple[Any, Any]] = [(prompt, continuation)]
    else:
        prompts, continuations = (
            list(t) if s else [t] for t, s in zip((prompt, continuation), several, strict=True)
        )
        n = max(len(prompts), len(continuations))
        if len(prompts) not in (1, n) or len(continuations) not in (1, n):
            raise PromptError(
                f"expected as many continuations as prompts, or one of either, found "
                f"{len(continuations)} and {len(prompts)}"
            )
        pairs = [(prompts[i % len(prompts)], continuations[i % len(continuations)])
                 for i in range(n)]  # fmt: skip
    rows, starts = [], []
    for i, (before, after) in enumerate(pairs):
        ids, start = _joined(encode, before, after, f"text {i}")
        check_prompt(model.config, ids, 0, f"text {i}")
        rows.append(ids)
        starts.append(start)
    found = token_logprobs(model, mesh, rows)
    scores = [
        Score(tuple(ids[start:]), logprobs[start - 1 :])
        for ids, start, logprobs in zip(rows, starts, found, strict=True)
    ]
    return scores if any(several) else scores[0]


def _joined(
    encode: Callable[[str], list[int]],
    prompt: str | Sequence[int],
    continuation: str | Sequence[int],
    name: str,
) -> tuple[list[int], int]:
    """Token ids of both, and where the continuation begins."""
    if isinstance(prompt, str) != isinstance(continuation, str):
        raise PromptError(f"{name}: prompt and continuation must both be text, or both token ids")
    if isinstance(prompt, str) and isinstance(continuation, str):
        first, ids = encode(prompt), encode(prompt + continuation)
        start = next(
            (i for i, (a, b) in enumerate(zip(first, ids, strict=False)) if a != b), len(first)
        )
    else:
        first, rest = [*map(int, prompt)], [*map(int, continuation)]  # type: ignore[arg-type]
        ids, start = first + rest, len(first)
    if not len(continuation) or start >= len(ids):
        raise PromptError(f"{name}: the continuation is empty; it must hold at least one token")
    if start < 1:
        raise PromptError(
            f"{name}: the prompt is empty, or its first token spans into the continuation; the "
            f"first token of a text has nothing to be predicted from"
        )
    return ids, start


def perplexity(
    model: Model,
    mesh: Mesh,
    ids: Sequence[int],
    window: int | None = None,
    stride: int | None = None,
    progress: bool = True,
) -> float:
    """The exponential of the mean negative log-probability of every token but the first.

    A window slides over the text (as in Hugging Face's guide to the perplexity of fixed-length
    models): each token is predicted once, in the first window that holds it, from the tokens of
    that window before it. So all but the first window's tokens have `window - stride` or more.

    **Arguments:**

    - `model`, `mesh`: the model and the mesh it lies on.
    - `ids`: the text, two tokens or more.
    - `window`: tokens seen at once; by default the model's context.
    - `stride`: by how many the window moves on; by default half of it. Smaller is slower, and
        closer to predicting each token from all that the context holds.
    - `progress`: show a progress bar, in tokens, when there are several windows.

    **Raises:** `PromptError` for a window or stride that cannot be honoured.
    """
    context = model.config.context_length
    window = context if window is None else window
    if not 2 <= window <= context:
        raise PromptError(f"window must be from 2 to the context of {context}, found {window}")
    stride = window // 2 if stride is None else stride
    if not 1 <= stride < window:
        raise PromptError(
            f"stride must be from 1 to window - 1, {window - 1}, so that every token is predicted "
            f"from another; found {stride}"
        )
    if len(ids) < 2:
        raise PromptError(f"expected a text of at least two tokens, found {len(ids)}")
    starts = range(0, max(len(ids) - window, 0) + stride, stride)
    rows = [list(ids[start : start + window]) for start in starts]
    for row in rows:
        check_prompt(model.config, row, 0, "the text")
    total, seen = 0.0, 1
    with tqdm(
        total=len(ids) - 1, unit="token", desc="perplexity",
        disable=not (progress and is_first() and len(rows) > 1),
    ) as bar:  # fmt: skip
        at_once = mesh.shape["data"] * max(1, PREFILL_PART // window)
        at_once *= _groups_a_pass(model, at_once * window)
        for i in range(0, len(rows), at_once):
            for start, found in zip(
                starts[i:], token_logprobs(model, mesh, rows[i : i + at_once]), strict=False
            ):
                new = found[seen - start - 1 :]
                total -= new.sum(dtype=np.float64)
                seen += len(new)
                bar.update(len(new))
    return float(np.exp(total / (len(ids) - 1)))


def token_logprobs(
    model: Model, mesh: Mesh, rows: Sequence[Sequence[int]]
) -> list[Float[np.ndarray, " position"]]:
    """Log-probability of every token but the first of each row, given those before it.

    Rows may differ in length; they are run a few at a time, and long ones in parts. Where passes are
    dear all share one, as far as memory allows.
    """
    parts = mesh.shape["data"]
    size = padded_length(max(map(len, rows)), model.config.context_length)
    at_once = parts * min(max(1, PREFILL_PART // size), 1 << (len(rows) - 1).bit_length())
    groups = []
    for i in range(0, len(rows), at_once):
        some = [*rows[i : i + at_once], *[[]] * (at_once - len(rows[i : i + at_once]))]
        tokens = pad_right(some, size, model.config.pad_token)
        targets = np.pad(tokens[:, 1:], ((0, 0), (0, 1)))
        groups.append((tokens, targets, np.array([len(row) for row in some], np.int32)))
    together, values = _groups_a_pass(model, at_once * size), []
    with jax.set_mesh(mesh):
        for i in range(0, len(groups), together):
            for found in model.read_logits(groups[i : i + together], _logprobs, mesh):
                values += [*found]
    return [v[: len(row) - 1] for v, row in zip(values, rows, strict=False)]


def _groups_a_pass(model: Model, n_tokens: int) -> int:
    """How many groups of so many tokens a pass takes."""
    if not model.shares_passes:
        return 1
    return max(1, _STREAMS // (4 * model.config.d_model * n_tokens))


def _logprobs(
    logits: Float[Array, "batch position vocab"], targets: Int[Array, "batch position"]
) -> Float[Array, "batch position"]:
    layout = jax.typeof(logits).sharding.spec
    is_cut = layout[2] == "model"

    def local(logits: Array, targets: Array) -> Array:
        ids = jnp.arange(logits.shape[2])
        if is_cut:  # each device has its share of the vocabulary
            ids = ids + jax.lax.axis_index("model") * logits.shape[2]
        chosen = jnp.sum(jnp.where(ids == targets[..., None], logits, 0), axis=-1)
        largest = jnp.max(logits, axis=-1)
        largest = jax.lax.pmax(largest, "model") if is_cut else largest
        total = jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1)
        if is_cut:
            chosen, total = jax.lax.psum((chosen, total), "model")
        return chosen - largest - jnp.log(total)

    return jax.shard_map(local, in_specs=(layout, P("data")), out_specs=P("data"))(logits, targets)
