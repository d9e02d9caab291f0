"""How fast grokkit is against the plain form, llama.cpp and this machine's limits.

    python -m benchmarks.speed [--llama-python PYTHON] [--rounds 5] [--write]

Every program runs in a process of its own, and they are asked in turn, round after round, so that
all meet the same noise; of two runs in a row the second counts. `--write` puts the table and the
figure into docs/. llama.cpp is measured if PYTHON has the packages llama-cpp-python and gguf.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.speed import mid

ROOT = Path(__file__).parents[2]
PAGE, FIGURE = ROOT / "docs" / "performance.md", ROOT / "docs" / "performance.png"
START, END = "<!-- measured: start -->", "<!-- measured: end -->"
ENTRIES_A_TOKEN = mid.entries_a_token(mid.MID)
EMBEDDING_BYTES = 4 * mid.MID.vocab_size * mid.MID.d_model
BYTES_A_TOKEN = ENTRIES_A_TOKEN + EMBEDDING_BYTES


class Worker:
    """A process that answers `prefill`, `decode` or `generate` in seconds."""

    def __init__(self, *command: str) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        line = self._read()
        if line != "ready":
            raise RuntimeError(f"{' '.join(command)}: expected 'ready', found {line!r}")

    def _read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            raise RuntimeError(f"{self.process.args}: ended with {self.process.wait()}")
        return line

    def __call__(self, what: str) -> float:
        assert self.process.stdin is not None
        print(what, file=self.process.stdin, flush=True)
        return float(self._read())

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


def run_json(*module: str) -> dict:
    command = [sys.executable, "-m", *module]
    found = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(found.stdout.splitlines()[-1])


def llama_worker(python: str, folder: str) -> Worker:
    """Convert mid's weights, then serve them."""
    script = str(Path(__file__).with_name("llama_peer.py"))
    weights, gguf = f"{folder}/mid.npz", f"{folder}/mid.gguf"
    export = f"from benchmarks.speed import mid; mid.export({weights!r})"
    subprocess.run([sys.executable, "-c", export], cwd=ROOT, check=True)
    subprocess.run([python, script, "convert", weights, gguf], check=True)
    os.unlink(weights)
    return Worker(python, script, "serve", gguf)


def measure(rounds: int, llama_python: str | None) -> dict[tuple[str, str], list[float]]:
    """Seconds of every (program, what), one for each round."""
    ours = ("-m", "benchmarks.speed.worker")
    with tempfile.TemporaryDirectory() as folder:
        workers = {
            "one device": Worker(sys.executable, *ours, "grokkit", "1", "prefill,decode,generate"),
            "eight devices": Worker(sys.executable, *ours, "grokkit", "8", "prefill,decode"),
            "plain form": Worker(sys.executable, *ours, "plain", "1", "prefill,decode"),
        }
        if llama_python:
            workers["llama.cpp"] = llama_worker(llama_python, folder)
        times: dict[tuple[str, str], list[float]] = {}
        try:
            for _ in range(rounds):
                for what in ("prefill", "decode", "generate"):
                    for name, worker in workers.items():
                        if what != "generate" or name == "one device":
                            worker(what)  # what lay idle while the others ran is slow at first
                            times.setdefault((name, what), []).append(worker(what))
        finally:
            for worker in workers.values():
                worker.close()
    return times


def ratio(times: dict, of: tuple[str, str], to: tuple[str, str]) -> float:
    """How many times faster `to` is than `of`: the median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(times[of], times[to], strict=True))


def verdict(found: float, bar: float, at_most: bool = False) -> str:
    met = found <= bar if at_most else found >= bar
    return f"{found:.2f} | {'≤' if at_most else '≥'} {bar:g} | {'yes' if met else '**no**'}"


def bars(times: dict, limits: dict) -> list[str]:
    """One row for each bar."""
    rows = []
    for what, one, eight, plain in (("prefill", 2.0, 1.6, 8), ("decode", 1.0, 0.7, 40)):
        for name, bar in (("one device", one), ("eight devices", eight)):
            if ("llama.cpp", what) in times:
                found = ratio(times, ("llama.cpp", what), (name, what))
                rows.append(f"| {what}, {name}, against llama.cpp | {verdict(found, bar)} |")
        found = ratio(times, ("plain form", what), ("one device", what))
        rows.append(f"| {what}, one device, against the plain form | {verdict(found, plain)} |")
    found = ratio(times, ("one device", "decode"), ("one device", "generate"))
    rows.append(f"| tokens of `generate` against the bare step's | {verdict(found, 0.9)} |")
    for name, (one, many) in limits["compile"].items():
        rows.append(
            f"| compiling {name}: 64 layers against one | {verdict(many / one, 2, at_most=True)} |"
        )
    return rows


def table(times: dict, limits: dict, nano: dict[int, float]) -> str:
    """What goes on the page."""
    lines = [(f"On {describe_machine()}, JAX {limits['jax']}; medians of "
             f"{len(next(iter(times.values())))} alternated rounds."), "",
             "| ratio | found | bar | met |", "|---|---|---|---|", *bars(times, limits), "",
             "| milliseconds | prefill of 256 | decode, a token |", "|---|---|---|"]  # fmt: skip
    for name in dict.fromkeys(name for name, _ in times):
        cells = [1e3 * statistics.median(times[name, what]) for what in ("prefill", "decode")]
        lines.append(f"| {name} | {cells[0]:.0f} | {cells[1]:.1f} |")
    step = statistics.median(times["one device", "decode"])
    first = statistics.median(times["one device", "prefill"])
    operations = 2 * 256 * ENTRIES_A_TOKEN
    lines += ["",
        (f"A token of decode reads {BYTES_A_TOKEN / 1e6:.0f} MB: {BYTES_A_TOKEN / step / 1e9:.1f} "
        f"GB/s, where this machine reads {limits['read'] / 1e9:.1f} GB/s. Prefill does "
        f"{operations / first / 1e9:.0f} billion operations a second, where one product of two "
        f"large matrices does {limits['float32'] / 1e9:.0f} in float32 and "
        f"{limits['bfloat16'] / 1e9:.0f} in bfloat16. nano writes {nano[1]:.0f} tokens a second on "
        f"one device and {nano[8]:.0f} on eight.")]  # fmt: skip
    return "\n".join(lines)


def describe_machine() -> str:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0].split(":")[1].strip() if names else model
    return f"{os.cpu_count()} cores of {model}"


def draw(curves: dict) -> Figure:
    """Decode against the batch and against the context."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, name, label in (
        (left, "batch", "sequences of 500 tokens in the batch"),
        (right, "context", "tokens before"),
    ):
        x, y = zip(*curves[name], strict=True)
        axes.plot(x, y, "o-", color="#0072B2")
        axes.set_xscale("log", base=2)
        axes.set_xticks(x, [str(n) for n in x])
        axes.minorticks_off()
        axes.set_ylim(0, 1.15 * max(y))
        axes.set_xlabel(label)
        axes.set_ylabel("ms a step")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-python", help="a Python that has llama-cpp-python and gguf")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="put the results into docs/")
    options = parser.parse_args()
    limits = run_json("benchmarks.speed.limits")
    nano = {n: float(run_json("benchmarks.speed.nano", str(n))) for n in (1, 8)}
    times = measure(options.rounds, options.llama_python)
    text = table(times, limits, nano)
    print(text)
    if options.write:
        before, rest = PAGE.read_text().split(START)
        PAGE.write_text(f"{before}{START}\n{text}\n{END}{rest.split(END)[1]}")
        draw(limits["curves"]).savefig(FIGURE, dpi=120)


if __name__ == "__main__":
    main()
