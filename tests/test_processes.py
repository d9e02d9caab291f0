"""Two processes of four devices each do what one process of eight does, and end together."""

import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import jax
import many_processes
import numpy as np
import pytest
from helpers import random_model, relative_error

import grokkit
from grokkit import cli, processes
from grokkit.checkpoint import fingerprint, open_checkpoint, save_params
from grokkit.checkpoint.manifest import read_manifest
from grokkit.errors import ProcessError

PATIENCE = 60  # seconds: how soon the others must have ended


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_lm, tiny_tokenizer_file):
    directory = tmp_path_factory.mktemp("processes") / "tiny"
    save_params(tiny_lm.model, tiny_lm.config, directory, tiny_tokenizer_file, progress=False)
    return directory


@pytest.fixture(scope="module")
def other(tmp_path_factory, tiny_config, tiny_tokenizer_file):
    """Of the same shapes, with other numbers."""
    directory = tmp_path_factory.mktemp("processes") / "other"
    save_params(random_model(tiny_config, 1), tiny_config, directory, tiny_tokenizer_file, False)
    return directory


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def environment() -> dict[str, str]:
    """This process's, but for the number of devices; and programs are always compiled in haste."""
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f]
    return os.environ | {"XLA_FLAGS": " ".join([*flags, "--xla_backend_optimization_level=0"])}


def start(arguments, environments=({}, {})) -> list[subprocess.Popen]:
    """A process for each list of arguments."""
    return [
        subprocess.Popen([sys.executable, *a], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         text=True, env=environment() | more)
        for a, more in zip(arguments, environments, strict=True)
    ]  # fmt: skip


def slurm(i, job, tasks_per_machine="2") -> dict[str, str]:
    """What `srun` tells process `i` of two."""
    return {
        "SLURM_JOB_ID": job, "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "SLURM_NODEID": "0",
        "SLURM_STEP_TASKS_PER_NODE": tasks_per_machine,
    }  # fmt: skip


def free_slurm_job() -> str:
    """A job whose number makes JAX choose a port that is free."""
    while True:
        job = random.randrange(4096)
        with contextlib.suppress(OSError), socket.socket() as s:
            s.bind(("127.0.0.1", 65535 - 4096 + 1 + job))
            return str(job)


def finish(started, seconds) -> list[tuple[int, str, str]]:
    """Status and output of each; none may take longer."""
    end = time.monotonic() + seconds
    try:
        printed = [p.communicate(timeout=max(end - time.monotonic(), 1)) for p in started]
    finally:
        for p in started:
            p.kill()
    return [(p.returncode, *texts) for p, texts in zip(started, printed, strict=True)]


def run_two(folder, checkpoints, task="all"):
    port = free_port()
    return start(
        [many_processes.__file__, str(i), port, str(c), task, str(folder)]
        for i, c in enumerate(checkpoints)
    )


def load(folder, name, i) -> tuple[dict, dict]:
    """What process `i` kept under a name."""
    with np.load(folder / f"{name} {i}.npz") as found:
        return dict(found), json.loads((folder / f"{name} {i}.json").read_text())


def own_bytes(model, mesh, i) -> int:
    """Of the parts of process `i`'s four devices; what they all hold counts only once."""
    mine = set(mesh.devices.flat[4 * i : 4 * i + 4])
    parts = {
        (n, str(s.index)): s.data.nbytes
        for n, leaf in enumerate(jax.tree.leaves(model))
        for s in leaf.addressable_shards
        if s.device in mine
    }
    return sum(parts.values())


@pytest.mark.slow
def test_two_processes_are_one(checkpoint, tiny_lm, tmp_path):
    """Every call, with the model in memory, streamed, and with the batch cut between them."""
    for status, _, err in finish(run_two(tmp_path, [checkpoint] * 2, "all calls"), 500):
        assert status == 0, err
    arrays, notes = many_processes.calls(tiny_lm)
    assert len(set(notes["batch"])) == 7 and notes["batch"][-1] == ""
    found = {name: [load(tmp_path, name, i) for i in range(2)]
             for name in ("in memory", "streamed", "cut batch")}  # fmt: skip
    of_all = arrays | many_processes.analyses(tiny_lm)
    for name, of_each in found.items():
        for i, (values, said) in enumerate(of_each):
            # Each has read its own devices' parts alone.
            of = {"in memory": tiny_lm.model, "streamed": tiny_lm.model.blocks}.get(name)
            assert said.pop("read", None) == (of and own_bytes(of, tiny_lm.mesh, i))
            assert said == notes
            expected = arrays if name == "streamed" else of_all
            assert set(values) == set(expected)
            for key, value in expected.items():
                # Effects are small differences of the metric.
                error = 1e-5 if key in ("patched", "estimated", "attribution", "router") else 1e-6
                assert relative_error(values[key], value) < error, (name, key)


