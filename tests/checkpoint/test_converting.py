"""Conversions: what they write, and what is left when they are cut off."""

import errno
import filecmp
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import reference_weights, relative_error

import grokkit
from grokkit import cli
from grokkit.checkpoint import (
    check_content,
    convert,
    converting,
    matrices,
    open_checkpoint,
    stored_specs,
)
from grokkit.config import GrokConfig
from grokkit.errors import CheckpointError, ConfigError, GrokkitError
from grokkit.model import param_specs
from grokkit.quant import QuantizedArray, quantize
from grokkit.sharding import is_spec

SHARDS = 300_000  # bytes: twelve files


@pytest.fixture(scope="module")
def converted(golden, tmp_path_factory):
    target = tmp_path_factory.mktemp("converted") / "tiny"
    convert(golden, target, shard_bytes=SHARDS, verify=True, progress=False)
    return target


def same(a: Path, b: Path) -> bool:
    names = sorted(str(p.relative_to(a)) for p in a.rglob("*") if p.is_file())
    assert names == sorted(str(p.relative_to(b)) for p in b.rglob("*") if p.is_file())
    return filecmp.cmpfiles(a, b, names, shallow=False)[0] == names


def left(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# What is written


def test_there_and_back(converted, golden, tmp_path):
    found = convert(converted, tmp_path / "back", verify=True, progress=False)
    assert found.layout == "official" and found.directory == tmp_path / "back"
    names = [path.name for path in (golden / "ckpt-0").iterdir()]
    match, mismatch, errors = filecmp.cmpfiles(
        golden / "ckpt-0", tmp_path / "back" / "ckpt-0", names, shallow=False
    )
    assert (len(match), mismatch, errors) == (146, [], [])
    assert found.config == open_checkpoint(golden).config
    assert left(tmp_path) == ["back"]
    check_content(found, progress=False)


def test_in_small_blocks(golden, converted, tmp_path, monkeypatch):
    """Whatever the size of a block, the bytes are the same."""
    monkeypatch.setattr(matrices, "_COPIED", 3000)
    convert(golden, tmp_path / "st", shard_bytes=SHARDS, progress=False)
    assert same(tmp_path / "st", converted)
    convert(converted, tmp_path / "official", progress=False)
    assert filecmp.cmp(tmp_path / "official/ckpt-0/tensor00026_000", golden / "ckpt-0" /
                       "tensor00026_000", shallow=False)  # fmt: skip


def entry_arrays(checkpoint, name):
    file = checkpoint[name].file
    return [np.asarray(file.open(span)[:]) for span in file.spans]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_floats(golden, golden_weights, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(matrices, "_COMPUTED", 3000)
    found = convert(golden, tmp_path / "x", dtype=dtype, verify=True, progress=False)
    for name in ["moe/linear/w", "moe/linear_1/w", "multi_head_attention/linear/w", "router/w"]:
        name = f"transformer/decoder_layer_10/{name}"
        (values,) = entry_arrays(found, name)
        expected = golden_weights[name].astype(np.float32)
        if "router" not in name:
            expected = expected.astype(dtype)
        assert values.tobytes() == expected.tobytes()


def test_rounding_to_8_bits_is_quantize(golden, golden_weights, tmp_path, monkeypatch):
    monkeypatch.setattr(matrices, "_COMPUTED", 3000)
    convert(golden, tmp_path / "f", dtype="float32", progress=False)
    found = convert(
        tmp_path / "f", tmp_path / "x", to="official", dtype="int8", verify=True, progress=False
    )
    for name, groups in [("moe/linear_v/w", 1), ("moe/linear_1/w", 8)]:
        name = f"transformer/decoder_layer_3/{name}"
        expected = quantize(jnp.asarray(golden_weights[name], jnp.float32), groups)
        weight, scales = entry_arrays(found, name)
        np.testing.assert_array_equal(weight, np.swapaxes(expected.weight, -1, -2))
        np.testing.assert_array_equal(scales, expected.scales)


def four_bits(w, size):
    """The definition, in float64: [k, n] in groups of `size` rows."""
    k, n = w.shape
    groups = np.asarray(w, np.float32).reshape(k // size, size, n)
    scales = (np.abs(groups).max(axis=1) / np.float32(7)).astype("bfloat16").astype(np.float64)
    rounded = np.clip(np.round(groups / np.where(scales == 0, 1, scales)[:, None]), -7, 7)
    return (rounded * scales[:, None]).reshape(k, n)


@pytest.mark.parametrize("before", [None, "float32"])
def test_4_bits(golden, golden_weights, before, tmp_path, monkeypatch):
    monkeypatch.setattr(matrices, "_COMPUTED", 3000)
    source = golden
    if before:
        source = tmp_path / "floats"
        convert(golden, source, dtype=before, progress=False)
    found = convert(source, tmp_path / "x", experts="int4", group_size=8, verify=True,
                    progress=False)  # fmt: skip
    assert "int4[8, 88, 64] * bfloat16[8, 8, 88]" in repr(found)
    for name in ["moe/linear/w", "moe/linear_1/w"]:
        name = f"transformer/decoder_layer_2/{name}"
        weight, scales = entry_arrays(found, name)
        size = weight.shape[-1] // scales.shape[-2]
        assert size == 8
        values = np.swapaxes(weight, -1, -2) * np.repeat(scales.astype(np.float64), size, axis=-2)
        for e in (0, 7):
            np.testing.assert_array_equal(values[e], four_bits(golden_weights[name][e], size))
    if not before:
        lm = grokkit.load(tmp_path / "x", grokkit.make_mesh(1, 1), progress=False)
        gate = lm.model.blocks.moe.gate
        assert isinstance(gate, QuantizedArray) and gate.groups == 8
        assert lm.model.blocks.attention.out.groups == 8
        # 88 rows are 11 groups, which no two devices can share.
        with pytest.raises(ConfigError, match="'group_split' of size 11"):
            grokkit.load(tmp_path / "x", grokkit.make_mesh(1, 2), progress=False)
        assert dict(grokkit.load(tmp_path / "x", progress=False).mesh.shape)["model"] == 1


def test_no_platform_needs_4_bit_numbers_of_its_own(golden, tmp_path):
    """What reaches a device of a 4-bit checkpoint are the types of an 8-bit one."""
    convert(golden, tmp_path / "x", experts="int4", group_size=8, progress=False)
    mesh = grokkit.make_mesh(1, 1)
    specs = stored_specs(open_checkpoint(tmp_path / "x"), param_specs(GrokConfig.from_json(
        golden / "config.json")))  # fmt: skip
    dtypes = {np.dtype(spec.dtype).name for spec in jax.tree.leaves(specs, is_leaf=is_spec)}
    assert dtypes == {"int8", "bfloat16", "float32"}
    model = grokkit.load(tmp_path / "x", mesh, progress=False).model
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model)} == dtypes


def test_big_endian_processors_are_refused(golden, converted, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "byteorder", "big")
    for call in [
        lambda: open_checkpoint(golden),
        lambda: grokkit.load(converted, grokkit.make_mesh(1, 1), progress=False),
        lambda: convert(golden, tmp_path / "x", experts="int4", group_size=8, progress=False),
    ]:
        with pytest.raises(CheckpointError, match="found: a big-endian one\n  what to do: read it"):
            call()
    assert left(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"experts": "int4", "group_size": 8}, {"dtype": "bfloat16"}])
