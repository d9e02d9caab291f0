"""Loading onto a mesh: every value in its place, nothing allocated before the checks."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grokkit.checkpoint import load, load_params, open_checkpoint
from grokkit.config import GrokConfig
from grokkit.errors import CheckpointError, ConfigError
from grokkit.model import param_specs
from grokkit.sharding import ParamSpec, is_spec, make_mesh

PARTS = [load.HostPart, load.DevicePart]
# Fewer meshes for the accelerators' way, whose programs take seconds to compile.
CASES = [
    *((load.HostPart, mesh) for mesh in [(1, 1), (1, 2), (1, 4), (1, 8), (2, 4), (8, 1)]),
    *((load.DevicePart, mesh) for mesh in [(1, 4), (2, 2)]),
]


@pytest.fixture(scope="module")
def checkpoint(golden):
    return open_checkpoint(golden)


@pytest.fixture(scope="module")
def expected(checkpoint) -> dict[str, np.ndarray]:
    """Each leaf, put together here by the layer number in the official name."""
    stacks: dict[str, dict[int, np.ndarray]] = {}
    leaves = {}
    for entry in checkpoint:
        arrays = [np.array(entry.file.open(span)) for span in entry.file.spans]
        names = [""] if len(arrays) == 1 else [".weight", ".scales"]
        for suffix, array in zip(names, arrays, strict=True):
            if suffix == ".weight":
                array = np.ascontiguousarray(array.swapaxes(-1, -2))  # held [n, k]
            if "decoder_layer_" in entry.key.name:
                layer = int(entry.key.name.split("decoder_layer_")[1].split("/")[0])
                stacks.setdefault(entry.key.path + suffix, {})[layer] = array
            else:
                leaves[entry.key.path + suffix] = array
    for path, layers in stacks.items():
        assert sorted(layers) == list(range(12))
        leaves[path] = np.stack([layers[i] for i in range(12)])
    return leaves


def named_leaves(tree) -> dict[str, jax.Array]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_spec)
    return {jax.tree_util.keystr(p, simple=True, separator="."): leaf for p, leaf in leaves}


def assert_equal(params, expected, specs, mesh) -> None:
    leaves, declared = named_leaves(params), named_leaves(specs)
    assert set(leaves) == set(expected)
    for path, leaf in leaves.items():
        assert leaf.dtype == expected[path].dtype and leaf.shape == expected[path].shape, path
        assert leaf.sharding == declared[path].sharding(mesh), path
        assert np.asarray(leaf).tobytes() == expected[path].tobytes(), path
        for shard in leaf.addressable_shards:  # every copy, not only the one that asarray reads
            piece = np.asarray(shard.data)
            assert piece.tobytes() == expected[path][shard.index].tobytes(), path


@pytest.mark.parametrize(("part", "axes"), CASES)
def test_every_value_in_its_place(checkpoint, expected, part, axes, monkeypatch):
    monkeypatch.setattr(load, "new_part", part)
    mesh = make_mesh(*axes)
    specs = param_specs(checkpoint.config)
    params = load_params(checkpoint, specs, mesh, progress=False)
    assert jax.tree.structure(params) == jax.tree.structure(specs, is_leaf=is_spec)
    assert_equal(params, expected, specs, mesh)


def test_a_plain_tree_will_do(golden, expected):
    """The tree is anything whose leaves have the right paths."""
    checkpoint = open_checkpoint(golden)
    specs: dict = {}
    for path, spec in named_leaves(param_specs(checkpoint.config)).items():
        *folders, last = path.split(".")
        place = specs
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = spec
    mesh = make_mesh(1, 2)
    assert_equal(load_params(checkpoint, specs, mesh, progress=False), expected, specs, mesh)


def test_layers_may_be_split_too(checkpoint, expected, monkeypatch):
    """A layer axis cut over devices: each gets its own layers, in numeric order."""
    monkeypatch.setitem(sys.modules["grokkit.sharding"].MESH_AXIS, "layer", "data")
    specs = param_specs(checkpoint.config)
    mesh = make_mesh(4, 2)
    params = load_params(checkpoint, specs, mesh, progress=False)
    assert params.blocks.moe.router.sharding.shard_shape((12, 64, 8)) == (3, 64, 8)
    assert_equal(params, expected, specs, mesh)


def test_loaded_arrays_are_not_views_of_the_file(copy, expected):
    checkpoint = open_checkpoint(copy)
    params = load_params(checkpoint, param_specs(checkpoint.config), make_mesh(1, 1), False)
    for path in (copy / "ckpt-0").iterdir():
        with open(path, "r+b") as file:
            file.write(bytes(path.stat().st_size))
    for path, leaf in named_leaves(params).items():
        assert np.asarray(leaf).tobytes() == expected[path].tobytes(), path


def test_loaded_arrays_may_be_donated(checkpoint, expected):
    params = load_params(checkpoint, param_specs(checkpoint.config), make_mesh(1, 8), False)
    double = jax.jit(lambda tree: jax.tree.map(lambda x: x + x, tree), donate_argnums=0)
    doubled = double(params.embedding.weight)
    np.testing.assert_array_equal(np.asarray(doubled), 2 * expected["embedding.weight"])
    assert np.asarray(params.final_norm.scale).tobytes() == expected["final_norm.scale"].tobytes()


def test_progress_in_bytes(checkpoint, monkeypatch):
    bars = []

    class Bar(load.tqdm):
        def __init__(self, **options):
            super().__init__(**options)
            bars.append(self)

    monkeypatch.setattr(load, "tqdm", Bar)
    load_params(checkpoint, param_specs(checkpoint.config), make_mesh(1, 1))
    (bar,) = bars
    payloads = sum(span.nbytes for entry in checkpoint for span in entry.file.spans)
    assert bar.n == bar.total == payloads
    assert bar.unit == "B" and bar.desc.startswith("loading tiny")


def test_silent_without_progress(checkpoint, capsys):
    load_params(checkpoint, param_specs(checkpoint.config), make_mesh(1, 1), progress=False)
    assert capsys.readouterr().err == ""


# Refused before anything is allocated


@pytest.fixture
def no_allocation(monkeypatch):
    def fail(*_):
        raise AssertionError("a part was made before the checks were over")

    monkeypatch.setattr(load, "new_part", fail)


def test_the_mesh_must_divide(checkpoint, no_allocation):
    with pytest.raises(ConfigError, match=r"^embedding.weight: axis 'd_model_split' of size 64"):
        load_params(checkpoint, param_specs(checkpoint.config), make_mesh(1, 3), progress=False)


def test_specs_of_another_model(checkpoint, no_allocation):
    other = dataclasses.replace(checkpoint.config, d_ff=96)
    with pytest.raises(CheckpointError) as e:
        load_params(checkpoint, param_specs(other), make_mesh(1, 1), progress=False)
    assert str(e.value) == (
        f"{checkpoint.directory}\n"
        "  expected: int8 of shape (12, 8, 96, 64) for blocks.moe.gate.weight\n"
        "  found: int8 of shape (12, 8, 88, 64)\n"
        "  what to do: pass stored_specs(checkpoint, grokkit.model.param_specs(checkpoint.config))"
    )
    fewer = dataclasses.replace(checkpoint.config, n_layers=11)
    with pytest.raises(CheckpointError, match=r"shape \(11, .*\n  found: .*shape \(12, "):
        load_params(checkpoint, param_specs(fewer), make_mesh(1, 1), progress=False)


def test_specs_of_another_dtype(checkpoint, no_allocation):
    specs = param_specs(checkpoint.config)
    bfloat16 = dataclasses.replace(specs.embedding.weight, dtype=jnp.bfloat16)
    specs = dataclasses.replace(
        specs, embedding=dataclasses.replace(specs.embedding, weight=bfloat16)
    )
    with pytest.raises(CheckpointError, match=r"expected: bfloat16 of.*\n  found: float32 of"):
        load_params(checkpoint, specs, make_mesh(1, 1), progress=False)


def test_leaves_without_a_file_and_files_without_a_leaf(checkpoint, no_allocation):
    specs = {
        "embedding": {"weight": ParamSpec((256, 64), jnp.float32, ("vocab", "d_model"))},
        "bias": ParamSpec((64,), jnp.float32, ("d_model",)),
    }
    with pytest.raises(CheckpointError, match="found: nothing for bias; no leaf for blocks.atten"):
        load_params(checkpoint, specs, make_mesh(1, 1), progress=False)
    flat = {path: 3 for path in named_leaves(param_specs(checkpoint.config))}
    with pytest.raises(CheckpointError, match="expected: a ParamSpec\n  found: int"):
        load_params(checkpoint, flat, make_mesh(1, 1), progress=False)


def test_a_file_that_changed_since_it_was_opened(copy):
    checkpoint = open_checkpoint(copy)
    path = copy / "ckpt-0" / "tensor00026_000"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"tensor00026_000\n.*46,766 bytes.*\n.*46,765 bytes"):
        load_params(checkpoint, param_specs(checkpoint.config), make_mesh(1, 1), progress=False)


# Memory, in a process of its own

MEASURE = """
import gc, sys, threading, time
from pathlib import Path
import jax, numpy as np
from grokkit.checkpoint import load, load_params, open_checkpoint
from grokkit.model import param_specs
from grokkit.sharding import make_mesh

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

