"""Captures written to disk: the values of `run_with_cache`, and the same bytes after any end."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error
from safetensors.numpy import load_file

import grokkit
from grokkit import Capture, capturing, stored_captures
from grokkit.errors import CaptureError, PromptError, SiteError
from grokkit.inspection import as_captures
from grokkit.model import place
from grokkit.stored_captures import Layers, StoredCaptures, open_captures

WANTED = [
    "embed",
    Capture("resid_post", layers=(11, 2)),
    "expert_indices",
    Capture("router_probs", reduce=lambda p: p.max(axis=-1), name="largest"),
    Capture("pattern", layers=(2, -1), positions=-1),
    "logits",
]


@pytest.fixture(scope="module")
def mesh():
    return grokkit.make_mesh(1, 1)  # where programs compile fastest


@pytest.fixture(scope="module")
def streamed(golden_dir, mesh) -> grokkit.LanguageModel:
    return grokkit.load(golden_dir, mesh, "float32", progress=False, stream=True)


@pytest.fixture(scope="module")
def tokens(golden_arrays) -> np.ndarray:
    return golden_arrays["tokens"][:, :8]


def write(lm, directory, tokens, captures=WANTED, **options) -> StoredCaptures:
    return lm.capture_to(directory, tokens, captures, progress=False, **options)


@pytest.fixture(scope="module")
def written(streamed, tokens, tmp_path_factory) -> StoredCaptures:
    return write(streamed, tmp_path_factory.mktemp("captures") / "all", tokens)


@pytest.fixture(scope="module")
def expected(streamed, tokens):
    return streamed.run_with_cache(tokens, WANTED)[1]


def files(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def same(found, expected, close=1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        entry = expected.entries[name]
        assert found.entries[name].layers == entry.layers and found.entries[name].axes == entry.axes
        assert found[name].dtype == value.dtype, name
        assert relative_error(found[name], value) <= close, name


# What is there


def test_values_are_those_of_run_with_cache(written, expected):
    same(written, expected, close=0)


def test_indexing_reads_no_more_than_is_asked_for(written, expected):
    assert isinstance(written["resid_post", 2], np.memmap)
    np.testing.assert_array_equal(written["resid_post", 2], expected["resid_post", 2])
    np.testing.assert_array_equal(written["blocks.2.hook_resid_post"], expected["resid_post"][1])
    with pytest.raises(SiteError, match=r"captured in layers \[11, 2\], not 4"):
        written["resid_post", 4]
    for axis, index in [("layer", [2, 11]), ("layer", 2), ("batch", 1), ("position", [0, 3])]:
        cut, of = (c.slice(axis, index) for c in (written, expected))
        for name, value in of.items():
            np.testing.assert_array_equal(cut[name], value)
    assert isinstance(written.slice("layer", [2, 11]).entries["resid_post"].value, Layers)
    assert written.nbytes == expected.nbytes and written.table() == expected.table()
    assert repr(written).startswith(str(written.directory))
    same(written.to_host(), expected, close=0)


def test_files_are_safetensors_that_say_what_they_hold(written, expected, tokens):
    np.testing.assert_array_equal(written.tokens, tokens)
    np.testing.assert_array_equal(written.lengths, [tokens.shape[1]] * len(tokens))
    assert sorted(files(written.directory)) == sorted(
        ["after.safetensors", "before.safetensors", "captures.json", "complete",
         "prompts.safetensors", *(f"layer-{i:02}.safetensors" for i in range(12))]
    )  # fmt: skip
    path = written.directory / "layer-11.safetensors"
    np.testing.assert_array_equal(load_file(path)["resid_post"][0], expected["resid_post"][0])
    alone = grokkit.ActivationCache.load(path)
    np.testing.assert_array_equal(alone["pattern"], expected["pattern"][1:])
    assert alone.entries["expert_indices"].layers == (11,)


def test_some_prompts_at_a_time(streamed, tokens, expected, tmp_path):
    """All go through a layer before the next is read."""
    three = np.concatenate([tokens, tokens[:1]])
    passes, layers = [], streamed.runnable.reader.layers
    streamed.runnable.reader.layers = lambda *a: passes.append(a) or layers(*a)
    try:
        found = write(streamed, tmp_path / "x", three, rows=2)
    finally:
        del streamed.runnable.reader.layers
    assert passes == [(0, 12, False)]
    del found.entries["largest"]  # whose axes have no names
    for name, value in found.slice("batch", [0, 1]).items():
        assert relative_error(value, expected[name]) < 1e-6, name
    assert relative_error(found["logits"][2], expected["logits"][0]) < 1e-6
    with pytest.raises(
        SiteError, match=r"keeps the batch as its first axis, since 2 of 3 .*rows=3"
    ):
        write(streamed, tmp_path / "y", three, Capture("z", reduce=lambda z: z[0]), rows=2)
    with pytest.raises(PromptError, match="rows must be from 1 to the 3 prompts"):
        write(streamed, tmp_path / "y", three, rows=4)
    assert not (tmp_path / "y").exists()


def test_a_model_in_memory_writes_the_same_files(tiny_lm, tmp_path):
    """Texts of several lengths, an edit, a batch that is cut over devices."""
    mesh = grokkit.make_mesh(2, 1)
    lm = grokkit.LanguageModel(place(tiny_lm.model, mesh), mesh, tiny_lm.tokenizer, "tiny")
    texts = ["The quick", "Two and two make"]
    edits = [grokkit.Add("resid_mid", np.ones(32, np.float32), layers=[1], positions=[-1])]
    wanted = ["resid_post", "expert_weights", "final_norm"]
    found = write(lm, tmp_path / "x", texts, wanted, edits=edits)
    same(found, lm.run_with_cache(texts, wanted, edits)[1])
    assert found.lengths.tolist() == [len(lm.tokenizer.encode(t)) for t in texts]
    before = files(tmp_path / "x")
    (tmp_path / "x" / "complete").unlink()
    (tmp_path / "x" / "layer-01.safetensors").unlink()
    write(lm, tmp_path / "x", texts, wanted, edits=edits)
    assert files(tmp_path / "x") == before
    with pytest.raises(CaptureError, match="edits: "):
        write(lm, tmp_path / "x", texts, wanted, edits=[grokkit.Scale("z", 0.5)])
    with pytest.raises(PromptError, match="with edits all 4 run at once"):
        write(lm, tmp_path / "y", texts * 2, wanted, edits=edits, rows=2)


def test_layers_beyond_the_last_that_is_captured_are_not_run(streamed, tokens):
    def last(*captures):
        wanted = as_captures(captures, streamed.config, tokens.shape[1])
        lengths = np.full(len(tokens), tokens.shape[1])
        return capturing._Sweep(
            streamed.runnable, streamed.mesh, tokens, lengths, wanted, (), None
        ).stop

    assert last("embed") == 0
    assert last("embed", Capture("k", layers=(3, 1))) == 4
    assert last("k") == last(Capture("k", layers=1), "logits") == 12


# Cut off


def test_wherever_it_ends_it_goes_on_to_the_same_bytes(
    streamed, tokens, written, tmp_path, monkeypatch
):
    """The directory as it is at each write, sync and renaming is what a kill there would leave."""
    left = []

    def watch(owner, name):
        original = getattr(owner, name)

        def watching(*arguments):
            if (tmp_path / "x").exists():
                left.append(shutil.copytree(tmp_path / "x", tmp_path / f"left{len(left)}"))
            return original(*arguments)

        monkeypatch.setattr(owner, name, watching)

    watch(stored_captures, "write")
    watch(stored_captures.os, "replace")
    watch(stored_captures.os, "fsync")
    write(streamed, tmp_path / "x", tokens)
    monkeypatch.undo()
    complete = files(written.directory)
    assert files(tmp_path / "x") == complete
    assert len(left) > 100
    firsts = []
    layers = streamed.runnable.reader.layers
    monkeypatch.setattr(
        streamed.runnable.reader, "layers", lambda *a: firsts.append(a[0]) or layers(*a)
    )
    points = sorted(random.sample(range(4, len(left) - 4), 3))
    for folder in [left[1], *(left[i] for i in points), left[-3], left[-1]]:
        with pytest.raises(CaptureError, match=r"cut off|no captures\.json"):
            open_captures(folder)
        write(streamed, folder, tokens)
        assert files(folder) == complete
    assert firsts[0] == 0 and firsts[-1] == 12 and firsts == sorted(firsts)
    write(streamed, folder, tokens)  # and once all is there nothing runs
    assert len(firsts) == 6


def failing(error, after):
    """A `write` that fails after so many bytes."""
    written, original = [], stored_captures.write

    def write(file, data):
        written.append(len(data))
        if sum(written) > after:
            raise error
        original(file, data)

    return write


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space"), KeyboardInterrupt()])
def test_a_full_disk_and_ctrl_c(error, streamed, tokens, written, tmp_path, monkeypatch):
    monkeypatch.setattr(stored_captures, "write", failing(error, 60_000))
    with pytest.raises(CaptureError if isinstance(error, OSError) else type(error)) as e:
        write(streamed, tmp_path / "x", tokens)
    monkeypatch.undo()
    if isinstance(error, OSError):
        assert "found: a full disk after" in str(e.value)
        assert "make the same call again" in str(e.value)
    there = files(tmp_path / "x")
    assert not [name for name in there if name.endswith(".tmp")]
    assert len([name for name in there if name.startswith("stream-")]) == 1
    with pytest.raises(CaptureError) as e:
        open_captures(tmp_path / "x")
    assert "layer-11.safetensors" in str(e.value) or "more are missing" in str(e.value)
    assert "lm.capture_to with the same directory" in str(e.value)
    write(streamed, tmp_path / "x", tokens)
    assert files(tmp_path / "x") == files(written.directory)


KILLED = """
import os, signal, sys
import numpy as np
import grokkit
from grokkit import stored_captures

