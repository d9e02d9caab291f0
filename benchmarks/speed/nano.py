"""Tokens a second of the shipped model, as `lm.generate` writes them.

python -m benchmarks.speed.nano 8
"""

import statistics
import sys
import time

import grokkit


def main() -> None:
    devices, n = int(sys.argv[1]), 128
    grokkit.virtual_devices(devices)
    lm = grokkit.load("nano", mesh=grokkit.make_mesh(1, devices), progress=False)
    rates = []
    for seed in range(6):
        start = time.perf_counter()
        pieces = list(lm.stream("The answer to life", max_len=n, temperature=0.8, seed=seed))
        rates.append(len(pieces) / (time.perf_counter() - start))
    print(statistics.median(rates[1:]))


if __name__ == "__main__":
    main()
