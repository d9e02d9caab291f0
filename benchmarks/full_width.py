"""Grok-1's layers at their true widths: loaded, run, checked against numpy, and weighed.

    python benchmarks/full_width.py --layers 1
    python benchmarks/full_width.py --layers 2 --cold-only   # with less than 32 GB of memory

Writes a random checkpoint with one layer (8.2 GB) or two (13 GB) in the official layout to a
temporary directory, and removes it. Each measurement runs in a process of its own, on eight virtual
CPU devices:

- the rate of loading, as a share of that of `cat FILES > /dev/null`, with the files out of the page
  cache and in it. The warm one asks for memory for the model and for the files. Before each, memory
  for both is written to and let go: the host of a virtual machine takes idle memory away, and gives
  it back at a tenth of the speed of memory, which is no matter of either program;
- the most memory resident while loading, over what was resident before and the weights;
- logits of a prompt and of tokens decoded after it, against numpy reading the same files: products
  in float32, a few rows of a matrix at a time, summed in float64;
- the plan's bytes of weights against the files' and the model's, and its temporaries against those
  of the programs compiled for the loaded model, and against what a prompt of 1,000 tokens, and
  decoding after it, took.
"""

import argparse
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import grokkit
from grokkit.checkpoint import open_checkpoint, tensor_keys, write_tensor
from grokkit.generate import State, decode, generate_tokens, prefill
from grokkit.kv_cache import KVCache
from grokkit.sampling import Sampling
from grokkit.sharding import abstract

DEVICES = 8
COLD, WARM, OVERHEAD = 0.70, 0.35, 1.0  # shares of cat's rate, and GB
CLOSE = {"float32": 1e-4, "bfloat16": 3e-2}  # of logits, relative
N_PROMPT, N_NEW = 16, 3
N_LONG, N_CONTEXT = 1000, 1024  # padded to what the plan compiles for
_SLICE = 1024  # rows of a matrix that numpy takes at once
GB = 1e9


# The files


def write_random(directory: Path, config: grokkit.GrokConfig) -> None:
    """Random weights of the size that training gives; one tensor in memory at a time."""
    (directory / "ckpt-0").mkdir(parents=True)
    config.to_json(directory / "config.json")
    rng = np.random.Generator(np.random.SFC64(0))
    for key in tensor_keys(config):
        path = directory / "ckpt-0" / key.file_name
        if key.scales_shape is not None:
            weight = np.frombuffer(rng.bytes(int(np.prod(key.shape))), np.int8).reshape(key.shape)
            spread = key.shape[-2] ** -0.5 / 74  # 74: the standard deviation of such integers
            scales = spread * rng.uniform(0.5, 1.5, key.scales_shape)
            write_tensor(path, weight, scales.astype(ml_dtypes.bfloat16))
        elif len(key.shape) == 1:
            write_tensor(path, rng.uniform(0.5, 1.5, key.shape).astype(np.float32))
        else:
            weight = rng.random(key.shape, np.float32)
            weight -= 0.5
            weight *= (12 / config.d_model) ** 0.5
            write_tensor(path, weight)


def tensors(directory: Path) -> list[Path]:
    """The checkpoint's tensor files."""
    return sorted((directory / "ckpt-0").iterdir())


