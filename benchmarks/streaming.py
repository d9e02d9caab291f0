"""A pass of a model streamed from disk against reading its layers, and against computing with them.

    python benchmarks/streaming.py

Writes a random checkpoint of six layers half as wide as Grok-1's (7.4 GB) to a temporary directory,
in the official layout or as `grokkit convert` writes it (then twice that). Reading is a pass that
computes nothing; computing is a pass of the model in memory. Their processor time, shared evenly by
all cores, is the least that both together could take here, where they run on the same ones. The
bound is a pass of at most 1.4 times the slower. With --cold, layers are read as those of a model
larger than the machine's memory: the files are not in the page cache, and are read past it. The last
lines say what a pass has resident.
"""

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from formats import CONFIG, write_random
from full_width import resident, restart

import grokkit
from grokkit.streamed_model import StreamedGrok

BOUND = 1.4
GB = 1e9


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds until the result is there, and seconds of processors."""
    start, used = time.perf_counter(), time.process_time()
    jax.block_until_ready(run())
    return time.perf_counter() - start, time.process_time() - used


def drop(directory: Path) -> None:
    """Put the files out of the page cache."""
    for path in directory.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(lm: grokkit.LanguageModel) -> None:
    """A pass that computes nothing."""
    assert isinstance(lm.runnable, StreamedGrok)
    for block in lm.runnable.reader.layers():
        jax.block_until_ready(block)


def memory(path: Path, devices: int, length: int) -> None:
    """In a process of its own: what a second pass has resident over what was before the model."""
    grokkit.virtual_devices(devices)
    mesh = grokkit.make_mesh(1, devices)
    jax.block_until_ready(jax.numpy.zeros(1))
    before = restart()
    lm = grokkit.load(path, mesh=mesh, dtype="bfloat16", progress=False, stream=True)
    assert isinstance(lm.runnable, StreamedGrok)
    ids = np.ones((1, length), np.int32)
    jax.block_until_ready(lm(ids).logits)
    restart()
    jax.block_until_ready(lm(ids).logits)
    layer = lm.runnable.reader.nbytes / lm.config.n_layers
    ends = sum(a.nbytes for a in jax.tree.leaves(lm.runnable.ends))
    more = resident("VmHWM") - before - ends - 2 * layer
    print(f"{length:5} tokens, {lm.config.n_layers} layers of {layer / GB:.2f} GB: "
          f"{more / GB:.2f} GB resident beyond two of them and the embedding", flush=True)  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=float, default=0.5, help="of Grok-1's")
    parser.add_argument("--layout", choices=("official", "safetensors"), default="official")
    parser.add_argument(
        "--cold", action="store_true", help="as if the model were larger than memory"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 256, 512])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        memory(options.memory, options.devices, *options.lengths)
        return
    grokkit.virtual_devices(options.devices)
    mesh = grokkit.make_mesh(1, options.devices)
    d_model, d_ff = (int(size * options.width) for size in (6144, 32768))
    config = dataclasses.replace(
        CONFIG,
        n_layers=options.layers,
        d_model=d_model,
        d_ff=d_ff,
        d_head=d_model // CONFIG.n_heads,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "official"
        write_random(path, config)
        if options.layout == "safetensors":
            path = Path(folder) / "converted"
            grokkit.convert(Path(folder) / "official", path, progress=False)

        def load(stream: bool) -> grokkit.LanguageModel:
            return grokkit.load(path, mesh=mesh, dtype="bfloat16", progress=False, stream=stream)

        def from_disk(run: Callable[[], object]) -> tuple[float, float]:
            if options.cold:
                drop(path)
            return timed(run)

        lm, streamed = load(stream=False), load(stream=True)
        assert isinstance(streamed.runnable, StreamedGrok)
        streamed.runnable.reader.past_cache = options.cold
        drop(path)  # without --cold, the page cache then holds the files as a pass leaves them
        read(streamed)
        for length in options.lengths:
            ids = np.random.default_rng(0).integers(3, config.vocab_size, (1, length))
            jax.block_until_ready([lm(ids).logits, streamed(ids).logits])
            rounds = [
                (
                    from_disk(lambda: read(streamed)),
                    timed(lambda: lm(ids).logits),  # noqa: B023
                    from_disk(lambda: streamed(ids).logits),  # noqa: B023
                )
                for _ in range(options.rounds)
            ]
            ratio = statistics.median(c[0] / max(a[0], b[0]) for a, b, c in rounds)
            reading, computing, both = (
                statistics.median(run[i][0] for run in rounds) for i in range(3)
            )
            least = statistics.median(
                max(a[0], b[0], (a[1] + b[1]) / (os.cpu_count() or 1)) for a, b, _ in rounds
            )
            verdict = "met" if ratio <= BOUND else "MISSED"
            print(f"{length:5} tokens: reading {reading:.2f} s, computing {computing:.2f} s, at "
                  f"least {least:.2f} s together, a pass {both:.2f} s: {ratio:.2f} of the slower, "
                  f"bound {BOUND:g}: {verdict}", flush=True)  # fmt: skip
        for length in options.lengths:
            command = [sys.executable, __file__, "--devices", str(options.devices),
                       "--memory", str(path), "--lengths", str(length)]  # fmt: skip
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
