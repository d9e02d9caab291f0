import argparse
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import grokkit
from grokkit import cli
from grokkit.checkpoint import save_params
from grokkit.model import initialise

PROMPT = "The answer"
SAMPLE_OPTIONS = [
    "--prompt", "--prompts", "--out", "--slots", "--max-len", "--temperature", "--top-p", "--top-k", "--min-p",
    "--repetition-penalty", "--allowed", "--seed", "--mesh", "--dtype",
    "--virtual-devices", "--no-progress",
    "--processes", "--process", "--coordinator", "--stream",
]  # fmt: skip
PLAN_OPTIONS = [
    "--config", "--checkpoint", "--mesh", "--context", "--batch", "--capture", "--dtype",
    "--device-memory",
]  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_config, tiny_tokenizer_file):
    """A random model that reads and writes text."""
    directory = tmp_path_factory.mktemp("cli") / "random"
    model = initialise(tiny_config, jax.random.key(0))
    save_params(model, tiny_config, directory, tiny_tokenizer_file, progress=False)
    return directory


def run(capsys, *arguments):
    """Exit status and what was printed on stdout and stderr."""
    try:
        status = cli.main([str(a) for a in arguments])
    except SystemExit as exit:  # argparse's
        status = exit.code
    printed = capsys.readouterr()
    return status, printed.out, printed.err


@pytest.mark.parametrize(
    "command, options",
    [
        ("sample", SAMPLE_OPTIONS),
        ("inspect", ["--mesh", "--check", "--no-progress"]),
        ("plan", PLAN_OPTIONS),
    ],
)
def test_help_documents_each_option(capsys, command, options):
    status, out, _ = run(capsys, command, "--help")
    assert status == 0
    assert all(f"  {option}" in out for option in options)
    (commands,) = (
        a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction)
    )  # fmt: skip
    actions = commands.choices[command]._actions
    assert {s for a in actions for s in a.option_strings} == {"-h", "--help", *options}
    assert all(action.help for action in actions)


def test_version(capsys):
    assert run(capsys, "--version")[:2] == (0, f"grokkit {grokkit.__version__}\n")


def test_sample_prints_the_prompt_and_what_generate_gives(capsys, checkpoint):
    settings = {"max_len": 6, "temperature": 0.8, "top_p": 0.9, "seed": 1, "top_k": 40}
    settings |= {"min_p": 0.01, "repetition_penalty": 1.1}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    settings["allowed"] = list(range(4, 300, 2))
    options.append(f"--allowed={','.join(map(str, settings['allowed']))}")
    status, out, err = run(capsys, "sample", checkpoint, "--prompt", PROMPT, *options)
    lm = grokkit.load(checkpoint, progress=False)
    assert (status, out) == (0, f"{PROMPT}{lm.generate(PROMPT, **settings)}\n")
    assert "loading random: 100%" in err


@pytest.mark.parametrize(
    ("terminal", "shown"),
    [(True, "a\\x1b[2J\\r\t\\x9bé\n\\x00"), (False, "a\x1b[2J\r\t\x9bé\n\x00")],
)
def test_control_characters_do_not_reach_a_terminal(
    terminal, shown, capsys, checkpoint, monkeypatch
):
    pieces = [SimpleNamespace(text=text) for text in ("a\x1b[2J", "\r\t\x9bé", "\n\x00")]
    monkeypatch.setattr(grokkit.LanguageModel, "stream", lambda *_, **__: iter(pieces))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    status, out, _ = run(capsys, "sample", checkpoint, "--prompt", PROMPT, "--max-len=6")
    assert (status, out) == (0, f"{PROMPT}{shown}\n")


def test_sample_on_a_mesh_without_progress(capsys, checkpoint, monkeypatch):
    loaded = []
    load = grokkit.load
    monkeypatch.setattr(grokkit, "load", lambda *a, **k: loaded.append(load(*a, **k)) or loaded[0])
    arguments = ("sample", checkpoint, "--prompt", PROMPT, "--max-len=1", "--no-progress")
    status, out, err = run(capsys, *arguments, "--dtype=bfloat16", "--mesh=1,4")
    assert (status, err) == (0, "")
    (lm,) = loaded
    assert dict(lm.mesh.shape) == {"data": 1, "model": 4}
    assert lm.model.dtype == jnp.bfloat16
    assert out == f"{PROMPT}{lm.generate(PROMPT, 1, 0.7, 0.95)}\n"


