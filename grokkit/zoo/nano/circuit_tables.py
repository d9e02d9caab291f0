"""The measurements behind docs/findings-circuits.md: copying, sums, lenses. One table each."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from grokkit.analysis.attention import (
    duplicate_token_score,
    first_token_mass,
    induction_score,
    previous_token_score,
)
from grokkit.analysis.attribution import logit_attribution
from grokkit.analysis.lens import fit_tuned_lens, logit_lens
from grokkit.analysis.patching import (
    Experts,
    Heads,
    LogitDifference,
    Positions,
    Sweep,
    attribution_patch,
    patch,
)
from grokkit.edits import Edit, Scale
from grokkit.language_model import LanguageModel
from grokkit.zoo.nano.windows import FIRST_WORD_PIECE

INDUCTION_HEAD = 0.3
"""Mean attention from which a head is called an induction or a previous-token head."""


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns but the first are set to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# Copying


@dataclasses.dataclass(frozen=True)
class Copies:
    """Sequences whose second half repeats the first, and others whose first half is unrelated."""

    kind: str
    repeated: Int[np.ndarray, "sequence position"]
    unrelated: Int[np.ndarray, "sequence position"]


def make_copies(
    lm: LanguageModel, passages: Sequence[str], count: int, length: int, seed: int = 0
) -> list[Copies]:
    """Random pieces of the whole vocabulary, of 16 pieces only, and pieces of held-out text."""
    rng = np.random.default_rng(seed)
    words = np.arange(FIRST_WORD_PIECE, lm.config.vocab_size)
    few = np.stack([rng.choice(words, 16, replace=False) for _ in range(count)])
    rows = [lm.tokenizer.encode(text) for text in passages]
    rows = [row for row in rows if len(row) >= 2 * length]
    text = np.array([rows[i % len(rows)][: 2 * length] for i in range(count)])
    halves = {
        "random, whole vocabulary": rng.choice(words, (2, count, length)),
        "random, 16 pieces": np.stack(
            [np.take_along_axis(few, rng.integers(0, 16, (count, length)), 1) for _ in range(2)]
        ),
        "held-out text": np.stack([np.roll(text[:, :length], 1, axis=0), text[:, length:]]),
    }
    return [
        Copies(name, np.concatenate([b, b], axis=1), np.concatenate([a, b], axis=1))
        for name, (a, b) in halves.items()
    ]


@jax.jit
def _token_losses(logits: Array, tokens: Array) -> Array:
    picked = jnp.take_along_axis(logits[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits[:, :-1], axis=-1) - picked


def second_half_loss(
    lm: LanguageModel, tokens: Int[np.ndarray, "sequence position"], edits: Sequence[Edit] = ()
) -> float:
    """Mean loss of the second half but its first token, in nats."""
    logits = jnp.asarray(np.asarray(lm(tokens, edits=edits).logits))
    return float(np.asarray(_token_losses(logits, tokens))[:, tokens.shape[1] // 2 :].mean())


def without_heads(lm: LanguageModel, heads: Sequence[tuple[int, int]]) -> Scale:
    """Silence (layer, head) pairs; one shape for any of them, so that nothing recompiles."""
    factor = np.ones((lm.config.n_layers, 1, 1, lm.config.n_heads, 1), np.float32)
    for layer, head in heads:
        factor[layer, ..., head, :] = 0
    return Scale("z", factor)


@dataclasses.dataclass(frozen=True)
class HeadScores:
    """Scores of every head on one kind of copies, [layer, head]."""

    induction: Float[np.ndarray, "layer head"]
    previous: Float[np.ndarray, "layer head"]
    duplicate: Float[np.ndarray, "layer head"]
    first: Float[np.ndarray, "layer head"]
    uniform: float
    """Induction score of attention spread evenly over what is visible."""


def head_scores(lm: LanguageModel, copies: Copies) -> HeadScores:
    """Score heads on repeated sequences."""
    tokens = copies.repeated
    _, cache = lm.run_with_cache(tokens, "pattern")
    pattern = np.asarray(cache["pattern"])
    n = tokens.shape[1]
    even = np.broadcast_to(np.tri(n) / np.arange(1, n + 1)[:, None], (len(tokens), 1, n, n))
    return HeadScores(
        np.asarray(induction_score(pattern, tokens)),
        np.asarray(previous_token_score(pattern)),
        np.asarray(duplicate_token_score(pattern, tokens)),
        np.asarray(first_token_mass(pattern)),
        float(induction_score(even.astype(np.float32), tokens)[0]),
    )


def ranked(scores: Float[np.ndarray, "layer head"], n: int) -> list[tuple[int, int]]:
    """The n highest (layer, head)."""
    order = np.argsort(-scores, axis=None, kind="stable")[:n]
    return [(int(a), int(b)) for a, b in zip(*np.unravel_index(order, scores.shape), strict=True)]


def heads_table(
    scores: HeadScores, harm: Float[np.ndarray, "layer head"], n: int = 8, n_previous: int = 4
) -> str:
    """The heads of highest induction score, then of highest previous-token score."""
    shown = ranked(scores.induction, n)
    shown += [head for head in ranked(scores.previous, n_previous) if head not in shown]
    rows = [
        [
            f"L{a}H{b}",
            *(f"{s[a, b]:.3f}" for s in (scores.induction, scores.previous)),
            *(f"{s[a, b]:.3f}" for s in (scores.duplicate, scores.first)),
            f"{harm[a, b]:+z.3f}",
        ]
        for a, b in shown
    ]
    rows.append(["even attention", f"{scores.uniform:.3f}", "", "", "", ""])
    return markdown(
        ["head", "induction", "previous token", "duplicate token", "first token", "harm alone"],
        rows,
    )


def single_harm(lm: LanguageModel, copies: Copies, base: float) -> Float[np.ndarray, "layer head"]:
    """What the second half's loss gains when each head alone is silent, in nats a token."""
    shape = (lm.config.n_layers, lm.config.n_heads)
    harm = np.empty(shape)
    for at in np.ndindex(shape):
        harm[at] = second_half_loss(lm, copies.repeated, [without_heads(lm, [at])]) - base
    return harm


