"""What this machine and this compiler can do, in one process: printed as JSON.

python -m benchmarks.speed.limits
"""

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable

os.environ["GROKKIT_COMPILATION_CACHE"] = "off"  # compile times are measured here

import jax
import jax.numpy as jnp
import numpy as np

import grokkit
from benchmarks.speed import mid
from benchmarks.speed.worker import timed
from grokkit.kv_cache import KVCache
from grokkit.model import param_specs
from grokkit.sharding import abstract

ROUNDS = 5


def best_of(run: Callable[[], object]) -> float:
    """Median seconds after a first run."""
    jax.block_until_ready(run())
    return statistics.median(timed(run) for _ in range(ROUNDS))


def read_rate() -> float:
    """Bytes a second at which a matrix of 1 GiB is read, by multiplying it with a vector."""
    matrix, vector = jnp.ones((2**14, 2**14)), jnp.ones((2**14, 1))
    product = jax.jit(jnp.dot)
    return matrix.nbytes / best_of(lambda: product(matrix, vector))


def arithmetic_rate(dtype: str) -> float:
    """Operations a second of a product of two square matrices."""
    n = 2048
    a = jnp.ones((n, n), dtype)
    product = jax.jit(lambda a: jnp.dot(a, a, preferred_element_type=jnp.float32))
    return 2 * n**3 / best_of(lambda: product(a))


def compile_seconds(n_layers: int) -> dict[str, float]:
    """Seconds to compile mid's programs with so many layers, from abstract weights."""
    mesh = grokkit.make_mesh(1, 1)
    config = dataclasses.replace(mid.MID, n_layers=n_layers)
    model = abstract(param_specs(config), mesh)
    cache = abstract(KVCache.specs(config, 1, 512, jnp.dtype(jnp.bfloat16)), mesh)
    seconds = {}
    with jax.set_mesh(mesh):
        for name, program, length in (("prefill", mid.prefill, 256), ("decode", mid.decode, 1)):
            tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
            start = time.perf_counter()
            program.lower(model, tokens, cache).compile()
            seconds[name] = time.perf_counter() - start
    return seconds


STEPS = 8


def curves() -> dict[str, list[tuple[int, float]]]:
    """Milliseconds of a decode step of mid against the batch, and against the context."""
    mesh = grokkit.make_mesh(1, 1)
    config = dataclasses.replace(mid.MID, context_length=8192)
    model = mid.random_model(config, mesh, "bfloat16")

    def step(batch: int, context: int) -> float:
        with jax.set_mesh(mesh):
            cache = KVCache.empty(config, batch, context, jnp.dtype(jnp.bfloat16), mesh)
            # As after a text that leaves room for the steps below.
            cache = dataclasses.replace(
                cache, is_new=False, length=cache.length + context - STEPS - 1,
                visible=~cache.visible,
            )  # fmt: skip
            tokens = mid.prompt(config, 1, batch)
            state = mid.decode(model, tokens, cache)
            times = []
            for _ in range(STEPS):
                start = time.perf_counter()
                state = jax.block_until_ready(mid.decode(model, *state))
                times.append(time.perf_counter() - start)
        return 1e3 * statistics.median(times)

    return {
        "batch": [(n, step(n, 512)) for n in (1, 2, 4, 8, 16)],
        "context": [(n, step(1, n)) for n in (512, 1024, 2048, 4096, 8192)],
    }


def main() -> None:
    compiled = {n: compile_seconds(n) for n in (1, 64)}
    found = {
        "read": read_rate(),
        "float32": arithmetic_rate("float32"),
        "bfloat16": arithmetic_rate("bfloat16"),
        "compile": {name: [compiled[1][name], compiled[64][name]] for name in compiled[1]},
        "curves": curves(),
        "jax": jax.__version__,
        "numpy": np.__version__,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