checkpoint, target, last = sys.argv[1], sys.argv[2], int(sys.argv[3])
events = 0

def counted(function):
    def run(*arguments):
        global events
        events += 1
        if events == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return run

stored_captures.write = counted(stored_captures.write)
os.replace, os.fsync = counted(os.replace), counted(os.fsync)
grokkit.virtual_devices(2)
lm = grokkit.load(checkpoint, dtype="float32", progress=False, stream=True)
lm.capture_to(target, np.arange(3, 11)[None], ["resid_post", "pattern"], progress=False)
"""


@pytest.mark.slow
def test_killed_at_random_points(golden_dir, tmp_path):
    """Processes of their own, each of which goes on where the one before was killed."""

    def run(target, last):
        command = [sys.executable, "-c", KILLED, str(golden_dir), str(target), str(last)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert run(tmp_path / "whole", -1).returncode == 0
    kills = 0
    while True:
        done = run(tmp_path / "x", random.randint(5, 40) if kills < 4 else -1)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        kills += 1
        with pytest.raises(CaptureError):
            open_captures(tmp_path / "x")
    assert kills >= 2
    assert files(tmp_path / "x") == files(tmp_path / "whole")


# Refused


def test_another_request_is_refused(streamed, mesh, golden_dir, tokens, written, tmp_path):
    """And nothing is changed, whether the captures are complete or not."""
    folder = shutil.copytree(written.directory, tmp_path / "x")
    (folder / "complete").unlink()
    before = files(folder)
    half = [Capture("router_probs", reduce=lambda p: p.min(axis=-1), name="largest")
            if isinstance(c, Capture) and c.name == "largest" else c for c in WANTED]  # fmt: skip
    shutil.copytree(golden_dir, tmp_path / "other")
    file = tmp_path / "other" / "ckpt-0" / "tensor00040_000"
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)
    other = grokkit.load(tmp_path / "other", mesh, "float32", progress=False, stream=True)
    for lm, changes, message in [
        (streamed, {"tokens": tokens[:, ::-1]}, "expected: .*prompts: 2 of 8 tokens, "),
        (streamed, {"captures": half}, "expected: .*program: "),
        (streamed, {"edits": [grokkit.Scale("z", 0.5)]}, 'expected: .*edits: .*"Scale"'),
        (other, {}, "expected: .*checkpoint: "),
    ]:
        with pytest.raises(CaptureError, match=message) as e:
            write(lm, folder, **{"tokens": tokens} | changes)
        assert "choose another directory, or remove this one to start anew" in str(e.value)
    assert files(folder) == before


def test_a_reduction_s_constants_and_a_capture_s_positions_count(streamed, tokens, tmp_path):
    def weighed(by):
        weights = jnp.linspace(0, by, 64)
        return Capture("embed", reduce=lambda x: x * weights)

    write(streamed, tmp_path / "x", tokens, weighed(1))
    write(streamed, tmp_path / "x", tokens, weighed(1))
    with pytest.raises(CaptureError, match="program: "):
        write(streamed, tmp_path / "x", tokens, weighed(1.0001))
    with pytest.raises(CaptureError, match='captures: .*"positions": "7"'):
        write(streamed, tmp_path / "x", tokens, Capture("embed", positions=-1))


def test_directories_that_hold_something_else(streamed, tokens, written, tmp_path):
    with pytest.raises(CaptureError, match="create it first"):
        write(streamed, tmp_path / "a" / "b", tokens)
    (tmp_path / "notes").touch()
    with pytest.raises(CaptureError, match="found: a file"):
        write(streamed, tmp_path / "notes", tokens)
    with pytest.raises(CaptureError, match="1 other entries, 'notes' among them"):
        write(streamed, tmp_path, tokens)
    with pytest.raises(CaptureError, match=r"no captures\.json in it"):
        open_captures(tmp_path)
    with pytest.raises(CaptureError, match="no directory"):
        open_captures(tmp_path / "a")
    damaged = shutil.copytree(written.directory, tmp_path / "damaged")
    (damaged / "layer-05.safetensors").write_bytes(b"")
    with pytest.raises(CaptureError, match=r"layer-05\.safetensors\n.*\n  found: 0 bytes"):
        open_captures(damaged)
    (damaged / "captures.json").write_text('{"format": "x"}')
    with pytest.raises(CaptureError, match="expected: grokkit captures, version 1"):
        open_captures(damaged)


def test_a_file_that_went_meanwhile(streamed, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(stored_captures, "write", failing(KeyboardInterrupt(), 60_000))
    with pytest.raises(KeyboardInterrupt):
        write(streamed, tmp_path / "x", tokens)
    monkeypatch.undo()
    (tmp_path / "x" / "layer-00.safetensors").unlink()
    with pytest.raises(CaptureError, match=r"layer-00\.safetensors\n(.*\n)*.*to start anew"):
        write(streamed, tmp_path / "x", tokens)


def test_too_little_space(streamed, tokens, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CaptureError, match=r"bytes free\n  found: 1,000,000\n"):
        write(streamed, tmp_path / "x", tokens)


def test_what_cannot_be_written(streamed, tokens, tmp_path):
    with pytest.raises(SiteError, match="only single arrays can be written"):
        write(streamed, tmp_path / "x", tokens, Capture("z", reduce=lambda z: (z, z)))
    assert not (tmp_path / "x").exists()


def test_two_that_write_into_one_directory(streamed, tokens, written, tmp_path, monkeypatch):
    """The second is refused while the first is at it, and goes on where that was killed."""
    put, tried = stored_captures.CaptureFile.put, []

    def meanwhile(*arguments):
        if not tried:
            with pytest.raises(CaptureError, match=rf"found: process {os.getpid()} on .* writing"):
                tried.append(write(streamed, tmp_path / "x", tokens))
            tried.append(None)
            shutil.copytree(tmp_path / "x", tmp_path / "left")
        put(*arguments)

    monkeypatch.setattr(stored_captures.CaptureFile, "put", meanwhile)
    write(streamed, tmp_path / "x", tokens)
    assert tried == [None] and (tmp_path / "left" / ".lock").exists()
    write(streamed, tmp_path / "left", tokens)
    assert files(tmp_path / "x") == files(tmp_path / "left") == files(written.directory)