def matched_heads(
    lm: LanguageModel, heads: Sequence[tuple[int, int]], rng: np.random.Generator
) -> list[tuple[int, int]]:
    """As many other heads of the same layers at random, or all others where there are fewer."""
    chosen = []
    for layer in sorted({a for a, _ in heads}):
        here = [b for a, b in heads if a == layer]
        rest = [h for h in range(lm.config.n_heads) if h not in here]
        chosen += [(layer, int(h)) for h in rng.permutation(rest)[: len(here)]]
    return chosen


def knockout_table(
    lm: LanguageModel,
    kinds: Sequence[Copies],
    sets: Mapping[str, Sequence[tuple[int, int]]],
    draws: int = 5,
) -> tuple[str, dict[str, dict[str, float]]]:
    """Benefit of the repetition with sets of heads silent, and with other heads of their layers.

    The benefit is the second half's loss after an unrelated first half minus its loss after its
    own: nats a token.
    """
    rng = np.random.default_rng(0)

    def benefit(copies: Copies, heads: Sequence[tuple[int, int]]) -> float:
        edit = [without_heads(lm, heads)]
        losses = [second_half_loss(lm, t, edit) for t in (copies.unrelated, copies.repeated)]
        return losses[0] - losses[1]

    figures: dict[str, dict[str, float]] = {"none": {c.kind: benefit(c, []) for c in kinds}}
    rows = [["none", *(f"{figures['none'][c.kind]:.3f}" for c in kinds)]]
    for name, heads in sets.items():
        figures[name] = {c.kind: benefit(c, heads) for c in kinds}
        rows.append([name, *(f"{figures[name][c.kind]:.3f}" for c in kinds)])
        controls = [matched_heads(lm, heads, rng) for _ in range(draws)]
        spread = [[benefit(c, heads) for heads in controls] for c in kinds]
        rows.append([f"… others of their layers, {draws} draws",
                     *(f"{np.mean(s):.3f} ({min(s):.3f} to {max(s):.3f})" for s in spread)])  # fmt: skip
    return markdown(["silent heads", *(c.kind for c in kinds)], rows), figures


