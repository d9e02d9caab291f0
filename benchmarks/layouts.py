"""Products on a CPU with matrices that lie as official files have them, beside the model's layout.

    python benchmarks/layouts.py

The model holds 8-bit matrices as [n, k], official files as [k, n]. Each product meets all matrices
of a stack of 0.2 to 0.3 GB, so that they come from memory, in pages of 2 MB where the system gives
some. The two take turns; the least time of each counts.
"""

import argparse
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from grokkit.checkpoint.pages import LARGE, ask_for_large, of_array
from grokkit.quant import QuantizedArray, Stored
from grokkit.quantised_matmul import grouped_on_cpu

GB = 1e9
STACK = 300_000_000  # entries
HEADER = 201  # bytes of an official file before its matrices
GROUPS = 8
SHAPES = [(1536, 8192), (8192, 1536), (6144, 32768), (32768, 6144)]
"""[k, n]: of the model that `streaming.py` measures, and of Grok-1."""


def in_large_pages(shape: tuple[int, ...]) -> np.ndarray:
    """Room for so many bytes, in whole large pages if there are some."""
    n_bytes = int(np.prod(shape))
    room = np.empty(n_bytes + LARGE, np.int8)
    first = -room.ctypes.data % LARGE
    room = room[first : first + n_bytes]
    ask_for_large(*of_array(room))
    return room.reshape(shape)


def stacks(k: int, n: int) -> tuple[QuantizedArray, QuantizedArray]:
    """The same random matrices as [n, k], and as [k, n] behind a header."""
    random, matrices = np.random.default_rng(0), max(1, STACK // (k * n))
    ours, file = in_large_pages((matrices, n, k)), in_large_pages((HEADER + matrices * k * n,))
    ours[:] = random.integers(-128, 128, ours.shape, np.int8)
    file[HEADER:].reshape(matrices, k, n)[:] = ours.swapaxes(-1, -2)
    scales = random.uniform(0.001, 0.1, (matrices, GROUPS, n)).astype(ml_dtypes.bfloat16)
    weights = [jax.device_put(a, may_alias=True) for a in (ours, file)]
    scales = jnp.asarray(scales)
    stored = Stored((matrices, k, n), GROUPS, k_first=True, before=HEADER)
    return QuantizedArray(weights[0], scales), QuantizedArray(weights[1], scales, stored)


def seconds(run: Callable[[], jax.Array]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 20, 64, 256])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    product = jax.jit(lambda x, w, counts: grouped_on_cpu(x, counts, w, jnp.bfloat16))
    for k, n in SHAPES:
        pair = stacks(k, n)
        matrices = pair[0].shape[0]
        for rows in options.rows:
            x = np.random.default_rng(1).normal(size=(rows * matrices, k)).astype(np.float32)
            x, counts = jnp.asarray(x), jnp.full(matrices, rows)
            found = [np.asarray(product(x, w, counts)) for w in pair]
            error = np.abs(found[1] - found[0]).max() / np.abs(found[0]).max()
            assert error < 1e-5, error
            times = [
                [seconds(lambda w=w: product(x, w, counts)) for w in pair]  # noqa: B023
                for _ in range(options.rounds)
            ]
            ours, file = np.min(times, axis=0)
            size = matrices * k * n / GB
            print(f"{rows:4} rows of each [{k}, {n}]: {size / ours:.1f} GB/s as [n, k], "
                  f"{size / file:.1f} GB/s as [k, n]: {file / ours:.2f} of the time", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
