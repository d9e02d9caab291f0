"""Many prompts into a file: none lost, none repeated, whatever interrupts."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

import grokkit
from grokkit import cli
from grokkit.batch_run import Record, read_prompts
from grokkit.checkpoint import save_params
from grokkit.errors import PromptError
from grokkit.language_model import LanguageModel
from grokkit.model import initialise
from grokkit.sampling import Sampling

PROMPTS = [f"{i} and two make" for i in range(40)] + ["x" * 200]  # the last does not fit
SETTINGS = {"max_len": 24, "temperature": 1.2, "top_p": 0.95, "seed": 5, "slots": 2}
OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("batch")


@pytest.fixture(scope="module")
def checkpoint(directory, tiny_config, tiny_tokenizer_file):
    """A random model that reads and writes text."""
    model = initialise(tiny_config, jax.random.key(0))
    save_params(model, tiny_config, directory / "random", tiny_tokenizer_file, progress=False)
    return directory / "random"


@pytest.fixture(scope="module")
def lm(checkpoint):
    return grokkit.load(checkpoint, mesh=grokkit.make_mesh(1, 1), progress=False)


@pytest.fixture(scope="module")
def whole(lm):
    """What one run without interrupt gives."""
    return grokkit.batch(PROMPTS, lm, progress=False, **SETTINGS)


def test_each_prompt_gets_the_text_that_generate_gives(lm, whole):
    settings = {k: v for k, v in SETTINGS.items() if k != "slots"}
    alone = lm.generate(PROMPTS[:4], **settings)
    assert [c.text for c in whole[:4]] == alone
    assert [c.index for c in whole] == list(range(41))
    assert [c.prompt for c in whole] == PROMPTS
    assert [c.seed for c in whole] == list(range(5, 46))
    assert {c.finish_reason for c in whole[:-1]} <= {"length", "end"}
    last = whole[-1]
    assert (last.finish_reason, last.text) == ("refused", "")
    assert "do not fit in the context of 96" in last.error


def run_until(lines, signal_number, command, partial):
    """Start a run, and end it with a signal when its file has so many lines."""
    cache = {"GROKKIT_COMPILATION_CACHE": str(partial.parent / "compiled")}
    before = partial.read_bytes() if partial.exists() else b""
    with subprocess.Popen(
        command, env=os.environ | cache, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        while process.poll() is None:
            if partial.exists() and partial.read_bytes().count(b"\n") >= lines:
                process.send_signal(signal_number)
                break
            time.sleep(0.002)
        process.wait(timeout=60)
    found = partial.read_bytes()
    assert found.startswith(before) and found.count(b"\n") >= lines
    return process.returncode


@pytest.mark.slow
def test_interrupts_neither_repeat_nor_lose_a_prompt(
    directory, checkpoint, whole, capsys, monkeypatch
):
    prompts, out = directory / "prompts.txt", directory / "out.jsonl"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    partial = directory / "out.jsonl.partial"
    arguments = ["sample", str(checkpoint), "--prompts", str(prompts), "--out", str(out),
                 "--mesh=1,1", *OPTIONS]  # fmt: skip
    command = [sys.executable, "-m", "grokkit.cli", *arguments]
    assert run_until(3, signal.SIGINT, command, partial) == 130
    assert not out.exists()
    assert run_until(12, signal.SIGKILL, command, partial) == -9
    with partial.open("ab") as file:
        file.write(b'{"index": 3, "prom')  # a line that was cut short
    n_done = partial.read_bytes().count(b"\n")
    assert 12 <= n_done < 41
    assert cli.main(arguments) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{out}: 40 of 41 texts\n"
    assert "grokkit: prompt 40: the prompt has" in printed.err
    assert f"{n_done}/41" in printed.err and "41/41" in printed.err
    assert not partial.exists()
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["index"] for r in records] == list(range(41))
    assert [r["text"] for r in records] == [c.text for c in whole]
    # All is there: nothing is loaded or run again.
    before = out.read_bytes()
    monkeypatch.setattr("grokkit.batch_run.load", None)
    assert grokkit.batch(PROMPTS, checkpoint, out, progress=False, **SETTINGS) == whole
    assert out.read_bytes() == before and not partial.exists()


def test_files_of_other_prompts_models_or_settings_are_left_alone(lm, checkpoint, tmp_path):
    out = tmp_path / "out.jsonl"
    settings = {"max_len": 2, "slots": 2, "progress": False}
    grokkit.batch(["Two"], lm, out, **settings)
    before = out.read_bytes()
    for prompts, changes, message in [
        (
            ["Three"],
            {},
            "line 1: expected a completion of one of these 1 prompts, found one of 'Two'",
        ),
        (["Two"], {"max_len": 3}, "line 1: these completions were made with other settings"),
        (["Two"], {"allowed": [5]}, "line 1: these completions were made with other settings"),
    ]:
        with pytest.raises(PromptError, match=message):
            grokkit.batch(prompts, lm, out, **settings | changes)
        assert out.read_bytes() == before
    other_dtype = grokkit.load(checkpoint, lm.mesh, "bfloat16", progress=False)
    named = LanguageModel(lm.model, lm.mesh, lm.tokenizer, "of unknown weights")
    for other in (other_dtype, named):
        with pytest.raises(PromptError, match="line 1: .* made by another model, or in another"):
            grokkit.batch(["Two", "Three"], other, out, **settings)
    streamed = grokkit.load(checkpoint, lm.mesh, progress=False, stream=True)
    assert grokkit.batch(["Two"], streamed, out, **settings)[0].text
    assert out.read_bytes() == before
    more = grokkit.batch(["Two", "Three"], lm, out, **settings)
    assert [c.prompt for c in more] == ["Two", "Three"]
    assert out.read_text().count("\n") == 2
    other = tmp_path / "notes.txt"
    other.write_text("my notes\n")
    with pytest.raises(PromptError, match="notes.txt, line 1: expected a completion written by"):
        grokkit.batch(["Two"], lm, other, **settings)
    assert other.read_text() == "my notes\n"


def test_two_that_write_to_one_file(lm, tmp_path, monkeypatch):
    """The second is refused while the first is at it; a lock that was left is in nobody's way."""
    out, add = tmp_path / "out.jsonl", Record.add
    settings = {"max_len": 2, "slots": 2, "progress": False}
    (tmp_path / ".out.jsonl.lock").write_text("process 1 on another host")
    refused = []

    def meanwhile(*arguments):
        with pytest.raises(PromptError, match=rf"out.jsonl: process {os.getpid()} on .* writing"):
            grokkit.batch(["Two", "Three"], lm, out, **settings)
        refused.append(arguments)
        add(*arguments)

    monkeypatch.setattr(Record, "add", meanwhile)
    grokkit.batch(["Two", "Three"], lm, out, **settings)
    assert len(refused) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize(
    "prompts, changes, message",
    [
        ([], {}, "prompts: expected a list of texts, at least one"),
        (["a"], {"out": "/nowhere/at/all.jsonl"}, "expected the name of a file in a directory"),
        (["a"], {"temperature": -1.0}, "temperature must be 0 or more"),
        (["a"], {"slots": 0}, "slots must divide"),
    ],
)
def test_what_cannot_be_honoured_is_refused(prompts, changes, message, lm):
    with pytest.raises(PromptError, match=message):
        grokkit.batch(prompts, lm, progress=False, **changes)


