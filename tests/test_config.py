"""Configurations: the official presets, round trips, and what is refused."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import grokkit
from grokkit.config import GrokConfig, ffn_size
from grokkit.errors import ConfigError

NAMES = [field.name for field in dataclasses.fields(GrokConfig)]


@pytest.fixture
def official(golden_dir):
    """The golden checkpoint's config.json, to be damaged."""
    return json.loads((golden_dir / "config.json").read_text())


def test_grok_1_is_the_official_model():
    c = grokkit.GROK_1
    assert dataclasses.astuple(c) == (
        131072, 6144, 64, 48, 8, 128, 32768, 8, 2, 8192,
        78.38367176906169, 0.5773502691896257, 0.08838834764831845, 30.0, 10000.0, 1e-5, 0, 2,
    )  # fmt: skip
    assert c.out_groups == 8
    # Part by part; scales of quantised matrices are not counted.
    attention = 6144 * (6144 + 1024 + 1024 + 6144)
    experts = 8 * 3 * 6144 * 32768
    assert c.n_params == 131072 * 6144 + 6144 + 64 * (attention + experts + 6144 * (8 + 4))


def test_golden_config_is_read_as_it_is_written(golden_dir):
    c = GrokConfig.from_json(golden_dir / "config.json")
    assert c == GrokConfig(
        vocab_size=256, d_model=64, n_layers=12, n_heads=16, n_kv_heads=8, d_head=8, d_ff=88,
        n_experts=8, n_experts_per_token=2, context_length=64,
    )  # fmt: skip


def test_nano_has_groks_shape_and_fits_eight_devices():
    from grokkit.model import check_mesh

    c = grokkit.NANO
    assert (c.n_experts, c.n_experts_per_token, c.n_kv_heads) == (8, 2, 8)
    assert 8e6 <= c.n_params <= 16e6
    check_mesh(c, grokkit.make_mesh(1, 8))


@pytest.mark.parametrize(
    "emb_size, widening, expected",
    [(6144, 8.0, 32768), (64, 2.0, 88), (192, 2.0, 256), (100, 1.0, 72), (12, 1.0, 8)],
)
def test_ffn_size_is_two_thirds_rounded_up_to_eight(emb_size, widening, expected):
    assert ffn_size(emb_size, widening) == expected


factors = st.floats(1e-6, 1e6, allow_nan=False, allow_infinity=False)


@st.composite
def configs(draw):
    n_kv_heads = draw(st.integers(1, 16))
    n_experts = draw(st.integers(1, 64))
    vocab_size = draw(st.integers(3, 200_000))
    return GrokConfig(
        vocab_size=vocab_size,
        d_model=draw(st.integers(1, 10_000)),
        n_layers=draw(st.integers(1, 200)),
        n_heads=n_kv_heads * draw(st.integers(1, 12)),
        n_kv_heads=n_kv_heads,
        d_head=2 * draw(st.integers(1, 128)),
        d_ff=8 * draw(st.integers(1, 10_000)),
        n_experts=n_experts,
        n_experts_per_token=draw(st.integers(1, n_experts)),
        context_length=draw(st.integers(1, 1 << 20)),
        embedding_multiplier=draw(factors),
        output_multiplier=draw(factors),
        attention_multiplier=draw(factors),
        attention_softcap=draw(factors),
        rope_base=draw(factors),
        norm_eps=draw(factors),
        pad_token=draw(st.integers(0, vocab_size - 1)),
        eos_token=draw(st.integers(0, vocab_size - 1)),
    )


@given(configs())
@settings(max_examples=200, deadline=None)
def test_dict_and_back(config):
    assert GrokConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_json_and_back(tmp_path):
    for config in (grokkit.GROK_1, grokkit.NANO):
        path = tmp_path / "config.json"
        config.to_json(path)
        assert GrokConfig.from_json(path) == config
        assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_config_written_is_what_the_official_constructor_takes(official):
    written = GrokConfig.from_dict(official).to_dict()
    assert official["model"].items() <= written["model"].items()
    assert {k: v for k, v in official.items() if k != "model"}.items() <= written.items()


def test_official_entries_that_do_not_describe_the_model_are_passed_over(official):
    expected = GrokConfig.from_dict(official)
    official["model"] |= {"shard_activations": True, "data_axis": ["replica"], "name": "grok"}
    assert GrokConfig.from_dict(official) == expected


