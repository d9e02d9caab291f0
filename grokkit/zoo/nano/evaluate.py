"""What a shipped nano can do, measured through the project's own loader and model."""

import functools
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer
from tqdm.auto import tqdm

from grokkit.config import GrokConfig
from grokkit.language_model import LanguageModel
from grokkit.runtime import files
from grokkit.taps import Capture
from grokkit.zoo.nano.data import Corpus
from grokkit.zoo.nano.export import FLOATS_FILE, load_floats
from grokkit.zoo.nano.probes import head_scores, xz_bits_per_byte
from grokkit.zoo.nano.training_model import token_losses
from grokkit.zoo.nano.windows import COPIES, SUMS, repeated_sequences, sum_pairs

CARD_FILE = "card.json"
BARS = {"prose": 0.60, "spanish": 0.60, "verse": 0.66, "french": 0.70, "code": 1.10}
BATCH = 16
INDUCTION_HEAD = 0.3  # mean attention from which a head is called an induction head
PERMUTATIONS = 999


@functools.partial(jax.jit, static_argnames="length")
def _losses(
    logits: Float[Array, "b t v"], tokens: Int[Array, "b t"], length: int
) -> Float[Array, "b t-1"]:
    logits, targets = logits[:, : length - 1], tokens[:, 1:length]
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def model_losses(
    lm: LanguageModel, windows: Integer[np.ndarray, "n t"]
) -> Float[np.ndarray, "n t-1"]:
    """Cross-entropy in nats of each token after a window's first.

    Args:
        lm: the model.
        windows: token ids, at most the model's context long.
    """
    parts = []
    for rows, count in _batches(windows):
        logits = lm(rows).logits
        parts.append(np.asarray(_losses(logits, rows, rows.shape[1]))[:count])
    return np.concatenate(parts)