def test_prompts_from_files(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("one\r\n\n two \n", newline="")
    assert read_prompts(path) == ["one", " two "]
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('"a\\nb"\n{"prompt": "c", "id": 3}\n')
    assert read_prompts(lines) == ["a\nb", "c"]
    path.write_text("one\ntwo\n", encoding="utf-8-sig")
    assert read_prompts(path) == ["one", "two"]
    lines.write_text('"a"\n{"text": "c"}\n')
    with pytest.raises(PromptError, match="prompts.jsonl, line 2: expected JSON, a string or an"):
        read_prompts(lines)
    path.write_text("\n")
    with pytest.raises(PromptError, match="expected prompts, one a line, found none"):
        read_prompts(path)
    with pytest.raises(PromptError, match="nothing.txt: expected a text file of prompts"):
        read_prompts(tmp_path / "nothing.txt")


def test_a_record_is_one_line_whatever_the_text_holds(tmp_path):
    from grokkit.batch_run import Completion

    prompts = ["a\nb\u2028", "\ud800"]
    record = Record(tmp_path / "out.jsonl", prompts, Sampling(), 3, [], "model")
    completion = Completion(0, prompts[0], "c\n\u2028", "length", 3, 0)
    record.add(completion)
    assert record.partial.read_bytes().count(b"\n") == 1
    half = Completion(1, prompts[1], "", "refused", 0, 1, "half of a pair")
    record.add(half)
    assert record.read() == {0: completion, 1: half}


def test_a_prompt_that_is_no_text_is_refused_and_the_rest_go_on(lm, tmp_path):
    lines, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    lines.write_text('"Two \\ud83d"\n"Two"\n"Three"\n')
    prompts = read_prompts(lines)
    settings = {"max_len": 3, "slots": 1, "progress": False}
    found = grokkit.batch(prompts, lm, out, **settings)
    assert [c.finish_reason for c in found] == ["refused", "length", "length"]
    assert "half of a surrogate pair" in found[0].error
    assert grokkit.batch(prompts, lm, out, **settings) == found


def test_the_same_prompt_twice(lm, tmp_path):
    """Each has a line of its own, and a seed, also when only one of them is done."""
    out = tmp_path / "out.jsonl"
    settings = {"max_len": 5, "slots": 1, "progress": False, "temperature": 3.0}
    found = grokkit.batch(["Two", "Two", "Two"], lm, out, **settings)
    assert len({c.text for c in found}) == 3
    lines = out.read_bytes().splitlines(keepends=True)
    out.rename(out.with_name("out.jsonl.partial"))
    out.with_name("out.jsonl.partial").write_bytes(lines[1] + lines[2][:-9])
    assert grokkit.batch(["Two", "Two", "Two"], lm, out, **settings) == found
    assert out.read_bytes() == b"".join(lines)


def test_a_full_disk_is_said_and_spoils_nothing(lm, tmp_path, monkeypatch):
    """A line of which only a part was written is cut off again, and its prompt run again."""
    out = tmp_path / "out.jsonl"
    settings = {"max_len": 4, "slots": 1, "progress": False}
    prompts = ["One", "Two", "Three"]
    opened, room = Path.open, [250]

    class Disk(io.FileIO):
        def write(self, data):
            if not room[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            n = super().write(data[: min(room[0], 100)])
            room[0] -= n
            return n

    def limited(path, *arguments, **options):
        if path.name.endswith(".partial") and options.get("buffering") == 0:
            return Disk(path, "a")
        return opened(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", limited)
        with pytest.raises(PromptError, match="out.jsonl: .*No space left .* goes on from there"):
            grokkit.batch(prompts, lm, out, **settings)
    partial = out.with_name("out.jsonl.partial").read_bytes()
    assert len(partial) == 250 and partial.count(b"\n") == 1
    found = grokkit.batch(prompts, lm, out, **settings)
    assert found == grokkit.batch(prompts, lm, **settings)
    assert out.read_bytes().startswith(partial[: partial.index(b"\n") + 1])