def test_what_is_computed_from_them(golden, golden_arrays, options, tmp_path):
    """Float32 arithmetic on the rounded matrices against float64 on the same."""
    convert(golden, tmp_path / "x", progress=False, **options)
    lm = grokkit.load(tmp_path / "x", grokkit.make_mesh(1, 1), "float32", progress=False)
    tokens = golden_arrays["tokens"]
    exact = reference.forward(reference_weights(lm.model), lm.config, tokens)["logits"]
    assert relative_error(lm(tokens).logits, exact) < 1e-5


# Refused before anything is written


@pytest.mark.parametrize(
    "options, message",
    [
        ({"to": "gguf"}, "expected one of official, safetensors"),
        ({"dtype": "int4"}, "expected one of int8, bfloat16"),
        ({"experts": "int2"}, "experts: expected one of int4"),
        ({"to": "official", "experts": "int4"}, "has no 4-bit matrices"),
        ({"to": "official", "dtype": "bfloat16"}, "add --dtype int8"),
        ({"experts": "int4", "group_size": 7}, "an even number that divides the 64 rows"),
        ({"experts": "int4", "group_size": 32}, "divides the 88 rows of blocks.moe.out"),
    ],
)
def test_impossible_requests(golden, options, message, tmp_path):
    with pytest.raises(GrokkitError) as e:
        convert(golden, tmp_path / "x", progress=False, **options)
    assert message in str(e.value)
    assert left(tmp_path) == []


def test_8_bits_of_4(golden, tmp_path):
    convert(golden, tmp_path / "x", experts="int4", group_size=8, progress=False)
    with pytest.raises(CheckpointError, match="convert the checkpoint that it was made from"):
        convert(tmp_path / "x", tmp_path / "y", progress=False)


