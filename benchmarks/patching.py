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


def compare(lm: grokkit.LanguageModel, length: int, rounds: int) -> str:
    """Time prompts of one length; a line of the table."""
    rng = np.random.default_rng(0)
    clean, corrupted = rng.integers(300, lm.config.vocab_size, (2, 1, length))
    metric, shape = LogitDifference(400, 500), (lm.config.n_layers, length)

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
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for seconds, run in zip(times, (sweep, loop), strict=True):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
    fast, slow = (statistics.median(seconds) for seconds in times)
    verdict = "met" if slow / fast >= BOUND else "MISSED"
    return (f"  {shape[0]} x {length:2} = {np.prod(shape):3} cases: sweep {fast:5.2f} s "
            f"({min(times[0]):.2f} to {max(times[0]):.2f}), loop {slow:5.2f} s ({min(times[1]):.2f} "
            f"to {max(times[1]):.2f}), loop / sweep {slow / fast:.1f}: {verdict}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    grokkit.virtual_devices(options.devices)
    mesh = grokkit.make_mesh(1, options.devices)
    lm = grokkit.load("nano", mesh=mesh, dtype="float32", progress=False)
    print(f"nano, layers x positions, {options.devices} device(s), float32, medians of "
          f"{options.rounds} alternated rounds; bound {BOUND:g}")  # fmt: skip
    for length in options.lengths:
        print(compare(lm, length, options.rounds), flush=True)


if __name__ == "__main__":
    main()
