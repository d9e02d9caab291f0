"""How fast checkpoints are converted and loaded, as shares of copying and reading the same files.

    python benchmarks/formats.py

Writes a random checkpoint of 0.9 GB to a temporary directory and loads it onto eight virtual CPU
devices, with a warm page cache.
"""

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

import grokkit
from grokkit.checkpoint import (
    load_params,
    open_checkpoint,
    stored_specs,
    tensor_keys,
    write_tensor,
)
from grokkit.model import param_specs

CONFIG = grokkit.GrokConfig(
    vocab_size=8192, d_model=2048, n_layers=2, n_heads=16, n_kv_heads=8, d_head=128, d_ff=8192
)


def write_random(directory: Path, config: grokkit.GrokConfig = CONFIG) -> None:
    """A checkpoint in the official layout."""
    (directory / "ckpt-0").mkdir(parents=True)
    config.to_json(directory / "config.json")
    rng = np.random.default_rng(0)
    for key in tensor_keys(config):
        path = directory / "ckpt-0" / key.file_name
        if key.scales_shape is None:
            write_tensor(path, rng.random(key.shape, np.float32))
        else:
            scales = rng.random(key.scales_shape, np.float32).astype("bfloat16")
            write_tensor(path, rng.integers(-127, 128, key.shape, np.int8), scales)


def seconds(run: Callable[[], object], times: int = 1) -> float:
    """The fastest of some runs."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)


def read(directory: Path) -> None:
    """Every file, once."""
    for path in directory.rglob("*"):
        if path.is_file():
            path.read_bytes()


def load(directory: Path) -> None:
    """Onto eight devices."""
    checkpoint = open_checkpoint(directory)
    specs = stored_specs(checkpoint, param_specs(CONFIG))
    mesh = grokkit.make_mesh(1, 8)
    jax.block_until_ready(load_params(checkpoint, specs, mesh, progress=False))


def main() -> None:
    """Measure and print."""
    grokkit.virtual_devices(8)
    with tempfile.TemporaryDirectory() as folder:
        source, st = Path(folder) / "official", Path(folder) / "safetensors"
        write_random(source)
        size = open_checkpoint(source).nbytes / 1e6
        copied = seconds(lambda: shutil.copytree(source, Path(folder) / "copy"))
        print(f"copying {size:.0f} MB: {size / copied:.0f} MB/s")
        for name, options in [
            ("safetensors", {}),
            ("bfloat16", {"dtype": "bfloat16"}),
            ("int4", {"experts": "int4"}),
        ]:
            target = Path(folder) / name
            t = seconds(lambda: grokkit.convert(source, target, progress=False, **options))  # noqa: B023
            print(f"converting to {name}: {copied / t:.2f} of that ({size / t:.0f} MB/s read)")
        t = seconds(lambda: grokkit.convert(st, Path(folder) / "back", progress=False))
        print(f"and back: {copied / t:.2f} of that")
        base = seconds(lambda: read(source), 3)
        print(f"reading the official files: {size / base:.0f} MB/s")
        for name in ("official", "safetensors", "int4"):
            t = seconds(lambda: load(Path(folder) / name), 3)  # noqa: B023
            print(f"loading {name}: {base / t:.2f} of that rate ({t:.2f} s)")


if __name__ == "__main__":
    main()
