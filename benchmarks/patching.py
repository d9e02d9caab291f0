"""A layer by position patching sweep against a Python loop of single patched passes.

    python benchmarks/patching.py

Both are compiled before the clock starts, and run in alternation; reported as medians. The bound
is that the sweep is at least 5 times faster.
"""

import argparse
import statistics
import time

import numpy as np

import grokkit
from grokkit.analysis.patching import LogitDifference, Positions, patch

BOUND = 5.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    grokkit.virtual_devices(options.devices)
    mesh = grokkit.make_mesh(1, options.devices)
    lm = grokkit.load("nano", mesh=mesh, dtype="float32", progress=False)
    rng = np.random.default_rng(0)
    clean, corrupted = rng.integers(300, lm.config.vocab_size, (2, 1, options.length))
    metric, shape = LogitDifference(400, 500), (lm.config.n_layers, options.length)

    def sweep() -> np.ndarray:
        return patch(lm, clean, corrupted, metric, Positions("resid_pre"), progress=False).values

    def loop() -> np.ndarray:
        """As one would write it; every pass runs the same compiled program."""
        values = np.empty(shape, np.float32)
        _, cache = lm.run_with_cache(clean, "resid_pre")
        for layer, position in np.ndindex(shape):
            edit = grokkit.Replace(
                "resid_pre", cache["resid_pre"], layers=[layer], positions=[position]
            )
            logits = np.asarray(lm(corrupted, edits=[edit]).logits[0, -1])
            values[layer, position] = logits[400] - logits[500]
        return values

    np.testing.assert_allclose(sweep(), loop(), atol=1e-3)
    times: dict[str, list[float]] = {"one sweep": [], "loop of passes": []}
    for _ in range(options.rounds):
        for name, run in zip(times, (sweep, loop), strict=True):
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    print(f"nano, {shape[0]} layers x {shape[1]} positions = {np.prod(shape)} cases, "
          f"{options.devices} device(s), float32, {options.rounds} alternated rounds")  # fmt: skip
    for name, seconds in times.items():
        print(f"  {name:15} median {statistics.median(seconds):7.2f} s   "
              f"{min(seconds):.2f} to {max(seconds):.2f}")  # fmt: skip
    fast, slow = (statistics.median(seconds) for seconds in times.values())
    print(f"  loop / sweep: {slow / fast:.1f}; bound {BOUND:g}: "
          f"{'met' if slow / fast >= BOUND else 'MISSED'}")  # fmt: skip


if __name__ == "__main__":
    main()
