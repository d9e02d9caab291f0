"""What one accelerator makes of it: time against the least that its memory and arithmetic allow.

    python benchmarks/accelerator.py [--layers 8]

Of mid, and of so many layers of Grok-1 at their true widths, with random weights made on the
device. A decode step must read the matrices that its token meets once; prefill must multiply them.
Both limits are measured on the same device in the same run, and each time is given as a share of
its limit.
"""

import argparse
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp

import grokkit
from benchmarks.speed import mid
from grokkit.config import GROK_1
from grokkit.kv_cache import KVCache
from grokkit.model import Grok, param_specs
from grokkit.sharding import ParamSpec, is_spec

ROUNDS, STEPS = 5, 32


def seconds(run: Callable[[], object], times: int = 1) -> float:
    """Median over rounds after a first run, a run."""
    jax.block_until_ready(run())
    found = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready([run() for _ in range(times)])
        found.append((time.perf_counter() - start) / times)
    return statistics.median(found)


def read_rate() -> float:
    """Bytes a second of a sum over 8 GiB of 8-bit numbers."""
    numbers = jnp.ones((2**33,), jnp.int8)
    return numbers.nbytes / seconds(lambda: jnp.sum(numbers, dtype=jnp.int32), 4)


def arithmetic_rate() -> float:
    """Operations a second of a bfloat16 product of two square matrices."""
    n = 8192
    a = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16)
    product = jax.jit(lambda a: jnp.dot(a, a, preferred_element_type=jnp.float32))
    return 2 * n**3 / seconds(lambda: product(a), 4)


def random_model(config: grokkit.GrokConfig) -> Grok:
    """Made where it lies, since the host may be the smaller of the two."""
    mesh = grokkit.make_mesh(1, 1)

    def leaf(spec: ParamSpec, key: Any) -> jax.Array:
        def make(key: Any) -> jax.Array:
            if spec.dtype == jnp.int8:
                return jax.lax.bitcast_convert_type(
                    jax.random.bits(key, spec.shape, "uint8"), "int8"
                )
            if spec.dtype == jnp.bfloat16 and spec.init_scale is None:
                scale = jax.random.uniform(key, spec.shape, minval=0.5, maxval=1.5) / 73
                return (scale / math.sqrt(config.d_model)).astype(jnp.bfloat16)
            return spec.initialise(key)

        return jax.jit(make, out_shardings=spec.sharding(mesh))(key)

    leaves, tree = jax.tree.flatten(param_specs(config, "bfloat16"), is_leaf=is_spec)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return jax.tree.unflatten(tree, [leaf(s, k) for s, k in zip(leaves, keys, strict=True)])


def measure(name: str, config: grokkit.GrokConfig, reads: float, computes: float) -> None:
    """Print a line for decode and one for each length of prompt."""
    mesh, model = grokkit.make_mesh(1, 1), random_model(config)
    met = mid.entries_a_token(config)

    def empty(batch: int = 1) -> KVCache:
        return KVCache.empty(config, batch, config.context_length, jnp.dtype("bfloat16"), mesh)

    with jax.set_mesh(mesh):
        for batch in (1, 4, 16):
            state = mid.decode(model, mid.prompt(config, 1, batch), empty(batch))

            def step() -> jax.Array:
                nonlocal state
                state = mid.decode(model, *state)
                return state[0]

            took = seconds(step, STEPS)
            least = (met + model.embedding.weight.nbytes) / reads
            print(f"{name}: decode, batch {batch}: {1e3 * took:.2f} ms a step; one token's weights "
                  f"take {1e3 * least:.2f} ms to read: {least / took:.2f}", flush=True)  # fmt: skip
        for length in (256, config.context_length):
            tokens = mid.prompt(config, length)
            took = seconds(lambda tokens=tokens: mid.prefill(model, tokens, empty())[0])
            read = sum(a.nbytes for a in jax.tree.leaves(model)) / reads
            least = max(2 * length * met / computes, read)
            print(f"{name}: prefill of {length}: {1e3 * took:.1f} ms; reading all matrices once and "
                  f"multiplying at full rate take {1e3 * least:.1f} ms: {least / took:.2f}",
                  flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8, help="of Grok-1; each takes 4.9 GB")
    options = parser.parse_args()
    device = jax.devices()[0]
    if device.platform == "cpu":
        print("this measures an accelerator, and JAX found none; benchmarks/speed is for a CPU")
        return
    reads, computes = read_rate(), arithmetic_rate()
    print(f"{device.device_kind}, JAX {jax.__version__}: reads {reads / 1e12:.2f} TB/s, multiplies "
          f"{computes / 1e12:.0f} TFLOP/s in bfloat16", flush=True)  # fmt: skip
    measure("mid", mid.MID, reads, computes)
    config = dataclasses.replace(GROK_1, n_layers=options.layers, context_length=2048)
    measure(f"{options.layers} layers of Grok-1", config, reads, computes)


if __name__ == "__main__":
    main()
