"""Two processes of four devices each do what one process of eight does, and end together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import many_processes
import numpy as np
import pytest
from helpers import random_model, relative_error

import grokkit
from grokkit import cli, processes
from grokkit.checkpoint import fingerprint, open_checkpoint, save_params
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
    return {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}


def start(arguments) -> list[subprocess.Popen]:
    """A process for each list of arguments."""
    return [
        subprocess.Popen([sys.executable, *a], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         text=True, env=environment())
        for a in arguments
    ]  # fmt: skip


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


@pytest.mark.slow
@pytest.mark.parametrize("task", ["some", pytest.param("more", marks=pytest.mark.slow)])
def test_two_processes_are_one(checkpoint, tiny_lm, task, tmp_path):
    for status, _, err in finish(run_two(tmp_path, [checkpoint] * 2, task), 300):
        assert status == 0, err
    prompt = many_processes.PROMPT
    wanted = ["logits", "pattern", "resid_post"]
    texts, fed = tiny_lm.generate_with_cache(prompt, wanted, 12, seed=5)
    expected, said = dict(fed.items()), {"texts": texts}
    if task == "more":
        logits, cache = tiny_lm.run_with_cache(prompt, ["z", "router_probs"])
        edited = tiny_lm(prompt, edits=[grokkit.ForbidExperts([0, 1])]).logits
        expected |= {"edited": edited, "forward": logits, **dict(cache.items())}
        said |= {"two": tiny_lm.generate([prompt, "She said"], 12, 0.8, 0.9, seed=3)}
        said |= {"stream": "".join(t.text for t in tiny_lm.stream(prompt, 8, seed=2))}
    for i in range(2):
        with np.load(tmp_path / f"{i}.npz") as found:
            assert set(found) == set(expected)
            for name, value in expected.items():
                assert relative_error(found[name], value) < 1e-6, name
        notes = json.loads((tmp_path / f"{i}.json").read_text())
        # Only its own four devices' parts, and what they all hold only once.
        mine = set(tiny_lm.mesh.devices.flat[4 * i : 4 * i + 4])
        parts = {
            (n, str(s.index)): s.data.nbytes
            for n, leaf in enumerate(jax.tree.leaves(tiny_lm.model))
            for s in leaf.addressable_shards
            if s.device in mine
        }
        assert notes.pop("read") == sum(parts.values())
        assert notes == said


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
def test_the_command(checkpoint, capfd):
    arguments = ["sample", str(checkpoint), "--prompt", "The quick", "--max-len", "8", "--seed=4",
                 "--no-progress"]  # fmt: skip
    assert cli.main(arguments) == 0
    expected = capfd.readouterr().out
    port = free_port()
    together = ["--virtual-devices", "4", "--processes", "2", "--coordinator", f"127.0.0.1:{port}"]
    started = start(
        ["-m", "grokkit.cli", *arguments, *together, "--process", str(i)] for i in range(2)
    )
    first, second = finish(started, 240)
    assert (first[0], second[0]) == (0, 0), (first, second)
    assert (first[1], second[1]) == (expected, "")


# Without other processes


def test_alone():
    assert processes.is_first()
    assert not processes.spans_processes(grokkit.make_mesh(1, 8))
    found = grokkit.to_host({"a": grokkit.make_mesh(1, 1) and np.arange(3)})
    np.testing.assert_array_equal(found["a"], [0, 1, 2])
    assert processes.agree(lambda: (5, {}), together=False) == 5
    # With one process that takes part, all agree.
    assert processes.agree(lambda: (5, {"x": "y"}), together=True) == 5


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
    assert ": bfloat16\n  process 1 of 2, on b: float32\n  what to do: give" in str(e.value)
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
