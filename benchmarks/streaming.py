"""A pass of a model streamed from disk against reading its files, and against computing with them.

    python benchmarks/streaming.py

Writes a random checkpoint of 1.8 GB in the official layout to a temporary directory. Reading is
loading it into memory; computing is a pass of the model that was loaded. The page cache is warm, so
reading is as fast as it can be here. The bound is a pass of at most 1.25 times the slower.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from formats import CONFIG, write_random

import grokkit

BOUND = 1.25


def timed(run: Callable[[], object]) -> float:
    """Seconds until the result is there."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 256, 1024])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    grokkit.virtual_devices(options.devices)
    mesh = grokkit.make_mesh(1, options.devices)
    config = dataclasses.replace(CONFIG, n_layers=4)
    with tempfile.TemporaryDirectory() as folder:
        write_random(Path(folder) / "it", config)

        def load(stream: bool) -> grokkit.LanguageModel:
            return grokkit.load(
                Path(folder) / "it", mesh=mesh, dtype="bfloat16", progress=False, stream=stream
            )

        load(stream=False)
        read = min(timed(lambda: load(stream=False).model) for _ in range(options.rounds))
        lm, streamed = load(stream=False), load(stream=True)
        for length in options.lengths:
            ids = np.random.default_rng(0).integers(3, config.vocab_size, (1, length))
            compiled = lm(ids), streamed(ids)
            jax.block_until_ready([out.logits for out in compiled])
            pairs = [
                (timed(lambda: lm(ids).logits), timed(lambda: streamed(ids).logits))  # noqa: B023
                for _ in range(options.rounds)
            ]
            compute, both = (statistics.median(times) for times in zip(*pairs, strict=True))
            ratio = statistics.median(b / max(read, a) for a, b in pairs)
            verdict = "met" if ratio <= BOUND else "MISSED"
            print(f"{length:5} tokens: reading {read:.2f} s, computing {compute:.2f} s, a pass "
                  f"{both:.2f} s: {ratio:.2f} of the slower, bound {BOUND:g}: {verdict}",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