def _batches(windows: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    """Batches of one size, the last filled up, so that everything is compiled once."""
    for start in range(0, len(windows), BATCH):
        rows = windows[start : start + BATCH].astype(np.int32)
        yield np.concatenate([rows, np.repeat(rows[-1:], BATCH - len(rows), axis=0)]), len(rows)


def scored_windows(
    stream: Integer[np.ndarray, "n"], context: int
) -> tuple[Integer[np.ndarray, "w t"], np.ndarray]:
    """Half-overlapping windows over a stream, and which of their predictions count.

    Every token but the first is predicted exactly once, from at least half a context where the
    stream has that much.

    Args:
        stream: token ids, at least one context of them.
        context: window length.
    """
    half = context // 2
    starts = list(range(0, len(stream) - context, half)) + [len(stream) - context]
    windows = np.stack([stream[s : s + context] for s in starts])
    counts = np.zeros((len(starts), context - 1), bool)
    done = 1  # tokens predicted, or not to be: the first has nothing before it
    for row, start in enumerate(starts):
        counts[row, done - start - 1 :] = True
        done = start + context
    return windows, counts


def measure_domains(lm: LanguageModel, corpus: Corpus) -> dict[str, Any]:
    """Held-out bits per byte of each domain and their share of what `xz -9e` needs."""
    rows = {}
    for name, stream in tqdm(corpus.held_out.items(), desc="held-out text"):
        windows, counts = scored_windows(stream, lm.config.context_length)
        nats = float(model_losses(lm, windows)[counts].sum())
        size = sum(len(text.encode()) for text in corpus.held_out_texts[name])
        xz = xz_bits_per_byte("".join(corpus.held_out_texts[name]))
        bits = nats / math.log(2) / size
        rows[name] = {
            "bytes": size,
            "bits_per_byte": bits,
            "xz_bits_per_byte": xz,
            "share_of_xz": bits / xz,
            "bar": BARS[name],
        }
    return rows


def measure_sums(lm: LanguageModel) -> dict[str, Any]:
    """Share of unseen two-digit sums answered exactly, greedily, and of as many seen ones.

    An answer counts as exact when each of its tokens, the newline after it too, is the most
    probable one after the tokens before; that is what greedy generation would have written.
    """
    shares: dict[str, Any] = {}
    seen, unseen = sum_pairs()
    seen = seen[np.random.default_rng(0).permutation(len(seen))[: len(unseen)]]
    for name, pairs in [("unseen", unseen), ("seen", seen)]:
        exact = []
        # One row length for answers of two digits and another for those of three.
        for digits in (2, 3):
            texts = [f"{a}+{b}={a + b}\n" for a, b in pairs if len(str(a + b)) == digits]
            rows = np.array([lm.tokenizer.encode(text) for text in texts])
            for batch, count in _batches(rows):
                best = np.asarray(jnp.argmax(lm(batch).logits, axis=-1))
                answer = slice(-digits - 1, None)
                right = best[:, :-1][:, answer] == batch[:, 1:][:, answer]
                exact += right.all(axis=1)[:count].tolist()
        shares[name] = float(np.mean(exact))
    shares["unseen_count"] = len(unseen)
    return shares


def measure_copying(lm: LanguageModel, count: int = 32) -> dict[str, Any]:
    """Loss on the two halves of a repeated random sequence, and every head's two scores.

    The induction score of a head is its mean attention, from a token of the second half, to the
    token that followed that token's earlier occurrence; the previous-token score is its mean
    attention to the token before.
    """
    figures: dict[str, Any] = {}
    for length in (lm.config.context_length // 8, lm.config.context_length // 4):
        tokens = repeated_sequences(7, count, length, lm.config.vocab_size)
        losses = model_losses(lm, tokens).mean(axis=0)
        first, second = float(losses[: length - 1].mean()), float(losses[length:].mean())
        figures[f"length_{length}"] = {
            "first_half": first,
            "second_half": second,
            "ratio": second / first,
        }
    scores = []
    for rows, _ in _batches(tokens):
        _, cache = lm.run_with_cache(rows, ["pattern"])
        scores.append(head_scores(np.asarray(cache["pattern"]), length))
    for kind in ("induction", "previous"):
        table = np.mean([score[kind] for score in scores], axis=0)
        layer, head = np.unravel_index(table.argmax(), table.shape)
        figures[kind] = {
            "best": {"layer": int(layer), "head": int(head), "score": float(table.max())},
            "scores": table.round(4).tolist(),
        }
    above = int((np.array(figures["induction"]["scores"]) >= INDUCTION_HEAD).sum())
    figures["induction"]["heads"] = above
    return figures


def _samples(lm: LanguageModel, corpus: Corpus, windows: int) -> dict[str, np.ndarray]:
    """Windows of each domain's held-out text, of unseen sums and of repeated sequences."""
    context = lm.config.context_length
    samples = {}
    for name, stream in corpus.held_out.items():
        starts = np.linspace(0, len(stream) - context, windows).astype(int)
        samples[name] = np.stack([stream[s : s + context] for s in starts])
    pairs = np.random.default_rng(0).permutation(sum_pairs()[1])
    ids = np.array(lm.tokenizer.encode("".join(f"{a}+{b}={a + b}\n" for a, b in pairs)))
    starts = np.linspace(0, len(ids) - context, windows).astype(int)
    samples[SUMS] = np.stack([ids[s : s + context] for s in starts])
    samples[COPIES] = repeated_sequences(8, windows, context // 2, lm.config.vocab_size)
    return samples


def measure_routing(lm: LanguageModel, corpus: Corpus, windows: int = 48) -> dict[str, Any]:
    """Each expert's share of the choices, in all and by kind of text, and a permutation null.

    The statistic of a layer is the sum over domains and experts of the squared distance between a
    domain's share and the mean over domains, on the five kinds of text alone. Under the null,
    whole windows change domains, since the tokens of a window are not independent.
    """
    samples = _samples(lm, corpus, windows)
    shares = {}
    for name, sample in samples.items():
        parts = []
        for rows, count in _batches(sample):
            _, cache = lm.run_with_cache(rows, [Capture("expert_indices")])
            chosen = np.asarray(cache["expert_indices"])[:, :count]
            one_hot = chosen[..., None] == np.arange(lm.config.n_experts)
            parts.append(one_hot.mean(axis=(2, 3)).swapaxes(0, 1))
        shares[name] = np.concatenate(parts)  # [window, layer, expert]
    by_window = np.concatenate([shares[name] for name in corpus.held_out])
    of = np.repeat(np.arange(len(corpus.held_out)), windows)

    def statistic(of: np.ndarray) -> np.ndarray:
        means = np.stack([by_window[of == d].mean(axis=0) for d in range(len(corpus.held_out))])
        return ((means - means.mean(axis=0)) ** 2).sum(axis=(0, 2))

    rng = np.random.default_rng(0)
    found = statistic(of)
    null = np.stack([statistic(rng.permutation(of)) for _ in range(PERMUTATIONS)])
    by_kind = {name: share.mean(axis=0) for name, share in shares.items()}
    load = np.mean(list(by_kind.values()), axis=0)
    on_text = by_window.mean(axis=0)
    return {
        "load": load.round(4).tolist(),
        "least_load_by_layer": load.min(axis=1).round(4).tolist(),
        "least_load_on_text_by_layer": on_text.min(axis=1).round(4).tolist(),
        "by_kind": {name: row.round(4).tolist() for name, row in by_kind.items()},
        "permutation_p": ((1 + (null >= found).sum(axis=0)) / (1 + PERMUTATIONS)).tolist(),
        "statistic_over_null_mean": (found / null.mean(axis=0)).round(2).tolist(),
    }


def measure_quantisation(
    lm: LanguageModel, corpus: Corpus, floats: Path, windows: int = 48
) -> dict[str, Any]:
    """Held-out loss of the model and of the float parameters it was rounded from, in nats."""
    params, step = load_floats(floats, lm.config)
    context = lm.config.context_length
    reference = jax.jit(functools.partial(token_losses, config=lm.config))
    ours, theirs = [], []
    for stream in corpus.held_out.values():
        starts = np.linspace(0, len(stream) - context, windows).astype(int)
        sample = np.stack([stream[s : s + context] for s in starts])
        ours.append(model_losses(lm, sample).mean())
        for rows, count in _batches(sample):
            theirs.append(np.asarray(reference(params, rows))[:count].mean())
    quantised, exact = float(np.mean(ours)), float(np.mean(theirs))
    return {
        "step": step,
        "loss_8bit": quantised,
        "loss_float": exact,
        "relative_cost": quantised / exact - 1,
    }


def weights_digest(directory: Path) -> str:
    """SHA-256 of a checkpoint's tensor files, one after the other in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted((directory / "ckpt-0").iterdir()):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def evaluate(lm: LanguageModel, corpus: Corpus, run: Path) -> dict[str, Any]:
    """Everything that the model's card states.

    Args:
        lm: the model as shipped.
        corpus: the prepared data of the run that trained it.
        run: the run's folder, which holds the float parameters.
    """
    return {
        "parameters": lm.config.n_params,
        "domains": measure_domains(lm, corpus),
        "sums": measure_sums(lm),
        "copying": measure_copying(lm),
        "routing": measure_routing(lm, corpus),
        "quantisation": measure_quantisation(lm, corpus, run / FLOATS_FILE),
        "data": corpus.digests,
    }


def training_figures(run: Path, config: GrokConfig, batch: int, step: int) -> dict[str, Any]:
    """How long the run was, from its log."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    # Each start of the program counts its minutes from nothing.
    minutes, last = 0.0, 0.0
    for line in lines:
        minutes += line["minutes"] - (last if line["minutes"] > last else 0.0)
        last = line["minutes"]
    return {
        "steps": step,
        "tokens": step * batch * config.context_length,
        "minutes": round(minutes),
    }


def table(card: dict[str, Any]) -> str:
    """The card's main figures, for reading."""
    lines = ["held-out text     bits/byte   xz -9e   share    bar"]
    for name, row in card["domains"].items():
        mark = "ok" if row["share_of_xz"] <= row["bar"] else "MISSED"
        lines.append(
            f"  {name:<14} {row['bits_per_byte']:9.3f} {row['xz_bits_per_byte']:8.3f} "
            f"{row['share_of_xz']:7.3f} {row['bar']:6.2f}  {mark}"
        )
    sums, copying, routing = card["sums"], card["copying"], card["routing"]
    lines.append(
        f"sums, exact: unseen {sums['unseen']:.1%} of {sums['unseen_count']}, "
        f"seen {sums['seen']:.1%}   (bar 90 %)"
    )
    for name, row in copying.items():
        if name.startswith("length_"):
            lines.append(
                f"copying {name[7:]:>3} tokens: first half {row['first_half']:.2f} nats, second "
                f"{row['second_half']:.2f}, ratio {row['ratio']:.2f}   (bar .50)"
            )
    for kind in ("induction", "previous"):
        best = copying[kind]["best"]
        lines.append(
            f"best {kind} head: layer {best['layer']}, head {best['head']}, {best['score']:.2f}"
        )
    lines.append(f"heads with an induction score of {INDUCTION_HEAD} or more: "
                 f"{copying['induction']['heads']}")  # fmt: skip
    for key, label in [("load", "all kinds of text"), ("load_on_text", "the five domains alone")]:
        shares = ", ".join(f"{x:.1%}" for x in routing[f"least_{key}_by_layer"])
        lines.append(f"least used expert by layer, {label}: {shares}   (bar 3 %)")
    lines.append(
        "routing differs by domain, permutation p by layer: "
        + ", ".join(f"{p:.3f}" for p in routing["permutation_p"])
    )
    lines.append(
        f"8-bit weights cost {card['quantisation']['relative_cost']:+.3%} of held-out loss (bar 1 %)"
    )
    return "\n".join(lines)


def write_card(card: dict[str, Any], directory: Path) -> None:
    """Write the card beside the weights."""
    files.write(directory / CARD_FILE, json.dumps(card, indent=1) + "\n")