@pytest.mark.parametrize(
    "options, said",
    [
        (["--temperature=-1"], "temperature must be 0 or more, found -1.0"),
        (["--temperature=nan"], "temperature must be 0 or more, found nan"),
        (["--top-p=0"], "top_p must be above 0 and at most 1, found 0.0"),
        (["--top-p=1.5"], "top_p must be above 0 and at most 1, found 1.5"),
        (["--top-k=-1"], "top_k must be an integer, 0 or more, found -1"),
        (["--min-p=2"], "min_p must be from 0 to 1, found 2.0"),
        (["--repetition-penalty=0"], "repetition_penalty must be above 0, found 0.0"),
        (["--allowed=5,999"], "allowed holds token id 999"),
        (["--allowed=five"], "expected token ids with commas between, as in 5,7,9; found 'five'"),
        (["--seed=-1"], "seed must be an integer from 0 to 2**32 - 1, found -1"),
        (["--max-len=0"], "--max-len must be at least 1, found 0"),
        (["--max-len=1000"], "do not fit in the context of 96"),
        (["--prompt="], "prompt 0 is empty"),
        (["--out=here.jsonl"], "--prompts FILE and --out FILE.jsonl go together"),
        (["--mesh=2,4"], "there is one prompt; use --mesh 1,4"),
        (["--mesh=1,3"], "do not divide over the mesh's 3 'model' devices"),
        (["--mesh=1,16"], "needs 16 devices, found 8; on a CPU, add --virtual-devices 16"),
        (["--mesh=8"], "expected two numbers of devices, at least 1 each, as in 1,8; found '8'"),
        (
            ["--mesh=0,8"],
            "expected two numbers of devices, at least 1 each, as in 1,8; found '0,8'",
        ),
        (["--dtype=float16"], "invalid choice: 'float16'"),
        (["--virtual-devices=4"], "JAX has already started, with 8 device(s)"),
    ],
)
def test_bad_requests_are_refused_before_the_weights_are_loaded(
    capsys, checkpoint, monkeypatch, options, said
):
    jax.devices()
    monkeypatch.setattr(grokkit, "load", lambda *_, **__: pytest.fail("loaded the weights"))
    status, out, err = run(capsys, "sample", checkpoint, "--prompt", PROMPT, *options)
    assert (status, out) == (2, "")
    assert said in err


def test_sample_needs_a_tokenizer(capsys, golden_dir):
    status, out, err = run(capsys, "sample", golden_dir)
    assert (status, out) == (2, "")
    assert "expected a tokenizer.model beside ckpt-0/, found none" in err


@pytest.mark.parametrize("command", ["sample", "inspect"])
def test_no_checkpoint(capsys, tmp_path, command):
    status, out, err = run(capsys, command, tmp_path / "nothing")
    assert (status, out) == (2, "")
    assert err.startswith("grokkit: ") and "expected: a checkpoint directory" in err


def test_inspect_shows_the_checkpoint(capsys, golden_dir):
    status, out, err = run(capsys, "inspect", golden_dir)
    assert (status, err) == (0, "")
    row = next(line for line in out.splitlines() if "layer_0/moe/linear_1/w " in line)
    lm = grokkit.load(golden_dir, mesh=grokkit.make_mesh(1, 8), progress=False)
    weight = lm.model.blocks.moe.out.weight[0]
    local = weight.addressable_shards[0].data.shape
    assert row.split("  ")[0] == "transformer/decoder_layer_0/moe/linear_1/w"
    # As in the file, [k, n]; the model holds it [n, k].
    for *lead, n, k in (weight.shape, local):
        shown = (*lead, k, n)
        assert " x ".join(map(str, shown)) in row
    assert "int8" in row and f" {weight.nbytes:,} " in row and row.endswith("d_ff cut in 8")


def test_inspect_check(capsys, golden_dir, tmp_path, tiny_config):
    status, out, err = run(capsys, "inspect", golden_dir, "--check")
    assert status == 0 and out.endswith("every float value is finite\n")
    assert "100%" in err

    model = initialise(tiny_config, jax.random.key(0))
    model = eqx.tree_at(
        lambda m: m.final_norm.scale, model, replace_fn=lambda s: s.at[3].set(jnp.nan)
    )
    save_params(model, tiny_config, tmp_path / "nan", progress=False)
    assert run(capsys, "inspect", tmp_path / "nan")[0] == 0
    status, _, err = run(capsys, "inspect", tmp_path / "nan", "--check", "--no-progress")
    assert status == 2
    assert "language_model/rms_norm/scale): 1 in its weight, the first at [3]" in err


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "grokkit.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONWARNINGS": "error"},
    )


def test_interrupt_ends_at_once_and_quietly(checkpoint):
    files = sorted(checkpoint.rglob("*"))
    with start(
        "sample", checkpoint, "--prompt", PROMPT, "--max-len=80", "--no-progress"
    ) as process:
        begun = process.stdout.read(len(PROMPT))  # it then compiles
        assert begun == PROMPT.encode(), process.stderr.read().decode()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert process.stderr.read() == b"\n"
    assert sorted(checkpoint.rglob("*")) == files


def test_reader_that_goes_away(golden_dir):
    with start("inspect", golden_dir) as process:
        process.stdout.close()
        assert process.wait(timeout=60) == 141
        assert process.stderr.read() == b""
