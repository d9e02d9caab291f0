"""What fewer bits cost nano: the loss on each domain's held-out text, and routing that changes."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from tqdm.auto import tqdm

import grokkit
from grokkit.language_model import LanguageModel
from grokkit.tokenizer import Tokenizer
from grokkit.zoo.nano.data import EOS, Corpus
from grokkit.zoo.nano.evaluate import BATCH, CARD_FILE, model_losses
from grokkit.zoo.nano.held_out import load_sample

GROUP_SIZES = (16, 32, 64)
WINDOWS, SAMPLE_WINDOWS = 48, 16


def chosen_sets(
    lm: LanguageModel, windows: Int[np.ndarray, "n t"]
) -> Int[np.ndarray, "n layer t choice"]:
    """The experts of every token in every layer, in ascending order."""
    parts = []
    for start in range(0, len(windows), BATCH):
        _, cache = lm.run_with_cache(windows[start : start + BATCH], ["expert_indices"])
        parts.append(np.sort(np.asarray(cache["expert_indices"]), axis=-1).swapaxes(0, 1))
    return np.concatenate(parts)


def differ(
    a: Int[np.ndarray, "*lead choice"], b: Int[np.ndarray, "*lead choice"]
) -> Bool[np.ndarray, "*lead"]:
    """Where two choices of experts, each in ascending order, are not the same set."""
    return np.any(a != b, axis=-1)


def compare(
    models: Mapping[str, LanguageModel], held_out: Mapping[str, np.ndarray], windows: int = WINDOWS
) -> dict[str, dict[str, Any]]:
    """Each model's held-out loss, and how its routing differs from the first model's.

    **Arguments:**

    - `models`: by name; the first is what the others are compared with.
    - `held_out`: token ids of each domain's text.
    - `windows`: evenly spaced windows of one context, a multiple of 16, from each domain.

    **Returns:** for each model, `loss` in nats a token by domain, and `changed`, the share of tokens
    whose set of experts is another, by domain [layer].
    """
    found: dict[str, dict[str, Any]] = {name: {"loss": {}, "changed": {}} for name in models}
    for domain, stream in tqdm(held_out.items(), desc="held-out text"):
        first: np.ndarray | None = None
        for name, lm in models.items():
            context = lm.config.context_length
            starts = np.linspace(0, len(stream) - context, windows).astype(int)
            sample = np.stack([stream[s : s + context] for s in starts]).astype(np.int32)
            sets = chosen_sets(lm, sample)
            first = sets if first is None else first
            found[name]["loss"][domain] = float(model_losses(lm, sample).mean())
            found[name]["changed"][domain] = differ(sets, first).mean(axis=(0, 2))
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """The comparison as a table in Markdown: losses, then changed routing by domain and layer."""
    names = list(found)
    base = found[names[0]]["loss"]
    by_layer = []
    lines = [
        "| | " + " | ".join(base) + " | mean |",
        "|---" * (len(base) + 2) + "|",
        f"| {names[0]}: loss | " + " | ".join(f"{v:.4f}" for v in _with_mean(base)) + " |",
    ]
    for name in names[1:]:
        pairs = zip(_with_mean(found[name]["loss"]), _with_mean(base), strict=True)
        cells = [f"{100 * (mine / first - 1):+.2f} %" for mine, first in pairs]
        lines.append(f"| {name}: loss | " + " | ".join(cells) + " |")
    for name in names[1:]:
        changed = {domain: v.mean() for domain, v in found[name]["changed"].items()}
        cells = [f"{100 * v:.1f} %" for v in _with_mean(changed)]
        lines.append(f"| {name}: sets changed | " + " | ".join(cells) + " |")
        layers = np.mean(list(found[name]["changed"].values()), axis=0)
        shares = ", ".join(f"{100 * v:.1f}" for v in layers)
        by_layer.append(f"{name}: {shares} % of sets changed, layer by layer")
    return "\n".join([*lines, *by_layer])


def _with_mean(by_domain: Mapping[str, float]) -> list[float]:
    return [*by_domain.values(), float(np.mean(list(by_domain.values())))]


def token_streams(
    tokenizer: Tokenizer, texts: Mapping[str, list[str]]
) -> dict[str, Int[np.ndarray, " token"]]:
    """Each domain's documents in a row, each ended by EOS, in a model's own tokens.

    A run's tokens are those of the tokenizer that it trained, which is another one when the
    packages that the text comes from have changed.
    """
    return {
        name: np.array([i for text in documents for i in (*tokenizer.encode(text), EOS)])
        for name, documents in texts.items()
    }


def other_text(model: Path, corpus: Corpus) -> list[str]:
    """The domains whose text is not what a checkpoint's card says it was trained with."""
    card = model / CARD_FILE
    if not card.is_file():
        return []
    known = json.loads(card.read_text(encoding="utf-8")).get("data", {})
    return [name for name, digest in corpus.digests.items() if known.get(name) != digest]


def compare_4_bits(model: Path, corpus: Corpus | None = None) -> str:
    """Convert a checkpoint to 4-bit experts in several group sizes, compare, and say it all.

    **Arguments:**

    - `model`: the checkpoint.
    - `corpus`: whose held-out text is used; by default the passages that the package ships.
    """
    mesh, windows = grokkit.make_mesh(1, 1), WINDOWS
    models = {"8 bits": grokkit.load(model, mesh, "float32", progress=False)}
    if corpus is None:
        windows = SAMPLE_WINDOWS
        texts = {name: [p.text for p in passages] for name, passages in load_sample().items()}
    else:
        texts = corpus.held_out_texts
    size = {}
    with tempfile.TemporaryDirectory() as folder:
        for group in GROUP_SIZES:
            target = Path(folder) / str(group)
            grokkit.convert(model, target, experts="int4", group_size=group, progress=False)
            models[f"groups of {group}"] = grokkit.load(target, mesh, "float32", progress=False)
            size[group] = sum(f.stat().st_size for f in target.glob("*.safetensors"))
        found = compare(models, token_streams(models["8 bits"].tokenizer, texts), windows)
    lines = [table(found), ", ".join(f"groups of {g}: {n:,} bytes" for g, n in size.items())]
    for name in [] if corpus is None else other_text(model, corpus):
        lines.append(
            f"{name}: not the text that the model's card names, so that it may have been trained "
            f"on some of it"
        )
    return "\n".join(lines)
