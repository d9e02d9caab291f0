"""What a user holds: text in, text out, and outputs that a notebook can index."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import random_model, reference_weights, relative_error

import grokkit
from grokkit.errors import (
    CheckpointError,
    ConfigError,
    GrokkitError,
    PromptError,
    TokenizerError,
)
from grokkit.language_model import LanguageModel
from grokkit.loading import default_mesh

SHORT, LONG = "Two and two make", "The quick brown fox"
SETTINGS = {"max_len": 24, "temperature": 1.2, "top_p": 0.95, "seed": 5}


# Text and tokens


def test_texts_become_rows_padded_on_the_right(tiny_lm):
    tokenizer = tiny_lm.tokenizer
    found = tiny_lm.to_tokens([SHORT, LONG])
    short, long = tokenizer.encode(SHORT), tokenizer.encode(LONG)
    assert len(short) < len(long) == found.shape[1]
    assert found.dtype == np.int32
    assert found[0].tolist() == short + [0] * (len(long) - len(short))
    assert found[1].tolist() == long
    assert tiny_lm.to_tokens(LONG).tolist() == [long]


def test_ids_become_text_again(tiny_lm):
    ids = tiny_lm.to_tokens([SHORT, LONG])
    assert tiny_lm.to_string(ids) == [SHORT, LONG]  # pads spell nothing
    assert tiny_lm.to_string(ids[1]) == LONG
    assert tiny_lm.to_string(jnp.asarray(ids[1])) == LONG
    assert tiny_lm.to_string(ids[1].tolist()) == LONG


def test_str_tokens_are_what_each_token_shows(tiny_lm):
    shown = tiny_lm.to_str_tokens(LONG)
    assert "".join(shown).strip() == LONG
    ids = tiny_lm.to_tokens(LONG)
    assert len(shown) == ids.shape[1]
    assert tiny_lm.to_str_tokens(ids[0]) == tiny_lm.to_str_tokens(ids) == shown


def test_ids_that_no_tokenizer_has_are_refused(tiny_lm):
    with pytest.raises(TokenizerError, match="found 99999 at position 1"):
        tiny_lm.to_string([5, 99999])


@pytest.mark.parametrize("text", ["", [], ["a", ""]])
def test_empty_texts_are_refused(text, tiny_lm):
    with pytest.raises(PromptError, match="at least one text, none empty"):
        tiny_lm.to_tokens(text)
    with pytest.raises(PromptError):
        tiny_lm(text)


def test_repr_says_what_it_is(lm8):
    assert repr(lm8).endswith(
        "tests/golden/tiny': 1,942,592 parameters, 12 layers, d_model 64, 16 heads, 8 experts of "
        "which 2 a token, vocab 256, context 64; float32; mesh data=1 x model=8 of cpu)"
    )
    n = sum(w.size for name, w in reference_weights(lm8.model).items())
    assert n == lm8.config.n_params == 1_942_592


# Running


@pytest.mark.parametrize("mesh", [(1, 8), (2, 4)], ids=str)
def test_outputs_can_be_indexed_as_in_a_notebook(mesh, golden_dir, golden_arrays):
    lm = grokkit.load(golden_dir, mesh=grokkit.make_mesh(*mesh), dtype="float32", progress=False)
    logits = lm(golden_arrays["tokens"]).logits
    exact = golden_arrays["exact_logits"]
    assert int(logits[0, -1].argmax()) == exact[0, -1].argmax()
    assert float(logits[1, 3, 7]) == pytest.approx(exact[1, 3, 7], abs=1e-5)
    assert logits[:, 2:5].mean(axis=-1).shape == (2, 3)
    best = jnp.argsort(logits[0], axis=-1)[:, -3:]
    np.testing.assert_array_equal(best, np.argsort(exact[0], axis=-1)[:, -3:])
    assert (logits - logits.max(axis=-1, keepdims=True)).max() == 0
    assert logits[jnp.arange(2), jnp.array([3, 4])].shape == (2, 256)
    assert (logits @ jnp.ones(256)).shape == (2, 19)


def test_one_row_of_ids_is_a_batch_of_one(tiny_lm, tiny_config):
    ids = tiny_lm.to_tokens(LONG)
    expected = reference.forward(reference_weights(tiny_lm.model), tiny_config, ids)["logits"]
    for tokens in (LONG, [LONG], ids, ids[0], ids[0].tolist(), ids.tolist(), jnp.asarray(ids)):
        logits = tiny_lm(tokens).logits
        assert logits.shape == (1, ids.shape[1], tiny_config.vocab_size)
        assert relative_error(logits, expected) < 1e-5


def test_a_shorter_text_of_a_batch_gets_the_logits_it_gets_alone(tiny_lm, tiny_config):
    weights = reference_weights(tiny_lm.model)
    logits = np.asarray(tiny_lm([LONG, SHORT]).logits)
    for row, text in enumerate([LONG, SHORT]):
        ids = tiny_lm.to_tokens(text)
        expected = reference.forward(weights, tiny_config, ids)["logits"][0]
        assert relative_error(logits[row, : ids.shape[1]], expected) < 1e-5


@pytest.mark.parametrize(
    "tokens, message",
    [
        ([[1, 256]], "prompt 0 holds token id 256; ids go from 0 to 255"),
        ([-1], "prompt 0 holds token id -1"),
        ([[1] * 65], "65 .* context of 64"),
        ([[1, 2], [3]], "rows of token ids of one length, found several"),
        (np.zeros((1, 2, 3), int), r"found an array of shape \(1, 2, 3\) and dtype int64"),
        (np.zeros((2, 0), int), r"found an array of shape \(2, 0\)"),
        ("some text", "there is no tokenizer.model beside the weights"),
    ],
)
def test_tokens_that_cannot_be_run_are_refused(tokens, message, lm8):
    with pytest.raises(GrokkitError, match=message):
        lm8(tokens)


@pytest.mark.parametrize(
    "tokens", [np.zeros((1, 3)), np.zeros((1, 3), bool)], ids=["float", "bool"]
)
def test_what_is_no_integer_is_refused(tokens, lm8):
    # Checked by the function itself, for callers whose types nobody checks.
    prepare = LanguageModel.prepare
    prepare = getattr(prepare, "__wrapped__", prepare)
    with pytest.raises(PromptError, match=r"integers \[batch, position\], found an array of shape"):
        prepare(lm8, tokens)


# Generating


@pytest.fixture(scope="module")
def texts(tiny_lm):
    """Continuations of two prompts of different lengths on the (1, 8) mesh."""
    return tiny_lm.generate([LONG, SHORT], **SETTINGS)


def test_continuations_are_texts_without_the_prompt(texts):
    assert all(isinstance(t, str) and t for t in texts)
    assert texts[0] != texts[1]
    assert not texts[0].startswith(LONG)


@pytest.mark.parametrize("mesh", [(1, 1), (2, 4)], ids=str)
def test_the_same_seed_gives_the_same_text_on_any_mesh(mesh, tiny_config, tiny_lm, texts):
    mesh = grokkit.make_mesh(*mesh)
    lm = LanguageModel(random_model(tiny_config, 0, mesh), mesh, tiny_lm.tokenizer)
    assert lm.generate([LONG, SHORT], **SETTINGS) == texts


def test_each_text_of_a_batch_is_what_it_would_be_alone(tiny_lm, texts):
    for i, prompt in enumerate([LONG, SHORT]):
        alone = tiny_lm.generate(prompt, **(SETTINGS | {"seed": SETTINGS["seed"] + i}))
        assert alone == texts[i]


def test_streamed_pieces_are_the_generated_text(tiny_lm, texts):
    pieces = list(tiny_lm.stream(LONG, **SETTINGS))
    assert len(pieces) == SETTINGS["max_len"]
    assert "".join(str(piece) for piece in pieces) == texts[0]
    for piece in pieces:
        assert len(piece.alternatives) == 8
        probs = [p for _, _, p in piece.alternatives]
        assert probs == sorted(probs, reverse=True) and 0 < sum(probs) < 1
        assert 0 < piece.prob <= probs[0]
        for token, shown, prob in piece.alternatives:
            assert tiny_lm.to_str_tokens([token]) == [shown]
            assert prob == pytest.approx(piece.prob) or token != piece.id


def test_a_stream_goes_on_from_token_ids(tiny_lm):
    whole = [piece.id for piece in tiny_lm.stream(LONG, **SETTINGS)]
    begun = tiny_lm.tokenizer.encode(LONG) + whole[:5]
    rest = tiny_lm.stream(begun, **SETTINGS | {"max_len": SETTINGS["max_len"] - 5})
    assert [piece.id for piece in rest] == whole[5:]


def test_stream_and_generate_agree_where_a_character_is_cut_off(tiny_lm):
    """A random model often stops inside a character of several bytes."""
    cut = 0
    for seed in range(8):
        settings = SETTINGS | {"seed": seed, "temperature": 5.0}
        pieces = list(tiny_lm.stream(LONG, **settings))
        text = tiny_lm.generate(LONG, **settings)
        assert "".join(map(str, pieces)) == text
        ids = tiny_lm.tokenizer.encode(LONG) + [piece.id for piece in pieces]
        whole = tiny_lm.to_string(ids)
        assert whole.startswith(LONG + text)
        assert set(whole[len(LONG + text) :]) <= {"\ufffd"}
        cut += whole != LONG + text
    assert cut, "no text was cut off inside a character; choose other seeds"


def test_a_text_ends_before_its_first_end_token(tiny_lm, texts, monkeypatch):
    pieces = list(tiny_lm.stream(LONG, **SETTINGS))
    ids = [piece.id for piece in pieces]
    end = ids[8]
    assert ids.index(end) > 0 and len(set(ids)) > 12
    # The compiled programs do not know the end token: only the reader of their tokens does.
    config = tiny_lm.config
    changed = type("Config", (), {**{k: getattr(config, k) for k in vars(config)}})()
    changed.eos_token = end
    monkeypatch.setattr(LanguageModel, "config", changed)
    shorter = list(tiny_lm.stream(LONG, **SETTINGS))
    assert [piece.id for piece in shorter] == ids[: ids.index(end)]
    found = tiny_lm.generate([LONG, SHORT], **SETTINGS)
    assert found[0] == "".join(map(str, shorter))
    assert texts[1].startswith(found[1])


def test_max_len_counts_tokens(tiny_lm):
    whole = list(tiny_lm.stream(LONG, **SETTINGS))
    for n in (20, 23):
        pieces = list(tiny_lm.stream(LONG, **(SETTINGS | {"max_len": n})))
        assert pieces == whole[:n]
    for n in (1, 20, 23):
        text = tiny_lm.generate(LONG, **(SETTINGS | {"max_len": n}))
        assert text == "".join(map(str, whole[:n]))


def test_temperature_zero_takes_the_argmax_of_the_full_forward_pass(tiny_lm, tiny_config):
    weights = reference_weights(tiny_lm.model)
    prompt = tiny_lm.tokenizer.encode(LONG)
    pieces = list(tiny_lm.stream(LONG, max_len=24, temperature=0.0))
    exact, gaps = reference.greedy(weights, tiny_config, prompt, 24)
    assert min(gaps) > 1e-4
    assert [piece.id for piece in pieces] == exact


@pytest.mark.parametrize(
    "prompt, settings, message",
    [
        ("", {}, "prompt 0 is empty"),
        (["a", ""], {}, "prompt 1 is empty"),
        ([], {}, "at least one prompt, found none"),
        (LONG, {"max_len": 0}, "max_len must be at least 1"),
        (LONG, {"max_len": 96}, "do not fit in the context of 96"),
        (LONG, {"temperature": -1.0}, "temperature must be 0 or more"),
        (LONG, {"temperature": float("nan")}, "temperature must be 0 or more"),
        (LONG, {"top_p": 0.0}, "top_p must be above 0"),
        (LONG, {"top_p": 1.5}, "top_p must be above 0 and at most 1"),
        (LONG, {"seed": -1}, "seed must be an integer from 0"),
    ],
)
def test_what_cannot_be_honoured_is_refused(prompt, settings, message, tiny_lm):
    settings = {"max_len": 5} | settings
    with pytest.raises(PromptError, match=message):
        tiny_lm.generate(prompt, **settings)
    if isinstance(prompt, str):
        with pytest.raises(PromptError, match=message):
            tiny_lm.stream(prompt, **settings)  # at once, not at the first token


def test_one_prompt_on_a_mesh_with_a_data_axis_is_refused(tiny_lm):
    lm = LanguageModel(tiny_lm.model, grokkit.make_mesh(2, 4), tiny_lm.tokenizer)
    with pytest.raises(PromptError, match="2 'data' devices, found 1; add prompts or use a mesh"):
        lm.generate(LONG)


# Loading


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="eight devices, with a CPU's default")
def test_default_mesh_takes_as_many_devices_as_divide_the_shapes(golden_dir, tiny_config):
    lm = grokkit.load(golden_dir, progress=False)
    assert dict(lm.mesh.shape) == {"data": 1, "model": 8}
    assert lm.model.dtype == jnp.float32  # on a CPU
    odd = grokkit.GrokConfig(
        vocab_size=8, d_model=12, n_layers=1, n_heads=6, n_kv_heads=6, d_head=2, d_ff=24
    )
    assert dict(default_mesh(odd).shape) == {"data": 1, "model": 2}


def test_mesh_that_does_not_fit_is_refused(golden_dir):
    with pytest.raises(ConfigError, match="8 key/value heads do not divide .* 3 'model' devices"):
        grokkit.load(golden_dir, mesh=grokkit.make_mesh(1, 3), progress=False)


@pytest.mark.parametrize("dtype", ["float16", "int8", "float64"])
def test_other_dtypes_are_refused(dtype, golden_dir):
    with pytest.raises(
        CheckpointError, match=f"dtype must be float32 or bfloat16, found '{dtype}'"
    ):
        grokkit.load(golden_dir, dtype=dtype, progress=False)


def test_a_tokenizer_of_another_size_is_refused(golden_dir, tiny_tokenizer_file, tmp_path, lm8):
    shutil.copytree(golden_dir, tmp_path / "tiny")
    shutil.copy(tiny_tokenizer_file, tmp_path / "tiny" / "tokenizer.model")
    with pytest.raises(
        TokenizerError, match=r"tokenizer\.model: expected 256 pieces.* found 3\d\d"
    ):
        grokkit.load(tmp_path / "tiny", progress=False)


def test_parts_that_do_not_fit_are_refused(lm8, tiny_lm):
    with pytest.raises(TokenizerError, match="odd: expected a tokenizer of 256 pieces.* found 3"):
        LanguageModel(lm8.model, lm8.mesh, tiny_lm.tokenizer, "odd")


def test_without_a_tokenizer_text_is_refused_and_ids_are_not(lm8):
    for call in (lambda: lm8.to_tokens("a"), lambda: lm8.generate("a"), lambda: lm8.to_string([1])):
        with pytest.raises(TokenizerError, match="there is no tokenizer.model beside the weights"):
            call()


def test_missing_directory_is_refused_by_name(tmp_path):
    with pytest.raises(GrokkitError, match="nowhere"):
        grokkit.load(tmp_path / "nowhere")


# treescope looks at all of numpy, chararray included, which numpy 2.5 deprecates.
@pytest.mark.filterwarnings("ignore:The chararray class is deprecated:DeprecationWarning")
def test_treescope_shows_a_model_on_eight_devices(tiny_lm):
    import treescope

    shown = treescope.render_to_text(tiny_lm.model)
    assert shown.startswith("Grok(")
    assert "router" in shown
