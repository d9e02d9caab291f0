"""What the cache of compiled programs saves: the first token of a first process and of a second.

    python benchmarks/first_token.py

Each process loads nano onto eight devices and asks for one token; the cache folder is empty before
the first. Counted is the time from the loaded model to the token. The bound is that the second
takes at most half as long.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile

BOUND = 0.5
CHILD = """
import time
import grokkit
grokkit.virtual_devices({devices})
lm = grokkit.load("nano", progress=False)
start = time.perf_counter()
next(iter(lm.stream("The duty of the Congress is", max_len=40)))
print(time.perf_counter() - start)
"""


def seconds(devices: int, folder: str) -> float:
    """Of one fresh process."""
    command = [sys.executable, "-c", CHILD.format(devices=devices)]
    environment = {**os.environ, "GROKKIT_COMPILATION_CACHE": folder}
    found = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return float(found.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    pairs = []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            pairs.append((seconds(options.devices, folder), seconds(options.devices, folder)))
    first, second = (statistics.median(times) for times in zip(*pairs, strict=True))
    share = statistics.median(b / a for a, b in pairs)
    verdict = "met" if share <= BOUND else "MISSED"
    print(f"nano, {options.devices} device(s), {options.rounds} rounds: first token after "
          f"{first:.1f} s with an empty cache, {second:.1f} s in a second process; "
          f"{share:.2f} of it, bound {BOUND:g}: {verdict}")  # fmt: skip


if __name__ == "__main__":
    main()
