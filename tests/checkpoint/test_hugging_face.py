"""Ports to Hugging Face transformers: a small one is written here, as torch lays matrices out."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from helpers import relative_error
from safetensors.numpy import load_file, save_file

import grokkit
from grokkit.checkpoint import convert, open_checkpoint
from grokkit.errors import CheckpointError, ConfigError
from grokkit.runners import LanguageModelConfig, ModelRunner, TransformerConfig

# As in hpcai-tech/grok-1's config.json.
CONFIG = {
    "architectures": ["Grok1ModelForCausalLM"],
    "model_type": "grok-1",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 8,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "max_attn_value": 30.0,
    "rms_norm_eps": 1e-05,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
NAMES = {
    "language_model/in_out_embed/embeddings": "model.embed_tokens.weight",
    "language_model/rms_norm/scale": "model.norm.scale",
}
IN_LAYER = {
    "multi_head_attention/query/w": "attn.q_proj.weight",
    "multi_head_attention/key/w": "attn.k_proj.weight",
    "multi_head_attention/value/w": "attn.v_proj.weight",
    "multi_head_attention/linear/w": "attn.o_proj.weight",
    "rms_norm/scale": "pre_attn_norm.scale",
    "rms_norm_1/scale": "post_attn_norm.scale",
    "rms_norm_2/scale": "pre_moe_norm.scale",
    "rms_norm_3/scale": "post_moe_norm.scale",
    "router/w": "moe_block.gate.weight",
}
EXPERTS = {"moe/linear/w": "linear", "moe/linear_v/w": "linear_v", "moe/linear_1/w": "linear_1"}


def torch_tensors(weights) -> dict[str, np.ndarray]:
    """A port's tensors from the original's weights: linear layers as [out, in], experts apart."""
    tensors = {}
    for name, w in weights.items():
        layer = re.match(r"transformer/decoder_layer_(\d+)/(.*)", name)
        if layer is None:
            tensors[NAMES[name]] = w
            continue
        prefix = f"model.layers.{layer[1]}"
        if layer[2] in EXPERTS:
            for e, matrix in enumerate(w):
                tensors[f"{prefix}.moe_block.experts.{e}.{EXPERTS[layer[2]]}.weight"] = matrix.T
        else:
            tensors[f"{prefix}.{IN_LAYER[layer[2]]}"] = w.T if w.ndim == 2 else w
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    return tensors


def write_port(directory, weights, config, dtype, n_files=3):
    directory.mkdir()
    tensors = torch_tensors(weights)
    names = sorted(tensors)
    where = {}
    for i in range(n_files):
        file = f"model-{i + 1:05d}-of-{n_files:05d}.safetensors"
        part = names[i::n_files]
        save_file({n: np.ascontiguousarray(tensors[n]).astype(dtype) for n in part},
                  directory / file, {"format": "pt"})  # fmt: skip
        where |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def config(golden):
    ours = grokkit.GrokConfig.from_json(golden / "config.json")
    return CONFIG | {
        "embedding_multiplier_scale": ours.embedding_multiplier,
        "output_multiplier_scale": ours.output_multiplier,
        "attn_output_multiplier": ours.attention_multiplier,
    }


@pytest.fixture(scope="module")
def port(golden_weights, config, tmp_path_factory):
    """The golden checkpoint as a port, in bfloat16."""
    directory = tmp_path_factory.mktemp("port") / "bfloat16"
    write_port(directory, golden_weights, config, "bfloat16")
    return directory


@pytest.fixture(scope="module")
def port32(golden_weights, config, tmp_path_factory):
    """The golden checkpoint as a port, in float32."""
    directory = tmp_path_factory.mktemp("port") / "float32"
    write_port(directory, golden_weights, config, "float32", n_files=1)
    return directory


@pytest.fixture
def damaged(port, tmp_path):
    return shutil.copytree(port, tmp_path / "port")


def test_float32_computes_what_the_original_does(port32, golden, golden_arrays):
    checkpoint = open_checkpoint(port32)
    assert checkpoint.config == grokkit.GrokConfig.from_json(golden / "config.json")
    assert checkpoint.layout == "hugging face"
    lm = grokkit.load(port32, grokkit.make_mesh(1, 4), "float32", progress=False, check=True)
    assert lm.model.blocks.moe.gate.shape == (12, 8, 64, 88)
    streamed = grokkit.load(port32, lm.mesh, "float32", progress=False, stream=True)
    for model in (lm, streamed):
        found = model(golden_arrays["tokens"]).logits
        assert relative_error(found, golden_arrays["exact_logits"]) < 1e-5


def test_the_originals_script_is_held_to_the_ports_configuration(port, golden):
    sizes = grokkit.GrokConfig.from_json(golden / "config.json").to_dict()
    inner = {k: v for k, v in sizes.pop("model").items()
             if k in TransformerConfig.__dataclass_fields__}  # fmt: skip
    for changes, message in [
        ({"attn_output_multiplier": 0.1}, "attention_multiplier is 0.1, and .*config.json says"),
        ({}, "nowhere: expected a SentencePiece model"),  # which is looked for after all else
    ]:
        config = LanguageModelConfig(**sizes | {"model": TransformerConfig(**inner | changes)})
        runner = ModelRunner(config, checkpoint_path=str(port))
        with pytest.raises(grokkit.GrokkitError, match=message):
            runner.load(grokkit.make_mesh(1, 1), "nowhere", "port")


def test_bfloat16_weights_in_their_places(port, golden_weights):
    """Each leaf is the original's weight rounded once; what the model keeps in float32 is."""
    lm = grokkit.load(port, grokkit.make_mesh(1, 8), "float32", progress=False)
    model = lm.model
    for leaf, name in [
        (model.blocks.attention.query, "multi_head_attention/query/w"),
        (model.blocks.attention.out, "multi_head_attention/linear/w"),
        (model.blocks.moe.gate, "moe/linear/w"),
        (model.blocks.moe.value, "moe/linear_v/w"),
        (model.blocks.moe.out, "moe/linear_1/w"),
        (model.blocks.moe.router, "router/w"),
        (model.blocks.attn_out_norm.scale, "rms_norm_1/scale"),
    ]:
        for layer in (0, 2, 11):
            expected = golden_weights[f"transformer/decoder_layer_{layer}/{name}"]
            rounded = expected.astype("bfloat16").astype(np.float32)
            np.testing.assert_array_equal(np.asarray(leaf)[layer].astype(np.float32), rounded)
    assert model.blocks.moe.gate.dtype == "bfloat16"
    assert {a.dtype for a in jax.tree.leaves((model.embedding, model.blocks.moe_norm))} == {
        np.dtype(np.float32)
    }


