"""The tables of docs/findings-circuits.md, measured on nano.

`python -m grokkit.zoo.nano.circuit_findings` prints them; `--write docs/findings-circuits.md`
puts each between its markers on the page.
"""

import argparse
from pathlib import Path

import numpy as np

from grokkit.errors import GrokkitError
from grokkit.language_model import LanguageModel
from grokkit.loading import load
from grokkit.runtime import files
from grokkit.sharding import make_mesh
from grokkit.zoo.nano import circuit_tables as tables_of
from grokkit.zoo.nano.circuit_tables import INDUCTION_HEAD
from grokkit.zoo.nano.held_out import load_sample
from grokkit.zoo.nano.routing_findings import fill
from grokkit.zoo.nano.windows import sum_pairs


def measure(
    lm: LanguageModel,
    passages: list[str],
    count: int = 16,
    length: int = 48,
    n_sums: int = 200,
    lens_steps: int = 100,
    progress: bool = True,
) -> dict[str, str]:
    """All tables, by the name of their place on the page.

    **Arguments:**

    - `passages`: held-out text; three of each four fit the lens, the rest are read with it.
    - `count`, `length`: copied sequences of each kind, and tokens of a half.
    - `n_sums`: held-out sums with answers of two digits.
    - `lens_steps`: steps of the tuned lens.

    **Raises:** `GrokkitError` if there is too little text.
    """
    n = min(96, lm.config.context_length)
    rows = [lm.tokenizer.encode(text)[:n] for text in passages]
    ids = np.array([row for row in rows if len(row) == n])
    if len(ids) < 4 or n < 2 * length:
        raise GrokkitError(f"expected at least 4 passages of {n} tokens, and copies of at most "
                           f"{n // 2}; found {len(ids)} passages, and copies of {length}")  # fmt: skip
    held = np.arange(len(ids)) % 4 == 3
    tables, summary = _copying(lm, passages, count, length)
    sums, more = _sums(lm, n_sums, progress)
    tables |= sums | {"lens": tables_of.lens_table(lm, ids[~held], ids[held], lens_steps, progress)}
    tables["summary"] = "\n".join(f"- {sentence}" for sentence in summary + more)
    return tables


def _copying(
    lm: LanguageModel, passages: list[str], count: int, length: int
) -> tuple[dict[str, str], list[str]]:
    kinds = tables_of.make_copies(lm, passages, count, length)
    scores = tables_of.head_scores(lm, kinds[0])
    n_found = int((scores.induction >= INDUCTION_HEAD).sum())
    n_previous = int((scores.previous >= INDUCTION_HEAD).sum())
    induction = tables_of.ranked(scores.induction, n_found or 4)
    sets = {
        f"{n_found} induction heads" if n_found else "4 of highest induction score": induction,
        f"{n_previous} previous-token heads" if n_previous else "4 of highest previous-token "
        "score": tables_of.ranked(scores.previous, n_previous or 4),
    }  # fmt: skip
    base = tables_of.second_half_loss(lm, kinds[0].repeated, [tables_of.without_heads(lm, [])])
    harm = tables_of.single_harm(lm, kinds[0], base)
    table, figures = tables_of.knockout_table(lm, kinds, sets)
    best = induction[0]
    worst = tables_of.ranked(harm, 1)[0]
    correlation = np.corrcoef(scores.induction.ravel(), harm.ravel())[0, 1]
    none = figures["none"]
    first = next(iter(sets))
    sentences = [
        (
            f"{n_found} of {scores.induction.size} heads attend by at least {INDUCTION_HEAD} to the "
            f"token after the earlier occurrence, the mark of an induction head; the highest is "
            f"L{best[0]}H{best[1]} with {scores.induction[best]:.3f}, where even attention has "
            f"{scores.uniform:.3f}. {n_previous} attend by at least {INDUCTION_HEAD} to the token "
            f"before; the highest has {scores.previous.max():.3f}."
        ),
        "A repetition saves, in nats a token: "
        + "; ".join(f"{kind} {none[kind]:.3f}" for kind in none)
        + f". With the {first} silent: "
        + "; ".join(f"{kind} {figures[first][kind]:.3f}" for kind in none)
        + ".",
        (
            f"Over all heads, the induction score and the harm of silencing that head alone "
            f"correlate at {correlation:+z.2f}; silencing L{worst[0]}H{worst[1]} alone harms most, by "
            f"{harm[worst]:+z.3f} nats a token."
        ),
    ]
    return {"heads": tables_of.heads_table(scores, harm), "knockout": table}, sentences


def _sums(lm: LanguageModel, n_sums: int, progress: bool) -> tuple[dict[str, str], list[str]]:
    held_out = sum_pairs()[1]
    pairs = held_out[held_out.sum(axis=1) < 100]
    pairs = pairs[np.random.default_rng(0).permutation(len(pairs))[:n_sums]]
    solved = [tables_of.solve(lm, question, progress) for question in tables_of.QUESTIONS]
    tables = {f"sum-{s.question.name}": tables_of.question_table(s) for s in solved}
    tables["sum-stream"] = tables_of.stream_table(lm, tables_of.QUESTIONS[0], progress)
    strength: dict[str, float] = {}
    for s in solved:
        for name, share in s.recovered().items():
            strength[name] = max(strength.get(name, 0.0), abs(share))
    chosen = sorted(strength, key=lambda name: -strength[name])[:6]
    tables["sum-knockout"], intact, without, controls = tables_of.sums_knockout_table(
        lm, pairs, chosen
    )
    exact = np.concatenate([list(s.recovered().values()) for s in solved])
    guess = np.concatenate([list(s.estimated().values()) for s in solved])
    shown = bool(tables_of.sum_accuracy(lm, np.array([[27, 58]]))[0])
    trained = not (held_out == [27, 58]).all(axis=1).any()
    sentences = [
        (
            f"27 + 58 is {'answered 85' if shown else 'not answered right'}; it was "
            f"{'among the sums trained on' if trained else 'held out of training'}. Of {len(pairs)} "
            f"held-out sums below 100, {intact:.1%} are right."
        ),
        (
            f"Silencing the six components that restore most over the three questions "
            f"({', '.join(chosen)}) leaves {without:.1%} right; six others of the same kinds and "
            f"layers leave {np.mean(controls):.1%} on average."
        ),
        (
            f"Attribution patching agrees with patching at a correlation of "
            f"{np.corrcoef(exact, guess)[0, 1]:+z.2f} over all heads and experts of the questions."
        ),
    ]
    return tables, sentences


def main(arguments: list[str] | None = None) -> None:
    """Measure and print, or write the page."""
    parser = argparse.ArgumentParser(prog="python -m grokkit.zoo.nano.circuit_findings")
    parser.add_argument("--model", default="nano", help="shipped model or checkpoint directory")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables on this page")
    options = parser.parse_args(arguments)
    page = options.write.read_text(encoding="utf-8") if options.write else None
    lm = load(options.model, mesh=make_mesh(1, 1), dtype="float32", progress=False)
    tables = measure(lm, [p.text for found in load_sample().values() for p in found])
    if page is None:
        print("\n\n".join(f"## {name}\n\n{table}" for name, table in tables.items()))
        return
    files.write(options.write, fill(page, tables))


if __name__ == "__main__":
    main()