def drop(directory: Path) -> None:
    """Put the files out of the page cache."""
    for path in tensors(directory):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cat(directory: Path) -> float:
    """Seconds that `cat` takes for them."""
    start = time.perf_counter()
    subprocess.run(["cat", *map(str, tensors(directory))], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


# The definition


class Reference:
    """A forward pass in numpy, from memory maps of the files."""

    def __init__(self, directory: Path) -> None:
        checkpoint = open_checkpoint(directory)
        self.config = checkpoint.config
        self.files = {(e.key.path, e.key.layer): e.file for e in checkpoint}

    def array(self, path: str, layer: int | None = None) -> np.ndarray:
        """An array of floats."""
        file = self.files[path, layer]
        assert file.scales is None
        return np.asarray(file.open(file.weight))

    def times(self, x: np.ndarray, path: str, layer: int, expert: int | None = None) -> np.ndarray:
        """`x` times an 8-bit matrix, [rows, k] -> [rows, n]."""
        file = self.files[path, layer]
        assert file.scales is not None
        weight, scales = (np.asarray(file.open(span)) for span in file.spans)
        if expert is not None:
            weight, scales = weight[expert], scales[expert]
        k, groups = weight.shape[0], scales.shape[0]
        step = min(_SLICE, k // groups)
        total = np.zeros((len(x), weight.shape[1]))
        for start in range(0, k, step):
            of = slice(start, start + step)
            assert (k // groups) % step == 0
            scale = scales[start // (k // groups)].astype(np.float32)
            total += (x[:, of].astype(np.float32) @ weight[of].astype(np.float32)) * scale
        return total

    def norm(self, x: np.ndarray, path: str, layer: int | None = None) -> np.ndarray:
        """Root-mean-square normalisation."""
        mean = np.mean(x**2, axis=-1, keepdims=True)
        return x / np.sqrt(mean + self.config.norm_eps) * self.array(path, layer)

    def attention(self, x: np.ndarray, layer: int) -> np.ndarray:
        """What each position takes from those up to it."""
        c, n = self.config, len(x)

        def project(name: str) -> np.ndarray:
            y = self.times(x, f"blocks.attention.{name}", layer)
            return np.moveaxis(y.reshape(n, -1, c.d_head), 1, 0)  # [head, position, d_head]

        def turn(x: np.ndarray) -> np.ndarray:
            half = c.d_head // 2
            angle = np.arange(n)[:, None] / c.rope_base ** (np.arange(half) / half)
            y = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
            return np.concatenate([y.real, y.imag], axis=-1)

        q, k, v = turn(project("query")), turn(project("key")), project("value")
        k, v = (np.repeat(a, c.n_heads // c.n_kv_heads, axis=0) for a in (k, v))
        scores = q @ k.swapaxes(1, 2) * c.attention_multiplier
        scores = c.attention_softcap * np.tanh(scores / c.attention_softcap)
        scores[:, np.triu(np.ones((n, n), bool), 1)] = -np.inf
        z = np.moveaxis(softmax(scores) @ v, 0, 1).reshape(n, -1)
        return self.times(z, "blocks.attention.out", layer)

    def moe(self, x: np.ndarray, layer: int) -> np.ndarray:
        """The chosen experts' outputs, weighted."""
        probs = softmax(x @ self.array("blocks.moe.router", layer))
        chosen = np.argsort(-probs, axis=-1)[:, : self.config.n_experts_per_token]
        y = np.zeros(x.shape)
        for expert in range(self.config.n_experts):
            rows = np.flatnonzero((chosen == expert).any(axis=1))
            if len(rows):
                gate, value = (
                    self.times(x[rows], f"blocks.moe.{name}", layer, expert)
                    for name in ("gate", "value")
                )
                gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
                out = self.times(gelu * value, "blocks.moe.out", layer, expert)
                y[rows] += out * probs[rows, expert][:, None]
        return y

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Next-token logits [position, vocab] of one row of tokens."""
        c, embedding = self.config, self.array("embedding.weight")
        x = embedding[tokens].astype(np.float64) * c.embedding_multiplier
        for layer in range(c.n_layers):
            for part, name in ((self.attention, "attn"), (self.moe, "moe")):
                y = part(self.norm(x, f"blocks.{name}_norm.scale", layer), layer)
                x = x + self.norm(y, f"blocks.{name}_out_norm.scale", layer)
        x = self.norm(x, "final_norm.scale").astype(np.float32)
        rows = range(0, c.vocab_size, _SLICE)
        parts = [x @ embedding[start : start + _SLICE].T for start in rows]
        return np.concatenate(parts, axis=-1) * c.output_multiplier


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    exp = np.exp(x - x.max(axis=-1, keepdims=True))
    return exp / exp.sum(axis=-1, keepdims=True)


# Measured in a process of its own


def resident(field: str) -> int:
    """Bytes in memory: `VmRSS` now, `VmHWM` at most since `restart`."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def restart() -> int:
    """Count the most memory from here on. **Returns:** bytes resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def touch(directory: Path) -> None:
    """Write once to as much memory as the model and its files take, or to what is free of that."""
    wanted = 2 * sum(path.stat().st_size for path in tensors(directory)) + int(GB)
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemFree"))
    np.empty(min(wanted, int(0.9 * free)), np.uint8).fill(1)


def loaded(directory: Path, dtype: str) -> tuple[grokkit.LanguageModel, dict[str, Any]]:
    """The model on eight devices, and what loading it took."""
    grokkit.virtual_devices(DEVICES)
    mesh = grokkit.make_mesh(1, DEVICES)
    jax.block_until_ready(jnp.zeros(1))
    touch(directory)
    before, start = restart(), time.perf_counter()
    lm = grokkit.load(directory, mesh=mesh, dtype=dtype, progress=False)
    jax.block_until_ready(lm.model)
    seconds = time.perf_counter() - start
    weights = sum(a.nbytes for a in jax.tree.leaves(lm.model))
    return lm, {
        "seconds": seconds,
        "weights": weights,
        "over": resident("VmHWM") - before - weights,
    }


def run(directory: Path, dtype: str) -> dict[str, Any]:
    """Logits of a prompt and its continuation, in a file; and memory, planned and taken."""
    lm, found = loaded(directory, dtype)
    config = lm.config
    rng = np.random.default_rng(1)
    prompt = rng.integers(3, config.vocab_size, N_PROMPT).tolist()
    wanted = (grokkit.Capture("logits").resolve(config.n_layers, config.context_length),)
    pieces = list(generate_tokens(lm.model, lm.mesh, [prompt], N_NEW + 1, Sampling(temperature=0),
                                  block=1, captures=wanted))  # fmt: skip
    drawn = [int(np.asarray(piece.draws.token)[0, 0]) for piece in pieces][: N_NEW + 1]
    steps = [np.asarray(piece.captured["logits"]) for piece in pieces]
    logits = [steps[0][0, :N_PROMPT], *(step[0, 0] for step in steps[1 : N_NEW + 1])]
    np.savez(directory / "run.npz", tokens=[*prompt, *drawn[:N_NEW]], logits=np.concatenate(logits))
    del pieces, steps, logits

    with jax.set_mesh(lm.mesh):
        cache = KVCache.empty(config, 1, N_CONTEXT, lm.model.dtype, lm.mesh)
        rows = Sampling().rows(1, config.vocab_size)
        data = jax.sharding.PartitionSpec("data")
        tokens, lengths, rows = jax.tree.map(
            lambda a: jax.device_put(a, data),
            (np.ones((1, N_CONTEXT), np.int32), np.ones(1, np.int32), rows),
        )
        program = prefill.lower(lm.model, tokens, lengths, cache, rows, (), ()).compile()
        filled = abstract(KVCache.specs(config, 1, N_CONTEXT, lm.model.dtype), lm.mesh)
        step = decode.lower(lm.model, State(filled, lengths, None), rows, 1).compile()
        found["compiled"] = [
            DEVICES * p.memory_analysis().temp_size_in_bytes for p in (program, step)
        ]
        del cache, program, step
    plan = grokkit.plan(open_checkpoint(directory), (1, DEVICES), N_CONTEXT, dtype=dtype,
                        machines=())  # fmt: skip
    found["plan"] = {name: total for name, _, total, _ in plan.rows}

    long = rng.integers(3, config.vocab_size, N_LONG).tolist()

    def measured() -> tuple[float, list[int]]:
        """Seconds that a long prompt takes; memory that it takes, and then decoding."""
        pieces = generate_tokens(lm.model, lm.mesh, [long], 8, Sampling(temperature=0), block=1)
        before, start = restart(), time.perf_counter()
        jax.block_until_ready(next(pieces).draws.token)
        seconds, taken = time.perf_counter() - start, [resident("VmHWM") - before]
        before = restart()
        for piece in pieces:
            jax.block_until_ready(piece.draws.token)
        return seconds, [*taken, resident("VmHWM") - before]

    measured()  # compiles, which takes memory of its own
    found["prefill_seconds"], found["taken"] = measured()
    return found


def child(what: str, directory: Path, dtype: str) -> dict[str, Any]:
    """`what` in a new process."""
    command = [sys.executable, __file__, "--child", what, str(directory), dtype]
    return json.loads(subprocess.check_output(command, text=True).splitlines()[-1])


# The report


def verdict(met: bool) -> str:
    """For the end of a line."""
    return "met" if met else "MISSED"


def report_loading(directory: Path, size: int, rounds: int, warm: bool) -> None:
    """Rates and memory."""
    for name, bar in (("cold", COLD), ("warm", WARM)) if warm else (("cold", COLD),):
        shares, over = [], 0
        for _ in range(rounds):
            if name == "cold":
                drop(directory)
            else:
                cat(directory)
            touch(directory)
            base = cat(directory)
            if name == "cold":
                drop(directory)
            found = child("load", directory, "bfloat16")
            shares.append(base / found["seconds"])
            over = max(over, found["over"])
            print(f"  cat {size / base / GB:.2f} GB/s, loading {size / found['seconds'] / GB:.2f} "
                  f"GB/s", flush=True)  # fmt: skip
        share = float(np.median(shares))
        print(f"{name} page cache: loading at {share:.2f} of cat's rate, bound {bar:g}: "
              f"{verdict(share >= bar)}")  # fmt: skip
        print(f"  {over / GB:.2f} GB resident over the weights, bound {OVERHEAD:g}: "
              f"{verdict(over <= OVERHEAD * GB)}", flush=True)  # fmt: skip


def report_run(directory: Path, size: int, dtype: str, reference: Any) -> None:
    """Correctness, and the plan."""
    found = child("run", directory, dtype)
    with np.load(directory / "run.npz") as file:
        tokens, logits = file["tokens"], file["logits"]
    key = tokens.tobytes()
    if key not in reference:  # another dtype may have drawn other tokens
        reference[key] = Reference(directory).logits(tokens)
    expected = reference[key]
    errors = np.abs(logits - expected).max(axis=-1) / np.abs(expected).max()
    plan = found["plan"]
    for name, part in (("prefill", errors[:N_PROMPT]), ("decode", errors[N_PROMPT:])):
        print(f"{dtype} {name}: largest difference of {len(part)} x {logits.shape[1]:,} logits "
              f"{part.max():.1e} of the largest logit: {verdict(part.max() < CLOSE[dtype])}")  # fmt: skip
    print(f"weights: planned {plan['weights']:,}, in memory {found['weights']:,}, files {size:,} "
          f"({size - plan['weights']:,} of headers)")  # fmt: skip
    for i, name in enumerate(("prefill", "decode")):
        print(f"{name} at {N_CONTEXT:,} tokens, temporaries: planned "
              f"{plan[f'{name} temporaries'] / GB:.3f} GB, compiled {found['compiled'][i] / GB:.3f} "
              f"GB, taken after a prompt of {N_LONG:,} {found['taken'][i] / GB:.3f} GB")  # fmt: skip
    print(f"prefill took {found['prefill_seconds']:.1f} s", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--cold-only", action="store_true", help="for files larger than memory")
    parser.add_argument("--folder", help="where to write; the system's temporary folder by default")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        what, directory, dtype = options.child
        tasks = {"run": run, "load": lambda *a: loaded(*a)[1]}
        print(json.dumps(tasks[what](Path(directory), dtype)))
        return
    # Ended from outside, it still removes what it wrote.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    config = dataclasses.replace(grokkit.GROK_1, n_layers=options.layers)
    size = sum(key.nbytes for key in tensor_keys(config))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        free = shutil.disk_usage(folder).free
        if free < size + 2 * GB:
            sys.exit(
                f"{folder}: expected {size / GB + 2:.1f} GB of free space, found {free / GB:.1f}"
            )
        directory = Path(folder) / "wide"
        start = time.perf_counter()
        write_random(directory, config)
        print(f"{options.layers} layer(s) of Grok-1, {size / GB:.2f} GB, written in "
              f"{time.perf_counter() - start:.0f} s", flush=True)  # fmt: skip
        report_loading(directory, size, options.rounds, not options.cold_only)
        reference: dict[bytes, np.ndarray] = {}
        for dtype in options.dtypes:
            report_run(directory, size, dtype, reference)


if __name__ == "__main__":
    main()