def test_d_ff_that_the_official_arguments_cannot_say_is_refused_when_written():
    with pytest.raises(ConfigError, match="d_ff 100 is not a size .* multiple of 8"):
        dataclasses.replace(grokkit.NANO, d_ff=100).to_dict()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1, found 0"),
        ({"n_layers": -3}, "n_layers must be at least 1, found -3"),
        ({"n_kv_heads": 3}, "n_kv_heads must divide n_heads, found 3 and 16"),
        ({"d_head": 7}, "d_head must be even for rotary embeddings, found 7"),
        ({"n_experts_per_token": 9}, "n_experts_per_token must be at most n_experts, found 9 of 8"),
        ({"pad_token": -1}, "pad_token must be a token id below 4096, found -1"),
        ({"eos_token": 4096}, "eos_token must be a token id below 4096, found 4096"),
        ({"norm_eps": float("nan")}, "norm_eps must be a finite number, found nan"),
        ({"rope_base": float("inf")}, "rope_base must be a finite number, found inf"),
        ({"rope_base": 0.0}, "rope_base must be above 0, found 0.0"),
        ({"attention_softcap": -30.0}, "attention_softcap must be above 0, found -30.0"),
        ({"norm_eps": -1.0}, "norm_eps must not be negative, found -1.0"),
    ],
)
def test_inconsistent_numbers_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(grokkit.NANO, **change)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda c: c.pop("vocab_size"), r"here: 'vocab_size' is missing"),
        (lambda c: c["model"].pop("emb_size"), r"here: 'emb_size' is missing"),
        (lambda c: c["model"].pop("widening_factor"), r"here: 'widening_factor' is missing"),
        (lambda c: c.pop("model"), r'here: expected an object with a "model" object inside'),
        (lambda c: c.update(model=[]), r'here: expected an object with a "model" object inside'),
        (
            lambda c: c.update(vocab_sise=3),
            r"here: unknown entries vocab_sise; expected vocab_size",
        ),
        (lambda c: c["model"].update(heads=3), r"here: unknown entries heads"),
        (lambda c: c.update(vocab_size="256"), r"here: 'vocab_size' must be a number, found '256'"),
        (lambda c: c.update(vocab_size=True), r"here: 'vocab_size' must be a number, found True"),
        (lambda c: c.update(vocab_size=None), r"here: 'vocab_size' must be a number, found None"),
        (
            lambda c: c.update(vocab_size=256.5),
            r"here: 'vocab_size' must be an integer, found 256.5",
        ),
        (lambda c: c["model"].update(num_layers=0), r"here: n_layers must be at least 1, found 0"),
        (lambda c: c["model"].update(widening_factor=float("nan")), r"must be a finite number"),
        (lambda c: c["model"].update(widening_factor=float("inf")), r"must be a finite number"),
        (lambda c: c["model"].update(widening_factor=1e308), r"must be a finite number, found 1e"),
        (lambda c: c["model"].update(emb_size=64.5), r"here: 'emb_size' must be an integer"),
        (lambda c: c["model"].update(rope_base="10000"), r"here: 'rope_base' must be a number"),
        (lambda c: c["model"].update(norm_eps=[1e-5]), r"here: 'norm_eps' must be a number"),
    ],
)
def test_damaged_entries_are_refused_with_their_name(damage, message, official):
    damage(official)
    with pytest.raises(ConfigError, match=message):
        GrokConfig.from_dict(official, source="here")


def test_what_is_no_dict_is_refused():
    with pytest.raises(ConfigError, match='config: expected an object with a "model" object'):
        GrokConfig.from_dict(json.loads("{}"))


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b'{"model": {}}', b"[" * 100_000, b"[]", b"1" * 5000, b"NaN"],
    ids=["empty", "cut", "not text", "nothing in it", "deep", "a list", "a long number", "NaN"],
)
def test_file_that_is_no_configuration_is_refused_with_its_name(content, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        GrokConfig.from_json(path)


def test_missing_file_is_refused_with_its_name(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json: not a readable JSON file"):
        GrokConfig.from_json(tmp_path / "config.json")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_entry_with_any_value_is_read_or_refused(data, golden_dir):
    values = json.loads((golden_dir / "config.json").read_text())
    place = data.draw(st.sampled_from([values, values["model"]]))
    place[data.draw(st.sampled_from([*place, "rope_base"]))] = data.draw(json_values)
    try:
        assert isinstance(GrokConfig.from_dict(values), GrokConfig)
    except ConfigError:
        pass


def test_config_is_a_value_that_compiled_functions_can_be_keyed_on():
    assert hash(grokkit.NANO) == hash(dataclasses.replace(grokkit.NANO))
    with pytest.raises(dataclasses.FrozenInstanceError):
        grokkit.NANO.d_model = 3