def test_targets_that_are_taken(converted, golden, tmp_path):
    with pytest.raises(CheckpointError, match="--verify, a finished conversion"):
        convert(golden, converted, progress=False)
    with pytest.raises(CheckpointError, match="create it first"):
        convert(golden, tmp_path / "a" / "b", progress=False)
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial" / "notes").touch()
    with pytest.raises(CheckpointError, match="a conversion that was cut off\n  found: something"):
        convert(golden, tmp_path / "x", progress=False)
    with pytest.raises(CheckpointError, match="a finished conversion: one with a manifest.json"):
        convert(golden, tmp_path, verify=True, progress=False)
    (tmp_path / "empty").mkdir()
    assert len(convert(golden, tmp_path / "empty", progress=False)) == 146


def test_too_little_space(golden, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=3_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError) as e:
        convert(golden, tmp_path / "x", progress=False)
    assert "expected: 3,243,264 bytes free\n  found: 3,000,000\n" in str(e.value)
    assert left(tmp_path) == []


# Damage that shows later


def test_altered_files_are_found(golden, converted, tmp_path):
    target = shutil.copytree(converted, tmp_path / "tiny")
    shard = sorted(target.glob("*.safetensors"))[3]
    with open(shard, "r+b") as file:
        file.seek(-1000, 2)
        byte = file.read(1)
        file.seek(-1000, 2)
        file.write(bytes([byte[0] ^ 1]))
    for read in [
        lambda: grokkit.load(target, progress=False, check=True),
        lambda: check_content(open_checkpoint(target), progress=False),
        lambda: convert(golden, target, shard_bytes=SHARDS, verify=True, progress=False),
    ]:
        with pytest.raises(CheckpointError) as e:
            read()
        assert str(shard) in str(e.value) and "altered content" in str(e.value)


def test_verification_compares_values(golden, converted, tmp_path):
    """A file altered together with its digest."""
    target = shutil.copytree(converted, tmp_path / "tiny")
    shard = sorted(target.glob("*.safetensors"))[3]
    content = bytearray(shard.read_bytes())
    content[-1000] ^= 1
    shard.write_bytes(content)
    manifest = json.loads((target / "manifest.json").read_text())
    manifest["files"][shard.name]["sha256"] = converting.sha256(shard)
    (target / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"expected: blocks\.\d+\.\S+ as in the source"):
        convert(golden, target, shard_bytes=SHARDS, verify=True, progress=False)
    assert len(convert(golden, converted, shard_bytes=SHARDS, verify=True, progress=False)) == 146


# Cut off


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space"), KeyboardInterrupt()])
def test_a_full_disk_and_ctrl_c(golden, converted, error, tmp_path, monkeypatch):
    written = []
    write = converting.write_chunk

    def failing(out, data):
        written.append(len(data))
        if sum(written) > 1_000_000:
            raise error
        write(out, data)

    monkeypatch.setattr(converting, "write_chunk", failing)
    expected = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as e:
        convert(golden, tmp_path / "x", shard_bytes=SHARDS, progress=False)
    if isinstance(error, OSError):
        sizes = [path.stat().st_size for path in (tmp_path / "x.partial").glob("*.safetensors")]
        assert f"found: a full disk, with {sum(sizes):,} of them in complete files" in str(e.value)
        assert "run the same command again" in str(e.value)
    monkeypatch.undo()
    assert left(tmp_path) == ["x.partial"]
    assert not list((tmp_path / "x.partial").glob("*.tmp"))
    with pytest.raises(CheckpointError, match="it goes on where it stopped"):
        open_checkpoint(tmp_path / "x.partial")
    there = left(tmp_path / "x.partial")
    assert there[0] == "conversion.json" and len(there) == 6
    before = {name: (tmp_path / "x.partial" / name).stat().st_mtime_ns for name in there[1:]}
    convert(golden, tmp_path / "x", shard_bytes=SHARDS, progress=False)
    assert same(tmp_path / "x", converted)
    after = {name: (tmp_path / "x" / name).stat().st_mtime_ns for name in there[1:]}
    assert after == before  # what was complete was not written again