@pytest.mark.slow
def test_files_of_two_processes(checkpoint, tiny_lm, tmp_path):
    """One writes, both know what is there; an error of one is told to the other."""
    lm = tiny_lm
    for i in range(2):
        (tmp_path / f"of {i}").mkdir()
    (tmp_path / "of 0" / "notes.txt").write_text("my notes\n")
    loaded = grokkit.load(checkpoint, lm.mesh, progress=False)  # a file knows its checkpoint
    alone = grokkit.batch(
        many_processes.PROMPTS, loaded, tmp_path / "alone.jsonl", **many_processes.BATCH
    )
    lines = (tmp_path / "alone.jsonl").read_bytes().splitlines(keepends=True)
    partial = tmp_path / "of 0" / "out.jsonl.partial"
    partial.write_bytes(b"".join([lines[4], lines[0], lines[1][:30]]))  # cut off
    for status, _, err in finish(run_two(tmp_path, [checkpoint] * 2, "files"), 500):
        assert status == 0, err
    notes = [load(tmp_path, "files", i)[1] for i in range(2)]

    first, second = (n["errors"] for n in notes)
    for errors in (first, second):
        for name, shown in [
            ("call", r"pass over tokens of \[\[.*\n.*pass over tokens of \[\[.*\n.*the same texts"),
            ("kinds", r"score of .*\n.*generate of \(\['The quick brown'\]"),
            ("seeds", r"seed=0.*\n.*seed=1"),
        ]:
            assert errors[name].startswith("ProcessError: the processes do not have the same call")
            assert re.search(shown, errors[name]), errors[name]
        assert errors["batch"].startswith("ProcessError: the processes do not have the same setti")
        assert errors["captures"].startswith(
            "ProcessError: the processes do not have the same capt"
        )
    assert first["file"].startswith("PromptError: ") and "written by grokkit" in first["file"]
    assert second["file"].startswith("ProcessError: process 0 of 2, on ")
    assert first["file"] in second["file"]
    assert second["unseen"].startswith("CaptureError: ")
    assert "choose a directory on a file system that every machine sees" in second["unseen"]
    assert second["unseen"] in first["unseen"]
    assert first["full"].startswith("CaptureError: ") and "a full disk after" in first["full"]
    assert second["full"].startswith("ProcessError: process 0 of 2, on ")

    for n in notes:
        assert n["batch"] == [c.text for c in alone]
    assert (tmp_path / "of 0" / "out.jsonl").read_bytes() == b"".join(lines)
    assert not partial.exists() and not list((tmp_path / "of 1").iterdir())

    expected = many_processes.capture(lm, tmp_path / "one")
    whole, resumed = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("whole", "resumed")
    )
    assert whole == resumed and len(whole) == 7
    assert {name: len(text) for name, text in whole.items() if name != "captures.json"} == {
        path.name: path.stat().st_size
        for path in (tmp_path / "one").iterdir() if path.name != "captures.json"
    }  # fmt: skip
    found = grokkit.open_captures(tmp_path / "whole")
    for name, value in expected.items():
        assert relative_error(found[name], value) < 1e-6, name
        assert notes[1]["shapes"][name] == list(np.shape(value))

    request = many_processes.REQUEST
    text = lm.generate(
        request.prompt, request.max_len, request.temperature, request.nucleus_p, request.rng_seed
    )
    for n in notes:
        assert n["runners"] == [
            [{"data": data, "model": 8 // data}, text, [text] * 3] for data in (1, 2)
        ]


@pytest.mark.slow
def test_another_checkpoint(checkpoint, other, tmp_path):
    for status, _, err in finish(run_two(tmp_path, [checkpoint, other]), PATIENCE):
        assert status == 1
        assert "ProcessError: the processes do not have the same checkpoint" in err
        assert "process 0 of 2, on " in err and "process 1 of 2, on " in err
        assert fingerprint(open_checkpoint(checkpoint))[:16] in err
        assert fingerprint(open_checkpoint(other))[:16] in err


@pytest.mark.slow
def test_no_checkpoint_in_one_of_them(checkpoint, tmp_path):
    first, second = finish(run_two(tmp_path, [checkpoint, tmp_path / "none"]), PATIENCE)
    assert first[0] == second[0] == 1
    assert "CheckpointError" in second[2] and "found: nothing" in second[2]
    assert "ProcessError: process 1 of 2, on " in first[2] and "found: nothing" in first[2]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_dies(checkpoint, tmp_path, killed):
    started = run_two(tmp_path, [checkpoint] * 2, "generate forever")
    for p in started:
        assert "ready\n" in iter(p.stdout.readline, "")
    time.sleep(5)
    started[killed].send_signal(signal.SIGKILL)
    before = time.monotonic()
    left = started[1 - killed]
    try:
        _, err = left.communicate(timeout=PATIENCE)
    finally:
        for p in started:
            p.kill()
            p.communicate()
    assert time.monotonic() - before < PATIENCE
    assert left.returncode != 0
    assert "another task died" in err  # as jax.distributed puts it


@pytest.mark.slow
@pytest.mark.parametrize("several", [False, True])
def test_the_command(checkpoint, several, tmp_path, capfd):
    """Of one text, which process 0 prints, and of a file of texts, which it alone writes."""
    names = ["alone", "0", "1"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "texts").write_text("The quick\nShe said\n" + "x" * 200 + "\n")

    def arguments(name):
        texts = ["--prompt", "The quick"]
        if several:
            folder = tmp_path / name
            texts = ["--prompts", str(folder / "texts"), "--out", str(folder / "out.jsonl")]
        return ["sample", str(checkpoint), *texts, "--max-len", "8", "--seed=4", "--no-progress"]

    assert cli.main(arguments("alone")) == 0
    expected = capfd.readouterr()
    together, environments = ["--virtual-devices", "4", "--processes"], [{}, {}]
    address = f"127.0.0.1:{free_port()}"
    of_each = [["2", "--coordinator", address, "--process", str(i)] for i in range(2)]
    if several:  # as SLURM starts them
        of_each = [["auto"], ["auto"]]
        job = free_slurm_job()
        environments = [slurm(i, job) for i in range(2)]
    started = start(
        (["-m", "grokkit.cli", *arguments(str(i)), *together, *of_each[i]] for i in range(2)),
        environments,
    )
    first, second = finish(started, 240)
    assert (first[0], second[0]) == (0, 0), (first, second)
    assert (first[1], second[1]) == (expected.out.replace("alone", "0"), "")
    if several:
        assert expected.err.startswith("grokkit: prompt 2: the prompt has ")
        assert expected.err in first[2] and expected.err not in second[2]
        alone, out = (tmp_path / name / "out.jsonl" for name in ("alone", "0"))
        assert out.read_bytes() == alone.read_bytes() and out.read_bytes().count(b"\n") == 3
        assert sorted(path.name for path in (tmp_path / "1").iterdir()) == ["texts"]


# Without other processes


@pytest.mark.parametrize(
    "environment, arguments, seen",
    [
        ({}, ("a:1", 2, 1), "all"),
        (slurm(1, "1", "1(x2)"), (), "all"),  # one on each machine, as docs/several-hosts.md has it
        (slurm(1, "1", "1(x2)"), ("a:1", 2, 1), "all"),
        (slurm(1, "1", "2"), (), "1"),
        (slurm(1, "1", "2"), ("a:1", 2, 1), "all"),
        (slurm(1, "1", "1(x2)") | {"JAX_LOCAL_DEVICE_IDS": "2,3"}, (), "2,3"),
    ],
)
def test_the_gpus_that_a_process_takes(environment, arguments, seen, monkeypatch):
    """JAX alone would take one wherever it finds SLURM, and leave the others idle."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jax._src.xla_bridge, "backends_are_initialized", lambda: False)
    monkeypatch.setattr(jax._src.distributed, "_jax", mock.MagicMock())
    monkeypatch.setattr(jax._src.distributed, "global_state", jax._src.distributed.State())
    try:
        processes.start(*arguments)
        assert jax._src.xla_bridge.CUDA_VISIBLE_DEVICES.value == seen
    finally:
        for name in ("cuda", "rocm"):
            jax.config.update(f"jax_{name}_visible_devices", "all")


def test_how_many_processes_a_machine_has():
    def of(tasks, node="0"):
        environment = {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": node}
        return processes._n_on_this_machine(environment)

    assert [of("2(x3),1", str(i)) for i in range(5)] == [2, 2, 2, 1, None]
    assert of("1") == of("1(x2)", "1") == 1 and of("") is None
    assert processes._n_on_this_machine({"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}) == 4
    assert processes._n_on_this_machine({}) is None


def test_alone():
    assert processes.is_first()
    assert not processes.spans_processes(grokkit.make_mesh(1, 8))
    found = grokkit.to_host({"a": grokkit.make_mesh(1, 1) and np.arange(3)})
    np.testing.assert_array_equal(found["a"], [0, 1, 2])
    assert processes.agree(lambda: (5, {}), together=False) == 5
    # With one process that takes part, all agree.
    assert processes.agree(lambda: (5, {"x": "y"}), together=True) == 5


def test_the_first_decides_alone():
    """As where there are no others."""
    for together in (False, True):
        assert processes.by_first(lambda: 5, together) == 5
        assert processes.share(lambda: {"layers": [1, 2]}, together) == {"layers": [1, 2]}
        np.testing.assert_array_equal(processes.from_first(np.arange(3), together), [0, 1, 2])
        with pytest.raises(ZeroDivisionError):
            processes.share(lambda: 1 / 0, together)


def test_what_processes_tell_each_other(monkeypatch):
    def told(*others):
        def exchange(mine):
            return [json.loads(json.dumps(mine)), *others]

        monkeypatch.setattr(processes, "_exchange", exchange)

    told({"host": "b", "error": None, "facts": {"dtype": "float32"}})
    assert processes.agree(lambda: (5, {"dtype": "float32"}), together=True) == 5
    with pytest.raises(ProcessError) as e:
        processes.agree(lambda: (5, {"dtype": "bfloat16"}), together=True)
    assert "the processes do not have the same dtype\n  process 0 of 2, on " in str(e.value)
    assert ": bfloat16\n  process 1 of 2, on b: float32\n  what to do: let" in str(e.value)
    with pytest.raises(ProcessError, match="do not have the same dtype"):
        processes.agree(lambda: (5, {}), together=True)  # where only the other names one
    told({"host": "b", "error": "ValueError: no", "facts": {}})
    with pytest.raises(ProcessError, match="^process 1 of 2, on b stopped: ValueError: no$"):
        processes.agree(lambda: (5, {"dtype": "bfloat16"}), together=True)

    def fail():
        raise OSError("mine")

    with pytest.raises(OSError, match="mine"):
        processes.agree(fail, together=True)


def test_fingerprints(checkpoint, other, tmp_path):
    same = fingerprint(open_checkpoint(checkpoint))
    assert same == fingerprint(open_checkpoint(checkpoint)) and len(same) == 64
    assert same != fingerprint(open_checkpoint(other))
    converted = grokkit.convert(checkpoint, Path(tmp_path) / "x", progress=False)
    assert fingerprint(converted) != same
    # A conversion's manifest knows every byte.
    manifest = converted.directory / "manifest.json"
    before, digest = fingerprint(converted), read_manifest(converted.directory).popitem()[1].sha256
    manifest.write_text(manifest.read_text().replace(digest, "0" * 64))
    assert fingerprint(converted) != before


def test_a_fingerprint_looks_at_places_all_over_an_array(tiny_config, tmp_path):
    config = dataclasses.replace(tiny_config, d_model=256, d_ff=1024)  # matrices of 1 MB
    save_params(random_model(config, 0), config, tmp_path / "a", progress=False)
    opened = open_checkpoint(tmp_path / "a")
    prints, wholes = {fingerprint(opened)}, {fingerprint(opened, whole=True)}
    span = max((entry.file.weight for entry in opened), key=lambda span: span.nbytes)
    path = next(entry.file.path for entry in opened if entry.file.weight == span)
    content = path.read_bytes()
    for place, n, seen in [
        (0, 1, True),
        (span.nbytes - 1, 1, True),  # the last byte
        (span.nbytes // 3, span.nbytes // 14, True),  # a hole anywhere
        (span.nbytes // 30, 1, False),  # one byte between two samples
    ]:
        changed = bytearray(content)
        at = span.offset + place
        changed[at : at + n] = bytes(b ^ 1 for b in changed[at : at + n])
        path.write_bytes(changed)
        new = fingerprint(opened)
        assert (new not in prints) == seen
        prints.add(new)
        new = fingerprint(opened, whole=True)
        assert new not in wholes
        wholes.add(new)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--coordinator", "a:1"], "need --processes"),
        (["--processes", "2"], "needs --coordinator HOST:PORT"),
        (["--processes", "auto", "--process", "1"], "leave them away"),
    ],
)
def test_processes_half_named(checkpoint, arguments, message, capsys):
    assert cli.main(["sample", str(checkpoint), *arguments]) == cli.BAD_INPUT
    assert message in capsys.readouterr().err
