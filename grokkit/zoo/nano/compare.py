"""What fewer bits cost nano: the loss on each domain's held-out text, and routing that changes."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from tqdm.auto import tqdm

import grokkit
from grokkit.language_model import LanguageModel
from grokkit.zoo.nano.data import Corpus
from grokkit.zoo.nano.evaluate import BATCH, model_losses

GROUP_SIZES = (16, 32, 64)


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
    models: Mapping[str, LanguageModel], held_out: Mapping[str, np.ndarray], windows: int = 48
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
    base = found[names[0]]
    by_layer = []
    lines = [
        "| | " + " | ".join(base["loss"]) + " | mean |",
        "|---" * (len(base["loss"]) + 2) + "|",
    ]
    for name in names:
        losses = found[name]["loss"]
        cells = []
        for mine, first in [
            *((losses[d], base["loss"][d]) for d in losses),
            (np.mean(list(losses.values())), np.mean(list(base["loss"].values()))),
        ]:
            cells.append(
                f"{mine:.4f}" + ("" if name == names[0] else f" ({mine / first - 1:+.2%})")
            )
        lines.append(f"| {name}: loss | " + " | ".join(cells) + " |")
    for name in names[1:]:
        changed = found[name]["changed"]
        cells = [f"{v.mean():.1%}" for v in [*changed.values(), np.mean(list(changed.values()))]]
        lines.append(f"| {name}: sets changed | " + " | ".join(cells) + " |")
        layers = np.mean(list(changed.values()), axis=0)
        by_layer.append(f"{name}: sets changed by layer: " + ", ".join(f"{v:.1%}" for v in layers))
    return "\n".join([*lines, *by_layer])


def compare_4_bits(model: Path, corpus: Corpus) -> str:
    """Convert a checkpoint to 4-bit experts in several group sizes, compare, and say it all."""
    mesh = grokkit.make_mesh(1, 1)
    models = {"8 bits": grokkit.load(model, mesh, "float32", progress=False)}
    size = {}
    with tempfile.TemporaryDirectory() as folder:
        for group in GROUP_SIZES:
            target = Path(folder) / str(group)
            grokkit.convert(model, target, experts="int4", group_size=group, progress=False)
            models[f"int4, groups of {group}"] = grokkit.load(
                target, mesh, "float32", progress=False
            )
            size[group] = sum(f.stat().st_size for f in target.glob("*.safetensors"))
        found = compare(models, corpus.held_out)
    sizes = ", ".join(f"{n:,} B with groups of {group}" for group, n in size.items())
    return f"{table(found)}\n{sizes}"