def test_going_on_with_another_request(golden, tmp_path, monkeypatch):
    monkeypatch.setattr(converting._Work, "finish", lambda *_: None)
    source = shutil.copytree(golden, tmp_path / "source")
    convert_to = tmp_path / "x"
    with pytest.raises(CheckpointError):  # there is nothing to open
        convert(source, convert_to, shard_bytes=SHARDS, progress=False)
    monkeypatch.undo()
    for change, message in [
        (lambda: {"dtype": "bfloat16"}, "another storage"),
        (lambda: {"shard_bytes": 1_000_000}, "another shard_bytes"),
        (lambda: os.utime(source / "ckpt-0" / "tensor00003_000") or {}, "files of the source"),
    ]:
        options = {"shard_bytes": SHARDS} | change()
        with pytest.raises(CheckpointError, match=message):
            convert(source, convert_to, progress=False, **options)
    assert not convert_to.exists()


def test_a_file_that_was_altered_meanwhile(golden, tmp_path, monkeypatch):
    monkeypatch.setattr(converting._Work, "finish", lambda *_: None)
    with pytest.raises(CheckpointError):
        convert(golden, tmp_path / "x", shard_bytes=SHARDS, progress=False)
    monkeypatch.undo()
    shard = min((tmp_path / "x.partial").glob("*.safetensors"))
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(CheckpointError, match="altered content"):
        convert(golden, tmp_path / "x", shard_bytes=SHARDS, progress=False)


KILLED = """
import os, random, signal, sys
from grokkit.checkpoint import convert, converting, open_checkpoint
from grokkit.errors import CheckpointError

source, target, shard_bytes, most, seed = *sys.argv[1:3], *map(int, sys.argv[3:])
events, last = 0, None

def counted(function):
    def run(*arguments, **options):
        global events
        events += 1
        if events == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return run

os.replace, os.fsync = counted(os.replace), counted(os.fsync)
converting.write_chunk = counted(converting.write_chunk)
converting.write_json = counted(converting.write_json)
converting.write_manifest = counted(converting.write_manifest)

def attempt():
    # In a child: JAX has not started in this process, which only forks.
    if os.fork() == 0:
        convert(source, target, shard_bytes=shard_bytes, progress=False)
        os._exit(0)
    return os.wait()[1]

random.seed(seed)
kills = 0
while True:
    last = random.randint(1, most)
    status = attempt()
    if status == 0:
        break
    assert status == signal.SIGKILL, status
    kills += 1
    assert not os.path.exists(target)
    try:
        open_checkpoint(target + ".partial")
    except CheckpointError:
        continue
    # Only when every file was complete, and its name alone was missing, may it load.
    assert os.path.exists(target + ".partial/manifest.json")
print(kills)
"""


def test_complete_but_for_its_name(golden, converted, tmp_path, monkeypatch):
    """It may be opened as it is, and the same call gives it its name."""

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        rename = os.replace
        patched.setattr(
            os, "replace", lambda a, b: killed() if b == tmp_path / "x" else rename(a, b)
        )
        convert(golden, tmp_path / "x", shard_bytes=SHARDS, progress=False)
    assert len(open_checkpoint(tmp_path / "x.partial")) == 146
    with pytest.raises(CheckpointError, match="another storage"):
        convert(golden, tmp_path / "x", dtype="bfloat16", shard_bytes=SHARDS, progress=False)
    convert(golden, tmp_path / "x", shard_bytes=SHARDS, progress=False)
    assert same(tmp_path / "x", converted) and left(tmp_path) == ["x"]


def test_a_finished_conversion_under_the_name_of_one_that_was_cut_off(golden, converted, tmp_path):
    """Nothing in it says what it was made of."""
    shutil.copytree(converted, tmp_path / "x.partial")
    with pytest.raises(CheckpointError, match="a conversion that was cut off"):
        convert(golden, tmp_path / "x", shard_bytes=SHARDS, progress=False)
    assert same(tmp_path / "x.partial", converted) and not (tmp_path / "x").exists()


# Events of a whole conversion are more than twice as many: there are always two kills.
@pytest.mark.parametrize("to, most", [("safetensors", 160), ("official", 600)])
def test_killed_at_random_points(golden, converted, to, most, tmp_path):
    """Whenever it dies, nothing loads that is not complete, and it goes on to the same bytes."""
    source = golden if to == "safetensors" else converted
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(source), str(tmp_path / "x"), str(SHARDS), str(most),
         str(random.randrange(10**6))],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) >= 2
    assert left(tmp_path) == ["x"]
    if to == "safetensors":
        assert same(tmp_path / "x", converted)
    else:
        assert same(tmp_path / "x" / "ckpt-0", golden / "ckpt-0")


