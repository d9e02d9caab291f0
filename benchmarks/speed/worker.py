"""A process that times one thing at a time: it is told what on its input, and answers in seconds.

    python -m benchmarks.speed.worker grokkit 8

So several programs can be measured in alternation, each in a process of its own. The first line
that it prints says that it is ready.
"""

import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import grokkit
from benchmarks.speed import mid
from grokkit.generate import Sampling, generate_tokens
from grokkit.kv_cache import KVCache

STEPS = 24


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


class Timings:
    """What can be asked of a model."""

    def __init__(self, devices: int, steps: int = STEPS) -> None:
        self.mesh = grokkit.make_mesh(1, devices)
        self.model = mid.random_model(mid.MID, self.mesh, "bfloat16")
        self.steps = steps

    def _cache(self) -> KVCache:
        dtype = jnp.dtype(self.model.dtype)
        cache = KVCache.empty(mid.MID, 1, mid.MID.context_length, dtype, self.mesh)
        return jax.block_until_ready(cache)

    def prefill(self) -> float:
        """Seconds for a prompt of 256 tokens."""
        with jax.set_mesh(self.mesh):
            cache, tokens = self._cache(), mid.prompt(mid.MID)
            return timed(lambda: mid.prefill(self.model, tokens, cache)[0])

    def decode(self) -> float:
        """Seconds a token of the bare step after a prompt of 256, without sampling."""
        with jax.set_mesh(self.mesh):
            token, cache = mid.prefill(self.model, mid.prompt(mid.MID), self._cache())
            token, cache = jax.block_until_ready(mid.decode(self.model, token, cache))
            start = time.perf_counter()
            for _ in range(self.steps):
                token, cache = mid.decode(self.model, token, cache)
            token.block_until_ready()
            return (time.perf_counter() - start) / self.steps

    def generate(self) -> float:
        """Seconds a token of what users call, sampling and copying to the host included."""
        sampling = Sampling(temperature=0.7, top_p=0.9, seed=1)
        prompts = mid.prompt(mid.MID).tolist()
        # Several blocks of 16, counted from when the first has arrived.
        rounds = generate_tokens(self.model, self.mesh, prompts, 1 + 16 * 8, sampling)
        times, counts = [], []
        for piece in rounds:
            counts.append(np.asarray(piece.draws.token).shape[0])
            times.append(time.perf_counter())
        return (times[-1] - times[1]) / sum(counts[2:])


def main() -> None:
    kind, devices = sys.argv[1], int(sys.argv[2])
    grokkit.virtual_devices(devices)
    if kind == "plain":
        mid.use_the_plain_form()
    timings = Timings(devices, steps=2 if kind == "plain" else STEPS)
    for what in sys.argv[3].split(","):
        getattr(timings, what)()  # compiled before anything counts
    print("ready", flush=True)
    for line in sys.stdin:
        print(getattr(timings, line.strip())(), flush=True)


if __name__ == "__main__":
    main()
