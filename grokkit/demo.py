"""What `make demo` shows: a model on eight devices, its text, and the experts behind each token."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import grokkit
from grokkit.cli import guarded
from grokkit.cli_sample import PROMPT
from grokkit.language_model import LanguageModel

DEVICES = 8
_COLOURS = (31, 32, 33, 34, 35, 36, 91, 94)  # ANSI foregrounds, one an expert


def show_layout(lm: LanguageModel) -> None:
    """Draw how one weight of the first layer lies over the devices."""
    query: Any = lm.model.blocks.attention.query
    weight = query.weight[0]
    n_outputs, n_inputs = weight.shape
    n_devices = lm.mesh.devices.size
    print(
        f"Layer 0's query weight, {n_outputs} outputs x {n_inputs} inputs in {weight.dtype}: each "
        f"of {n_devices} devices holds the rows of {lm.config.n_heads // n_devices} of its "
        f"{lm.config.n_heads} heads.\n"
    )
    jax.debug.visualize_array_sharding(weight)


def stream_text(lm: LanguageModel, prompt: str, max_len: int, seed: int) -> list[int]:
    """Print the prompt and, as it comes, its continuation; return the continuation's ids."""
    print(f"\n{prompt}", end="", flush=True)
    ids = []
    for token in lm.stream(prompt, max_len=max_len, temperature=0.7, top_p=0.95, seed=seed):
        print(token.text, end="", flush=True)
        ids.append(token.id)
    print("\n")
    return ids


def show_experts(lm: LanguageModel, ids: Sequence[int], colour: bool) -> None:
    """Print a line for each token: the experts it chose in every layer, the more probable first."""
    _, cache = lm.run_with_cache(np.array([ids]), "expert_indices")
    chosen = np.asarray(cache["expert_indices"])[:, 0]  # [layer, position, choice]
    labels = [repr(text)[1:-1] for text in lm.to_str_tokens(ids)]
    width = max(len("token"), *map(len, labels)) + 2
    print(f"The {lm.config.n_experts_per_token} of {lm.config.n_experts} experts of each token:\n")
    header = "".join(f"{f'layer {layer}':>9}" for layer in range(lm.config.n_layers))
    print(f"{'token':<{width}}{header}")
    for position, label in enumerate(labels):
        cells = "".join(_cell(pair, colour) for pair in chosen[:, position].tolist())
        print(f"{label:<{width}}{cells}")


def _cell(experts: Sequence[int], colour: bool) -> str:
    """`4+3`, right-aligned in nine columns; colours do not count as width."""
    plain = "+".join(map(str, experts))
    shown = plain
    if colour:
        paint = {expert: f"\x1b[{_COLOURS[expert % len(_COLOURS)]}m" for expert in experts}
        shown = "+".join(f"{paint[expert]}{expert}\x1b[0m" for expert in experts)
    return " " * max(9 - len(plain), 1) + shown


def run(arguments: Sequence[str] | None = None) -> None:
    """Run the demo; `python -m grokkit.demo --help` lists the options."""
    parser = argparse.ArgumentParser(prog="python -m grokkit.demo", description=__doc__)
    parser.add_argument("source", nargs="?", default="nano", help="nano, or a checkpoint directory")
    parser.add_argument("--prompt", default=PROMPT, help="the text to continue")
    parser.add_argument("--max-len", type=int, default=40, help="the most tokens to add")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another text")
    options = parser.parse_args(arguments)

    grokkit.virtual_devices(DEVICES)
    lm = grokkit.load(options.source, progress=False)
    print(f"{lm}\n")
    show_layout(lm)
    new = stream_text(lm, options.prompt, options.max_len, options.seed)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    show_experts(lm, lm.tokenizer.encode(options.prompt) + new, colour)


def main(arguments: Sequence[str] | None = None) -> int:
    """As `run`, but bad input and Ctrl-C end with a message and the exit status returned."""
    return guarded("grokkit.demo", lambda: run(arguments), is_program=arguments is None)


if __name__ == "__main__":
    sys.exit(main())