# Sums


@dataclasses.dataclass(frozen=True)
class Question:
    """A sum and one like it whose next digit differs."""

    name: str
    clean: str
    corrupted: str
    answer: str
    other: str


QUESTIONS = (
    Question("tens", "27+58=", "27+48=", "8", "7"),
    Question("carry", "27+58=", "27+51=", "8", "7"),
    Question("units", "27+58=8", "27+57=8", "5", "4"),
)


def sum_accuracy(
    lm: LanguageModel, pairs: Int[np.ndarray, "pair 2"], edits: Sequence[Edit] = ()
) -> Bool[np.ndarray, " pair"]:
    """Whether each answer's tokens, the newline too, are all the most probable ones."""
    rows = np.array([lm.tokenizer.encode(f"{a}+{b}={a + b}\n") for a, b in pairs])
    best = np.asarray(lm(rows, edits=edits).logits).argmax(axis=-1)
    return (best[:, -4:-1] == rows[:, -3:]).all(axis=1)


@dataclasses.dataclass(frozen=True)
class Solved:
    """What was measured of one question."""

    question: Question
    heads: Sweep
    experts: Sweep
    estimates: dict[str, Float[np.ndarray, "layer case"]]
    terms: dict[str, float]
    terms_corrupted: dict[str, float]

    def recovered(self) -> dict[str, float]:
        """Each component's share of the logit difference restored by patching it."""
        return self._named(self.heads.recovered, self.experts.recovered)

    def estimated(self) -> dict[str, float]:
        """The same by attribution patching."""
        gap = self.heads.clean - self.heads.corrupted
        return self._named(self.estimates["heads"] / gap, self.estimates["experts"] / gap)

    @staticmethod
    def _named(heads: np.ndarray, experts: np.ndarray) -> dict[str, float]:
        found = {}
        for kind, values in (("H", heads), ("E", experts)):
            for layer, row in enumerate(values):
                found |= {f"L{layer}{kind}{i}": float(v) for i, v in enumerate(row)}
        return found


def _digit(lm: LanguageModel, digit: str) -> int:
    return lm.tokenizer.encode(f"1{digit}")[-1]


def solve(lm: LanguageModel, question: Question, progress: bool = True) -> Solved:
    """Patch every head and expert of a question, and attribute its answer directly."""
    answer, other = _digit(lm, question.answer), _digit(lm, question.other)
    metric = LogitDifference(answer, other)
    prompts = (question.clean, question.corrupted)
    exact = {name: patch(lm, *prompts, metric, grid, progress=progress)
             for name, grid in (("heads", Heads()), ("experts", Experts()))}  # fmt: skip
    estimates = {name: attribution_patch(lm, *prompts, metric, grid).effect
                 for name, grid in (("heads", Heads()), ("experts", Experts()))}  # fmt: skip
    terms = [logit_attribution(lm, prompt, answer, other).terms() for prompt in prompts]
    return Solved(question, exact["heads"], exact["experts"], estimates, *terms)


def question_table(solved: Solved, n: int = 10) -> str:
    """The components that restore most, and what each writes directly."""
    recovered, estimated = solved.recovered(), solved.estimated()
    order = sorted(recovered, key=lambda name: -abs(recovered[name]))[:n]
    rows = [
        [
            name,
            f"{recovered[name]:+z.2f}",
            f"{estimated[name]:+z.2f}",
            f"{solved.terms[name]:+z.2f}",
            f"{solved.terms_corrupted[name]:+z.2f}",
        ]
        for name in order
    ]
    totals = (solved.terms, solved.terms_corrupted)
    rows.append(["all terms", "", "", *(f"{sum(t.values()):+z.2f}" for t in totals)])
    return markdown(
        ["component", "patched", "estimated", "writes (clean)", "writes (corrupted)"], rows
    )