def test_ctrl_c_at_the_command_line(golden, tmp_path, monkeypatch, capsys):
    def interrupted(out, data):
        raise KeyboardInterrupt

    monkeypatch.setattr(converting, "write_chunk", interrupted)
    arguments = ["convert", str(golden), str(tmp_path / "x"), "--no-progress"]
    assert cli.main(arguments) == cli.INTERRUPTED
    printed = capsys.readouterr()
    assert printed.err.endswith("the same command goes on after the last complete file\n")
    assert "Traceback" not in printed.err and printed.out == ""
    assert left(tmp_path / "x.partial") == ["conversion.json"]


def test_official_files_of_a_conversion_under_way(golden, tmp_path, monkeypatch):
    """All tensors are there, but not yet what says so."""
    monkeypatch.setattr(converting._Work, "finish", lambda *_: None)
    arguments = {"to": "official", "progress": False}
    with pytest.raises(CheckpointError):
        convert(golden, tmp_path / "x", **arguments)
    monkeypatch.undo()
    folder = tmp_path / "x.partial"
    shutil.copy(golden / "config.json", folder)
    assert len(list((folder / "ckpt-0").iterdir())) == 146
    for directory in (folder, folder / "ckpt-0"):
        with pytest.raises(CheckpointError, match="one that was cut off"):
            open_checkpoint(directory)
    assert len(convert(golden, tmp_path / "x", **arguments)) == 146


@pytest.mark.parametrize("at", ["begin", "file"])
def test_a_disk_that_cannot_be_written(golden, at, tmp_path, monkeypatch):
    def failing(*_):
        raise OSError(errno.EFBIG if at == "file" else errno.EROFS, "it cannot be done")

    monkeypatch.setattr(converting, "write_chunk" if at == "file" else "write_json", failing)
    with pytest.raises(CheckpointError, match=r"(?s)x\.partial.*found: it cannot be done.*again"):
        convert(golden, tmp_path / "x", progress=False)
    assert not (tmp_path / "x").exists()


# Around it


@pytest.mark.slow
def test_memory_stays_small(tmp_path):
    """One block at a time, not one matrix: a matrix of 64 MB, in blocks of about a megabyte."""
    code = f"""
import threading, time
import numpy as np
from grokkit.checkpoint import matrices, convert, tensor_keys, write_tensor
from grokkit.config import GrokConfig
from pathlib import Path
config = GrokConfig(vocab_size=64, d_model=512, n_layers=1, n_heads=8, n_kv_heads=8, d_head=8,
                    d_ff=16384)
source = Path({str(tmp_path)!r}) / "source"
(source / "ckpt-0").mkdir(parents=True)
config.to_json(source / "config.json")
for key in tensor_keys(config):
    weight = np.ones(key.shape, key.dtype)
    scales = None if key.scales_shape is None else np.ones(key.scales_shape, "bfloat16")
    write_tensor(source / "ckpt-0" / key.file_name, weight, scales)
del weight, scales
matrices._COPIED = matrices._COMPUTED = 1 << 18
def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
convert(source, source.with_name("once"), dtype="bfloat16", progress=False)
before = peak = anonymous()
done = False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)
watcher = threading.Thread(target=watch)
watcher.start()
convert(source, source.with_name("again"), progress=False)
convert(source, source.with_name("floats"), dtype="bfloat16", progress=False)
done = True
watcher.join()
print(peak - before)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 12_000_000


def test_progress_in_bytes(golden, tmp_path, capsys):
    found = convert(golden, tmp_path / "tiny", verify=True)
    err = capsys.readouterr().err
    assert "writing tiny: 100%" in err and "verifying tiny: 100%" in err
    assert f"{found.nbytes / 1e6:.2f}M/{found.nbytes / 1e6:.2f}M" in err


def test_the_command(golden, tmp_path, capsys, tiny_tokenizer_file):
    source = shutil.copytree(golden, tmp_path / "source")
    shutil.copy(tiny_tokenizer_file, source / "tokenizer.model")
    target = tmp_path / "x"
    arguments = ["convert", str(source), str(target), "--verify", "--no-progress",
                 f"--shard-bytes={SHARDS // 1000}kB"]  # fmt: skip
    assert cli.main(arguments) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{target}: 12 safetensors files, ")
    assert "every tensor is as in the source" in printed.out and printed.err == ""
    assert open_checkpoint(target).tokenizer_file == target / "tokenizer.model"
    assert cli.main(arguments[:3]) == cli.BAD_INPUT
    assert "choose another name" in capsys.readouterr().err
    assert cli.main(["inspect", str(target), "--check", "--no-progress"]) == 0
    out = capsys.readouterr().out
    assert "12 safetensors files, " in out and "transformer/decoder_layer_3/router/w" in out
