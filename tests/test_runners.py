"""The original's script, unchanged but for its imports, sizes and paths; and its interface."""

import dataclasses
import html
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import grokkit
from grokkit.checkpoint import save_params
from grokkit.errors import ConfigError, PromptError
from grokkit.model import initialise
from grokkit.runners import (
    InferenceRunner,
    LanguageModelConfig,
    ModelRunner,
    QuantizedWeight8bit,
    Request,
    TransformerConfig,
    sample_from_model,
)

SEED = Path(__file__).parents[2] / "shared" / "seed"
PROMPT = "The answer to life the universe and everything is of course"
THEIR_IMPORTS = """from model import LanguageModelConfig, TransformerConfig, QuantizedWeight8bit as QW8Bit
from runners import InferenceRunner, ModelRunner, sample_from_model
"""
OUR_IMPORTS = """from grokkit.runners import LanguageModelConfig, TransformerConfig, QuantizedWeight8bit as QW8Bit
from grokkit.runners import InferenceRunner, ModelRunner, sample_from_model
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_config, tiny_tokenizer_file):
    """A random model that reads and writes text."""
    directory = tmp_path_factory.mktemp("runners") / "checkpoints"
    model = initialise(tiny_config, jax.random.key(3))
    save_params(model, tiny_config, directory, tiny_tokenizer_file, progress=False)
    return directory


def script() -> str:
    """run.py, out of the document that shows it."""
    if not SEED.is_dir():
        pytest.skip("the document with the original script is not beside the repository")
    document = next(SEED.iterdir()).read_text(encoding="utf-8")
    (code,) = re.findall(r"```\n(# Copyright 2024 X.AI Corp.*?)```", document, re.DOTALL)
    return html.unescape(code)


def replaced(text: str, old: str, new: str) -> str:
    """With one line's value changed."""
    found, n = re.subn(old, lambda _: new, text)
    assert n == 1, old
    return found


