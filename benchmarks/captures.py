"""What captures cost: a forward pass that keeps router, patterns and residual stream of all layers.

    python benchmarks/captures.py

Times, in alternation and reported as medians: the plain pass; the pass with captures; and a
program that does nothing but write as many bytes. The bound is that the captures take at most
1.3 times the plain pass beyond the time to write their bytes.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import grokkit
from grokkit.taps import Capture

CAPTURES = tuple(Capture(site) for site in ("router_probs", "pattern", "resid_post"))
BOUND = 1.3


def alternate(programs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each program in each round, one after the other, compiled before."""
    for run in programs.values():
        jax.block_until_ready(run())
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, run in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - start)
    return times


@functools.partial(jax.jit, static_argnames="captures")
def forward(model, tokens, captures):
    out = model(tokens, captures=captures)
    return out.logits, out.captured


@jax.jit
def write(arrays, value):
    return jax.tree.map(lambda a: jnp.zeros_like(a) + value.astype(a.dtype), arrays)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    grokkit.virtual_devices(options.devices)
    mesh = grokkit.make_mesh(1, options.devices)
    lm = grokkit.load("nano", mesh=mesh, dtype="float32", progress=False)
    shape = (options.batch, options.length)
    tokens = np.random.default_rng(0).integers(300, lm.config.vocab_size, shape).astype(np.int32)
    with jax.set_mesh(mesh):
        kept = forward(lm.model, tokens, CAPTURES)[1]
        value = jnp.float32(1)
        times = alternate(
            {
                "plain pass": lambda: forward(lm.model, tokens, ()),
                "with captures": lambda: forward(lm.model, tokens, CAPTURES),
                "writing the bytes": lambda: write(kept, value),
            },
            options.rounds,
        )
    plain, captured, written = times.values()
    n_bytes = sum(a.nbytes for a in jax.tree.leaves(kept))
    print(f"nano, {options.batch} x {options.length} tokens, {options.devices} device(s), float32, "
          f"{n_bytes / 1e6:.0f} MB kept, {options.rounds} alternated rounds")  # fmt: skip
    for name, seconds in times.items():
        print(f"  {name:18} median {statistics.median(seconds) * 1e3:8.1f} ms   "
              f"{min(seconds) * 1e3:.1f} to {max(seconds) * 1e3:.1f}")  # fmt: skip
    ratio = (statistics.median(captured) - statistics.median(written)) / statistics.median(plain)
    rounds = [(c - w) / p for p, c, w in zip(plain, captured, written, strict=True)]
    print(f"  (captures - writing) / plain: {ratio:.2f} of the medians, "
          f"{statistics.median(rounds):.2f} median of the rounds; bound {BOUND}: "
          f"{'met' if ratio <= BOUND else 'MISSED'}")  # fmt: skip


if __name__ == "__main__":
    main()