def stream_table(lm: LanguageModel, question: Question, progress: bool = True) -> str:
    """Share restored by the stream of each layer and token."""
    metric = LogitDifference(_digit(lm, question.answer), _digit(lm, question.other))
    sweep = patch(
        lm, question.clean, question.corrupted, metric, Positions("resid_pre"), progress=progress
    )
    pair = zip(*(lm.to_str_tokens(t) for t in (question.clean, question.corrupted)), strict=True)
    shown = [f"`{a.strip() or '_'}`" if a == b else f"`{a}`/`{b}`" for a, b in pair]
    rows = [
        [f"before layer {layer}", *(f"{x:z.2f}" for x in row)]
        for layer, row in enumerate(sweep.recovered)
    ]
    return markdown(["stream", *shown], rows)


def sums_knockout_table(
    lm: LanguageModel,
    pairs: Int[np.ndarray, "pair 2"],
    components: Sequence[str],
    draws: int = 5,
) -> tuple[str, float, float, list[float]]:
    """Share of sums right with components silent, and with others of the same kind and layer."""
    rng = np.random.default_rng(0)
    sizes = {"H": lm.config.n_heads, "E": lm.config.n_experts}

    def silent(names: Sequence[str]) -> float:
        heads = [_parse(name)[1:] for name in names if _parse(name)[0] == "H"]
        edits: list[Edit] = [without_heads(lm, heads)]
        for kind, layer, index in map(_parse, names):
            if kind == "E":
                edits.append(Scale("expert_weights", 0.0, layers=[layer], experts=[index]))
        return float(sum_accuracy(lm, pairs, edits).mean())

    def others() -> list[str]:
        names: list[str] = []
        for kind, layer, _ in map(_parse, components):
            free = [f"L{layer}{kind}{i}" for i in range(sizes[kind])]
            free = [name for name in free if name not in components and name not in names]
            names.append(free[rng.integers(len(free))])
        return names

    intact, without = float(sum_accuracy(lm, pairs).mean()), silent(components)
    controls = [silent(others()) for _ in range(draws)]
    mean, low, high = np.mean(controls), min(controls), max(controls)
    rows = [
        ["none", f"{intact:.3f}"],
        [", ".join(components), f"{without:.3f}"],
        [f"others of the same kinds and layers, {draws} draws",
         f"{mean:.3f} ({low:.3f} to {high:.3f})"],
    ]  # fmt: skip
    return markdown(["silent components", "sums right"], rows), intact, without, controls


def _parse(name: str) -> tuple[str, int, int]:
    """`L3H5` -> ("H", 3, 5)."""
    kind = "H" if "H" in name else "E"
    layer, index = name[1:].split(kind)
    return kind, int(layer), int(index)


# Lenses


def lens_table(
    lm: LanguageModel,
    fit_on: Int[np.ndarray, "sequence position"],
    read_on: Int[np.ndarray, "sequence2 position"],
    steps: int,
    progress: bool = True,
) -> str:
    """Mean divergence of the logit lens and of a tuned one, on text the lens was not fitted on."""
    tuned, _ = fit_tuned_lens(
        lm, fit_on, steps=steps, batch=min(4, len(fit_on)), learning_rate=2e-3, progress=progress
    )
    plain = logit_lens(lm, read_on, ["embed", "resid_mid", "resid_post"])
    fitted = dict(zip(range(lm.config.n_layers), logit_lens(lm, read_on, tuned=tuned).kl,
                      strict=True))  # fmt: skip
    rows = []
    for (site, layer), kl in zip(plain.depths, plain.kl, strict=True):
        name = "embedding" if layer is None else f"layer {layer}, after " + (
            "attention" if site == "resid_mid" else "experts")  # fmt: skip
        both = f"{fitted[layer].mean():.3f}" if site == "resid_post" and layer is not None else ""
        rows.append([name, f"{kl.mean():.3f}", both])
    return markdown(["stream", "logit lens", "tuned lens"], rows)