@pytest.mark.parametrize("to", ["official", "safetensors"])
def test_rounded_to_8_bits_it_is_the_original_again(port32, golden, to, tmp_path):
    """The golden matrices are multiples of their scales, so rounding finds most of them."""
    found = convert(port32, tmp_path / to, to=to, dtype="int8", verify=True, progress=False)
    assert found.layout == to
    for name in ("moe/linear_1/w", "multi_head_attention/query/w"):
        name = f"transformer/decoder_layer_10/{name}"
        a, b = (c[name].file for c in (open_checkpoint(golden), found))
        assert a.scales.shape == b.scales.shape and b.weight.dtype == np.int8
        x, y = (np.asarray(file.open(file.weight), int) for file in (a, b))
        assert np.abs(x - (y.swapaxes(-1, -2) if b.k_last else y)).max() <= 1


def test_kept_as_safetensors_of_grokkits_own(port, tmp_path):
    found = convert(port, tmp_path / "own", verify=True, progress=False)
    assert found.nbytes < open_checkpoint(port).nbytes  # the unembedding is gone
    mesh = grokkit.make_mesh(1, 2)
    a, b = (grokkit.load(d, mesh, progress=False).model for d in (port, tmp_path / "own"))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_official_needs_8_bits(port, tmp_path):
    with pytest.raises(CheckpointError, match="add --dtype int8"):
        convert(port, tmp_path / "x", to="official", progress=False)
    assert not list(tmp_path.iterdir())


def edit(directory, change):
    """Rewrite the file that holds the embedding."""
    for path in directory.glob("*.safetensors"):
        tensors = load_file(path)
        if change(tensors):
            save_file(tensors, path, {"format": "pt"})


def refused(directory, message, error=CheckpointError):
    with pytest.raises(error) as e:
        open_checkpoint(directory)
    assert message in str(e.value)


def test_another_unembedding(damaged):
    def change(tensors):
        if "lm_head.weight" in tensors:
            tensors["lm_head.weight"][3, 4] += 1
            return True

    edit(damaged, change)
    refused(damaged, "Grok-1's unembedding is its embedding")


def test_a_port_without_unembedding(damaged):
    edit(damaged, lambda tensors: tensors.pop("lm_head.weight", None) is not None)
    assert len(open_checkpoint(damaged)) == 146


def test_missing_and_other_arrays(damaged):
    name = "model.layers.7.moe_block.experts.5.linear_v.weight"

    def rename(tensors):
        if name in tensors:
            tensors["model.layers.7.extra"] = tensors.pop(name)
            return True

    edit(damaged, rename)
    refused(damaged, f"an array {name}")
    next(damaged.glob("*-00002-*")).unlink()
    refused(damaged, "model-00002-of-00003.safetensors missing")


@pytest.mark.parametrize(
    "change, message, error",
    [
        ({"hidden_size": None}, "'hidden_size' is missing", ConfigError),
        ({"num_experts": "8"}, "'num_experts' must be a number", ConfigError),
        ({"num_key_value_heads": 5}, "n_kv_heads must divide", ConfigError),
        ({"intermediate_size": 96}, "float16[96, 64]", CheckpointError),
        ({"num_hidden_layers": 11}, "model.layers.11.", CheckpointError),
    ],
)
def test_configurations_that_do_not_fit(damaged, config, change, message, error):
    (damaged / "config.json").write_text(json.dumps(config | change))
    refused(damaged, message, error)


def test_no_configuration(damaged):
    (damaged / "config.json").unlink()
    refused(damaged, "download it too", ConfigError)