@pytest.mark.slow
def test_the_original_script_runs(checkpoint, tiny_config, tmp_path):
    code = script()
    assert THEIR_IMPORTS in code
    code = code.replace(THEIR_IMPORTS, OUR_IMPORTS)
    sizes = tiny_config.to_dict()
    sizes |= sizes.pop("model")
    for name in ("vocab_size", "sequence_len", "output_multiplier_scale", "num_layers", "key_size",
                 "embedding_multiplier_scale", "emb_size", "widening_factor", "num_q_heads",
                 "num_kv_heads", "attn_output_multiplier"):  # fmt: skip
        code = replaced(code, rf"\b{name}=[^,]+,", f"{name}={sizes[name]!r},")
    code = replaced(code, r'"\./checkpoints/"', repr(str(checkpoint)))
    code = replaced(code, r'"\./tokenizer\.model"', repr(str(checkpoint / "tokenizer.model")))
    code = replaced(code, r"pad_sizes=\(1024,\)", "pad_sizes=(64,)")
    code = replaced(code, r"max_len=100", "max_len=20")
    (tmp_path / "run.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.run(
        [sys.executable, "run.py"],
        check=False,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    mesh = grokkit.make_mesh(1, 8)
    lm = grokkit.load(checkpoint, mesh=mesh, dtype="bfloat16", progress=False)
    text = lm.generate(PROMPT, max_len=20, temperature=0.01, seed=42)
    assert len(text) > 5
    assert process.stdout == f"Output for prompt: {PROMPT} {text}\n"
    assert "loading" in process.stderr and "compiling: 100%" in process.stderr


# The interface


def model(config, **changes) -> LanguageModelConfig:
    sizes = config.to_dict()
    inner = {k: v for k, v in sizes.pop("model").items() if k not in ("attention_softcap",
             "rope_base", "norm_eps")}  # fmt: skip
    of = {k: changes.pop(k) for k in list(changes) if k in TransformerConfig.__dataclass_fields__
          and k != "vocab_size"}  # fmt: skip
    transformer = TransformerConfig(**inner | of)
    return LanguageModelConfig(
        **sizes | {"model": transformer, "fprop_dtype": jnp.float32} | changes
    )


def runner(config, checkpoint, bs_per_device=1, in_runner=None, in_model=None, **changes):
    options = {
        "pad_sizes": (32,), "name": "local", "load": str(checkpoint),
        "tokenizer_path": str(checkpoint / "tokenizer.model"), "local_mesh_config": (1, 2),
    } | changes  # fmt: skip
    model_runner = ModelRunner(
        **{"model": model(config, **(in_model or {})), "bs_per_device": bs_per_device,
           "checkpoint_path": str(checkpoint)} | (in_runner or {})
    )  # fmt: skip
    return InferenceRunner(runner=model_runner, **options)


@pytest.fixture(scope="module")
def server(tiny_config, checkpoint):
    inference_runner = runner(tiny_config, checkpoint)
    inference_runner.initialize()
    assert inference_runner.get_pad_bucket(3) == 32
    return inference_runner.run()


@pytest.fixture(scope="module")
def lm(checkpoint):
    mesh = grokkit.make_mesh(1, 2)
    return grokkit.load(checkpoint, mesh=mesh, dtype="float32", progress=False)


@pytest.mark.slow
def test_requests_are_answered_one_by_one_or_together(server, lm):
    with pytest.raises(TypeError, match="just-started generator"):
        server.send(Request("Two", 1.0, 1.0, 0, 3))
    assert next(server) is None
    assert server.batch.slots == 2
    text = sample_from_model(server, "Two and two", max_len=8, temperature=0.8)
    assert text == lm.generate("Two and two", max_len=8, temperature=0.8, seed=42)
    requests = [Request("Two and two", 0.8, 1.0, 42, n) for n in (8, 3, 5)]
    texts = server.send(requests)
    assert texts[0] == text and all(text.startswith(t) for t in texts)
    assert len(texts[1]) < len(texts[2]) < len(text)


def test_a_request_that_cannot_fit_leaves_the_server_running(server):
    next(server)
    with pytest.raises(PromptError, match="the largest of pad_sizes is 32"):
        server.send(Request("a " * 40, 1.0, 1.0, 0, 3))
    with pytest.raises(PromptError, match="do not fit in the context of 96"):
        server.send([Request("a", 1.0, 1.0, 0, 3), Request("a", 1.0, 1.0, 0, 96)])
    assert server.batch.idle
    assert server.send(Request("Two", 0.0, 1.0, 0, 3))


def test_an_interrupt_leaves_no_request_behind(server, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    next(server)
    with monkeypatch.context() as patch:
        patch.setattr("grokkit.batching.decode", interrupt)
        with pytest.raises(KeyboardInterrupt):
            server.send([Request("Two", 1.0, 1.0, 0, 5)] * 5)  # of which two have slots
    assert server.batch.idle
    assert server.send(Request("Two", 0.0, 1.0, 0, 3))


def test_a_closed_server_answers_no_more(tiny_config, lm):
    from grokkit.batching import ContinuousBatch
    from grokkit.runners import Server

    server = Server(ContinuousBatch(lm))
    server.close()
    with pytest.raises(StopIteration):
        next(server)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"load": "./elsewhere"}, "load: expected checkpoint_path, .*; found './elsewhere'"),
        ({"pad_sizes": (16, 1024)}, r"pad_sizes: expected lengths from 1 to sequence_len, 96"),
        ({"pad_sizes": ()}, "pad_sizes: expected lengths"),
        ({"local_mesh_config": (1, 16)}, "a mesh of data=1 x model=16 needs 16 devices, found 8"),
        ({"local_mesh_config": (8,)}, "local_mesh_config: expected two numbers of at least 1"),
        ({"between_hosts_config": (1, 2)}, r"between_hosts_config \(1, 2\) is for 2 processes"),
        ({"bs_per_device": 0.1}, "bs_per_device 0.1 on 2 devices makes 0 sequences"),
        ({"bs_per_device": 1.5, "local_mesh_config": (2, 1)}, "makes 3 sequences; .* 2 'data'"),
        ({"tokenizer_path": "/nowhere"}, "/nowhere: expected a SentencePiece model"),
        ({"in_runner": {"checkpoint_path": "", }, "load": ""}, "checkpoint_path: expected the dir"),
        ({"in_runner": {"load_rename_rules": [("a", "b")]}}, "load_rename_rules: expected None"),
        ({"in_runner": {"load_exclude_rules": ["a"]}}, "load_exclude_rules: expected None"),
        ({"in_model": {"num_experts": -1}}, "num_experts: expected 2 or more"),
        ({"in_model": {"num_experts": 1}}, "num_experts: expected 2 or more"),
        ({"in_model": {"capacity_factor": 2.0}}, "capacity_factor: expected 1.0"),
        ({"in_model": {"data_axis": "batch"}}, "data_axis: expected 'data'"),
        ({"in_model": {"model_axis": ("model", "data")}}, "model_axis: expected 'model'"),
        ({"in_model": {"model_size": 7}}, "model_size: expected 0 or emb_size, 32"),
        ({"in_model": {"model_type": "x"}}, "model_type: expected None"),
        ({"in_model": {"init_scale_override": 0.1}}, "init_scale_override: expected None"),
        ({"in_model": {"shard_embeddings": False}}, "shard_embeddings: expected True"),
        ({"in_model": {"fprop_dtype": jnp.float16}}, "fprop_dtype: expected float32 or bfloat16"),
        ({"in_model": {"pad_token": 5}}, "pad_token is 5, and .*config.json says 0"),
        ({"in_model": {"attn_output_multiplier": 0.1}}, "attention_multiplier is 0.1, and"),
        ({"in_model": {"model": None}}, "model: expected a TransformerConfig, found None"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused(changes, message, tiny_config, checkpoint):
    with pytest.raises(grokkit.GrokkitError, match=message):
        runner(tiny_config, checkpoint, **changes).initialize()


def test_options_that_change_nothing_are_named(tiny_config, checkpoint, caplog):
    caplog.set_level("INFO", "grokkit")
    runner(tiny_config, checkpoint).initialize()
    assert "no effect" not in caplog.text
    runner(tiny_config, checkpoint, in_runner={"rng_seed": 7, "transform_forward": True},
           in_model={"embedding_init_scale": 2.0, "init_scale": 3.0, "shard_activations": True},
           ).initialize()  # fmt: skip
    for option in ("ModelRunner: rng_seed=7", "ModelRunner: transform_forward=True",
                   "LanguageModelConfig: embedding_init_scale=2.0",
                   "TransformerConfig: init_scale=3.0",
                   "TransformerConfig: shard_activations=True"):  # fmt: skip
        assert f"{option} has no effect: " in caplog.text


def test_run_before_initialize(tiny_config, checkpoint):
    with pytest.raises(ConfigError, match="call initialize"):
        runner(tiny_config, checkpoint).run()


NEEDED = dataclasses.MISSING
ARGUMENTS = {
    TransformerConfig: {
        "emb_size": NEEDED, "key_size": NEEDED, "num_q_heads": NEEDED, "num_kv_heads": NEEDED,
        "num_layers": NEEDED, "vocab_size": 131072, "widening_factor": 4.0,
        "attn_output_multiplier": 1.0, "name": None, "num_experts": -1, "capacity_factor": 1.0,
        "num_selected_experts": 1, "init_scale": 1.0, "shard_activations": False,
        "data_axis": "data", "model_axis": "model",
    },
    LanguageModelConfig: {
        "model": NEEDED, "vocab_size": NEEDED, "pad_token": NEEDED, "eos_token": NEEDED,
        "sequence_len": NEEDED, "model_size": 0, "embedding_init_scale": 1.0,
        "embedding_multiplier_scale": 1.0, "output_multiplier_scale": 1.0, "name": None,
        "fprop_dtype": jnp.bfloat16, "model_type": None, "init_scale_override": None,
        "shard_embeddings": True,
    },
    ModelRunner: {
        "model": NEEDED, "bs_per_device": 2.0, "load_rename_rules": None,
        "load_exclude_rules": None, "rng_seed": 42, "transform_forward": False,
        "checkpoint_path": "",
    },
    InferenceRunner: {
        "name": NEEDED, "runner": NEEDED, "load": NEEDED,
        "tokenizer_path": "/tmp/xai_data/tokenizer.model", "local_mesh_config": (1, 1),
        "between_hosts_config": (1, 1), "pad_sizes": (1024,),
    },
    Request: dict.fromkeys(["prompt", "temperature", "nucleus_p", "rng_seed", "max_len"], NEEDED),
    QuantizedWeight8bit: dict.fromkeys(["weight", "scales"], NEEDED),
}  # fmt: skip
"""Of the original's classes, in their order, with their defaults."""


@pytest.mark.parametrize("kind", ARGUMENTS, ids=lambda kind: kind.__name__)
def test_arguments_and_defaults_are_the_originals_and_on_the_page(kind):
    found = [(f.name, f.default) for f in dataclasses.fields(kind)]
    assert found == [*ARGUMENTS[kind].items()]
    page = (Path(__file__).parents[1] / "docs" / "coming-from-the-original.md").read_text()
    assert f"`{kind.__name__}`" in page
    assert not [name for name, _ in found if f"`{name}`" not in page]


def test_what_samples_takes_the_originals_arguments():
    parameters = inspect.signature(sample_from_model).parameters.values()
    assert [p.name for p in parameters] == ["server", "prompt", "max_len", "temperature"]
    assert {p.default for p in parameters} == {inspect.Parameter.empty}


def test_quantised_weight_is_a_pytree():
    weight = QuantizedWeight8bit(jnp.ones((3, 4), jnp.int8), jnp.ones((1, 4), jnp.bfloat16))
    assert weight.shape == (3, 4)
    assert jax.tree.map(lambda a: a * 2, weight).weight.sum() == 24