checkpoint = open_checkpoint(sys.argv[1])
specs, mesh = param_specs(checkpoint.config), make_mesh(1, 8)
load.new_part = getattr(load, sys.argv[2])
# Once before: what compiling takes is not memory over the weights.
jax.block_until_ready(load_params(checkpoint, specs, mesh, progress=False))
gc.collect()
before = peak = anonymous()
done = False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.0005)

watcher = threading.Thread(target=watch)
watcher.start()
params = jax.block_until_ready(load_params(checkpoint, specs, mesh, progress=False))
done = True
watcher.join()
weights = sum(s.data.nbytes for leaf in jax.tree.leaves(params) for s in leaf.addressable_shards)
print(weights, anonymous() - before, peak - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A checkpoint of 455 MB; the largest file holds 67 MB, 8.4 MB for each of 8 devices."""
    from grokkit.checkpoint import tensor_keys, write_tensor

    config = GrokConfig(
        vocab_size=2048, d_model=1024, n_layers=2, n_heads=16, n_kv_heads=8, d_head=64, d_ff=8192
    )
    directory = tmp_path_factory.mktemp("large")
    (directory / "ckpt-0").mkdir()
    config.to_json(directory / "config.json")
    rng = np.random.default_rng(0)
    for key in tensor_keys(config):
        path = directory / "ckpt-0" / key.file_name
        if key.scales_shape is None:
            write_tensor(path, rng.random(key.shape, np.float32))
        else:
            scales = rng.random(key.scales_shape, np.float32).astype("bfloat16")
            write_tensor(path, rng.integers(-127, 128, key.shape, np.int8), scales)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_peak_memory_over_the_weights(large, part, monkeypatch):
    """Beyond the weights there is little, and nothing of the model's size."""
    # Without this glibc keeps freed blocks and hands them out again, which hides allocations.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(large), part.__name__],
        capture_output=True,
        text=True,
        check=True,
    )
    weights, after, peak = map(int, run.stdout.split())
    # On a device two slices under way; on the host the slabs of four threads.
    most = 2 * 8 * 1024 * 8192 // 8 if part is load.DevicePart else 4 * 8_400_000
    slack = 2_000_000  # the interpreter's own
    assert weights > 400_000_000
    assert 0.98 * weights < after  # the measure sees the weights
    assert peak - weights < most + slack
