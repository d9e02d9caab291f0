"""Writing a whole checkpoint: the golden one comes back, and nothing half-written stays."""

import dataclasses
import filecmp
import stat

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grokkit.checkpoint import load_params, open_checkpoint, save_params, saving
from grokkit.config import GrokConfig
from grokkit.errors import CheckpointError
from grokkit.model import param_specs
from grokkit.quant import dequantize
from grokkit.sharding import is_spec, make_mesh


@pytest.fixture(scope="module")
def config(golden) -> GrokConfig:
    return GrokConfig.from_json(golden / "config.json")


@pytest.fixture(scope="module")
def params(golden, config):
    return load_params(open_checkpoint(golden), param_specs(config), make_mesh(1, 8), False)


def assert_golden(directory, golden) -> None:
    names = [path.name for path in (golden / "ckpt-0").iterdir()]
    match, mismatch, errors = filecmp.cmpfiles(
        golden / "ckpt-0", directory / "ckpt-0", names, shallow=False
    )
    assert (len(match), mismatch, errors) == (146, [], [])
    assert sorted(p.name for p in (directory / "ckpt-0").iterdir()) == sorted(names)


@pytest.mark.parametrize("mesh", [(1, 1), (2, 4)])
def test_golden_comes_back_from_a_mesh(golden, config, mesh, tmp_path):
    params = load_params(open_checkpoint(golden), param_specs(config), make_mesh(*mesh), False)
    save_params(params, config, tmp_path / "saved", progress=False)
    assert_golden(tmp_path / "saved", golden)
    assert GrokConfig.from_json(tmp_path / "saved" / "config.json") == config
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def test_golden_comes_back_from_numpy(golden, params, config, tmp_path):
    save_params(jax.tree.map(np.asarray, params), config, tmp_path / "saved", progress=False)
    assert_golden(tmp_path / "saved", golden)


def test_layers_split_over_devices(golden, params, config, tmp_path):
    """Any layout will do, also one that cuts the layer axis."""
    mesh = jax.make_mesh((4,), ("x",), devices=jax.devices()[:4])
    spec = jax.sharding.PartitionSpec("x")
    sharding = jax.sharding.NamedSharding(mesh, spec)
    blocks = jax.tree.map(
        lambda x: jax.device_put(np.asarray(x), sharding) if x.shape[0] == 12 else x, params.blocks
    )
    params = eqx.tree_at(lambda m: m.blocks, params, blocks)
    save_params(params, config, tmp_path / "saved", progress=False)
    assert_golden(tmp_path / "saved", golden)


def test_another_model_round_trips(tmp_path):
    config = GrokConfig(
        vocab_size=96, d_model=32, n_layers=11, n_heads=8, n_kv_heads=8, d_head=4, d_ff=24
    )
    rng = np.random.default_rng(0)
    model = jax.tree.map(
        lambda spec: rng.integers(-127, 128, spec.shape).astype(spec.dtype),
        param_specs(config),
        is_leaf=is_spec,
    )
    save_params(model, config, tmp_path / "saved", progress=False)
    checkpoint = open_checkpoint(tmp_path / "saved")
    assert checkpoint.config == config
    loaded = load_params(checkpoint, param_specs(config), make_mesh(1, 2), False)
    assert eqx.tree_equal(model, jax.tree.map(np.asarray, loaded))


def test_tokenizer_and_empty_directory(params, config, tmp_path):
    (tmp_path / "some.model").write_bytes(b"pieces")
    target = tmp_path / "saved"
    target.mkdir()
    save_params(params, config, target, tokenizer=tmp_path / "some.model", progress=False)
    assert (target / "tokenizer.model").read_bytes() == b"pieces"
    assert open_checkpoint(target).tokenizer_file == target / "tokenizer.model"


def test_progress_in_bytes(params, config, tmp_path, capsys):
    save_params(params, config, tmp_path / "saved")
    err = capsys.readouterr().err
    assert "saving saved" in err and "2.20M/2.20M" in err


def test_files_are_readable_as_others_are(params, config, tmp_path):
    (tmp_path / "plain").touch()
    save_params(params, config, tmp_path / "saved", progress=False)
    mode = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert stat.S_IMODE((tmp_path / "saved/ckpt-0/tensor00000_000").stat().st_mode) == mode


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("exists", [True, False])
def test_interrupted_saving_leaves_nothing(params, config, error, exists, tmp_path, monkeypatch):
    calls = []

    def interrupted(path, *arrays):
        calls.append(path)
        if len(calls) == 20:
            raise error
        write(path, *arrays)

    write = saving.write_tensor
    monkeypatch.setattr(saving, "write_tensor", interrupted)
    if exists:
        (tmp_path / "saved").mkdir()
    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        save_params(params, config, tmp_path / "saved", progress=False)
    assert len(calls) == 20
    left = [path.relative_to(tmp_path) for path in tmp_path.rglob("*")]
    assert [str(path) for path in left] == (["saved"] if exists else [])


def refused(params, config, directory, *messages: str, **options) -> None:
    before = sorted(directory.parent.rglob("*"))
    with pytest.raises(CheckpointError) as e:
        save_params(params, config, directory, progress=False, **options)
    for message in messages:
        assert message in str(e.value)
    assert sorted(directory.parent.rglob("*")) == before


def test_targets_that_are_taken(params, config, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    refused(params, config, tmp_path / "full", "found: 1 entries in it", "choose another name")
    refused(params, config, tmp_path / "full" / "notes", "found: a file")
    refused(params, config, tmp_path / "no" / "where", "found: none\n", "create it first")
    refused(
        params, config, tmp_path / "new", "expected: a SentencePiece file", tokenizer="no.model"
    )


def test_parameters_that_do_not_fit(params, config, tmp_path):
    target = tmp_path / "new"
    other = dataclasses.replace(config, vocab_size=300)
    refused(
        params,
        other,
        target,
        "embedding.weight\n  expected: float32 of shape (300, 64)\n"
        "  found: float32 of shape (256, 64)\n",
        "pass the configuration that the parameters were made with",
    )
    refused(
        params,
        dataclasses.replace(config, n_layers=11),
        target,
        "expected: int8 of shape (11, 8, 88, 64)\n  found: int8 of shape (12, 8, 88, 64)",
    )
    halved = eqx.tree_at(
        lambda m: m.embedding.weight, params, params.embedding.weight.astype(jnp.bfloat16)
    )
    refused(halved, config, target, "found: bfloat16 of shape (256, 64)")
    floats = eqx.tree_at(lambda m: m.blocks.moe.out, params, dequantize(params.blocks.moe.out))
    refused(
        floats,
        config,
        target,
        "blocks.moe.out\n  expected: a QuantizedArray",
        "quantise with grokkit.quant.quantize(w, groups=8)",
    )
    quantised = eqx.tree_at(lambda m: m.blocks.moe.router, params, params.blocks.attention.key)
    refused(quantised, config, target, "expected: a plain float32[64, 8]", "dequantise it first")
    refused(params.blocks, config, target, "found: Block without attribute 'embedding'")
