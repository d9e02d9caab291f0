"""A model whose layers stay on disk gives what the one in memory gives."""

import json
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error

import grokkit
from grokkit import cli, scoring, streamed_model
from grokkit.analysis.attribution import logit_attribution, router_attribution
from grokkit.analysis.causal_routing import forced_choices, next_token_losses
from grokkit.analysis.grids import Experts, Heads, Positions
from grokkit.analysis.lens import logit_lens
from grokkit.analysis.patching import attribution_patch, patch
from grokkit.batching import ContinuousBatch
from grokkit.checkpoint import (
    save_params,
)
from grokkit.checkpoint.stream import LayerReader
from grokkit.errors import CheckpointError, GrokkitError, PromptError
from grokkit.generate import PREFILL_PART, Sampling, generate_tokens
from grokkit.kv_cache import KVCache

CLOSE = 1e-6


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return grokkit.make_mesh(1, 2)


@pytest.fixture(scope="module")
def resident(golden_dir, mesh) -> grokkit.LanguageModel:
    return grokkit.load(golden_dir, mesh=mesh, dtype="float32", progress=False)


@pytest.fixture(scope="module")
def streamed(golden_dir, mesh) -> grokkit.LanguageModel:
    return grokkit.load(golden_dir, mesh=mesh, dtype="float32", progress=False, stream=True)


@pytest.fixture(scope="module")
def tokens(golden_arrays) -> np.ndarray:
    return golden_arrays["tokens"]


EDITS = [
    grokkit.ForceExperts([1, 2], layers=[4]),
    grokkit.Scale("attn_out", 0.5, layers=[2, 11]),
    grokkit.Add("resid_mid", np.ones(64, np.float32), layers=6, positions=[-1]),
]


@pytest.fixture(scope="module")
def expected(resident, tokens):
    """Logits and every site of the model in memory, with edits."""
    return resident.run_with_cache(tokens, edits=EDITS)


def test_every_site_with_edits_is_that_of_the_model_in_memory(
    streamed, tokens, expected, golden_arrays
):
    logits, cache = streamed.run_with_cache(tokens, edits=EDITS)
    assert relative_error(logits, expected[0]) < CLOSE
    assert relative_error(logits, golden_arrays["exact_logits"]) > 1e-2
    assert cache.keys() == expected[1].keys() == list(grokkit.SITES)
    for name, value in expected[1].items():
        assert cache.entries[name].layers == expected[1].entries[name].layers
        assert cache[name].sharding == value.sharding, name
        if value.dtype == np.int32:
            np.testing.assert_array_equal(cache[name], value)
        else:
            # Of single sites a few differ by a rounding more than the logits.
            assert relative_error(cache[name], value) < 2 * CLOSE, name


def test_captures_of_some_layers_and_reductions(streamed, tokens, golden_arrays):
    captures = [
        grokkit.Capture("pattern", layers=(7, -1, 2), positions=-1),
        grokkit.Capture("resid_post", layers=(2, 7, 11), reduce=lambda x: (x, x.max(axis=-1))),
    ]
    logits, cache = streamed.run_with_cache(tokens, captures)
    assert relative_error(logits, golden_arrays["exact_logits"]) < 1e-4
    assert cache.entries["pattern"].layers == (7, 11, 2)
    pattern = golden_arrays["exact_pattern"][[7, 11, 2]][:, :, :, -1]
    assert relative_error(cache["pattern"], pattern) < 1e-4
    stream = golden_arrays["exact_resid"][[2, 7, 11]]
    assert relative_error(cache["resid_post"][0], stream) < 1e-4
    assert relative_error(cache["resid_post"][1], stream.max(axis=-1)) < 1e-4


@pytest.mark.slow
def test_the_same_tokens_are_drawn(streamed, resident, tokens, monkeypatch):
    """Prompts of several lengths in one pass, which takes them in parts, as it does long ones."""
    monkeypatch.setattr(streamed_model, "PREFILL_PART", 8)
    prompts = [tokens[0].tolist(), tokens[1][:5].tolist(), tokens[1].tolist()]
    sampling = Sampling(temperature=[0.0, 0.8, 1.0], top_p=0.9, seed=3)
    edits = streamed.resolve([grokkit.RouterTemperature(2.0, layers=5)], [8, 5, 8])

    passes = []
    layers = LayerReader.layers
    monkeypatch.setattr(LayerReader, "layers", lambda *a: passes.append(1) or layers(*a))
    n, arguments = 5, (prompts, 5, sampling)
    found = []
    for piece in generate_tokens(streamed.runnable, streamed.mesh, *arguments, edits=edits):
        found.append(piece.draws)
        assert len(passes) == len(found)  # a token is shown before the next one's pass
    assert len(found) == n
    expected = [
        piece.draws
        for piece in generate_tokens(resident.runnable, resident.mesh, *arguments, edits=edits)
    ]
    tokens_of, probs_of = (
        [np.concatenate([getattr(d, field) for d in draws])[:n] for draws in (found, expected)]
        for field in ("token", "prob")
    )
    np.testing.assert_array_equal(*tokens_of)
    assert relative_error(*probs_of) < 1e-5


@pytest.fixture(scope="module")
def tiny_streamed(tiny_lm, tiny_config, tiny_tokenizer_file, tmp_path_factory):
    """`tiny_lm`, which reads and writes text, streamed."""
    folder = tmp_path_factory.mktemp("streamed") / "tiny"
    save_params(tiny_lm.model, tiny_config, folder, tiny_tokenizer_file, progress=False)
    return grokkit.load(folder, tiny_lm.mesh, "float32", progress=False, stream=True)


@pytest.mark.slow
def test_text_and_captures_while_generating(tiny_lm, tiny_streamed):
    prompts, wanted = ["The quick", "Two and two make"], ["resid_post", "expert_indices"]
    texts, cache = tiny_streamed.generate_with_cache(prompts, wanted, max_len=4)
    expected_texts, expected = tiny_lm.generate_with_cache(prompts, wanted, max_len=4)
    assert texts == expected_texts
    np.testing.assert_array_equal(cache["expert_indices"], expected["expert_indices"])
    assert relative_error(cache["resid_post"], expected["resid_post"]) < CLOSE


@pytest.mark.slow
def test_text_token_by_token(tiny_lm, tiny_streamed):
    text = tiny_lm.generate("The quick", max_len=6, seed=1)
    assert tiny_streamed.generate("The quick", max_len=6, seed=1) == text
    assert "".join(t.text for t in tiny_streamed.stream("The quick", max_len=6, seed=1)) == text


def counted(streamed, monkeypatch):
    """A list that grows by one with every pass."""
    passes, layers = [], streamed.runnable.reader.layers
    monkeypatch.setattr(
        streamed.runnable.reader, "layers", lambda *a, **k: passes.append(1) or layers(*a, **k)
    )
    return passes


def test_scores_and_perplexity(tiny_lm, tiny_streamed, monkeypatch):
    """All texts share a pass: of several groups, and long ones in parts."""
    prompts = ["The quick", "Two and two make"]
    expected = tiny_lm.score(prompts, [" brown fox", " four."])
    ids = np.random.default_rng(0).integers(4, 300, 70).tolist()
    perplexity = tiny_lm.perplexity(ids, window=32, stride=9)
    for part in (PREFILL_PART, 16):
        monkeypatch.setattr(streamed_model, "PREFILL_PART", part)
        monkeypatch.setattr(scoring, "PREFILL_PART", part)
        passes = counted(tiny_streamed, monkeypatch)
        found = tiny_streamed.score(prompts, [" brown fox", " four."])
        for score, other in zip(found, expected, strict=True):
            assert score.tokens == other.tokens
            assert relative_error(score.logprobs, other.logprobs) < CLOSE
        assert len(passes) == 1
        assert tiny_streamed.perplexity(ids, 32, 9) == pytest.approx(perplexity, rel=CLOSE)
        assert len(passes) == 2
    monkeypatch.setattr(scoring, "_STREAMS", 2 * 4 * 32 * 32)  # two windows at a time, of six
    assert tiny_streamed.perplexity(ids, 32, 9) == pytest.approx(perplexity, rel=CLOSE)
    assert len(passes) == 2 + 3


def test_requests_that_share_a_batch(tiny_lm, tiny_streamed, monkeypatch):
    """Of several lengths, more than there are slots; prompts of all that join share a pass."""
    prompts = ["The quick", "Two and two make four and four and two make", "In", "One"]
    passes = counted(tiny_streamed, monkeypatch)
    settings = {"slots": 3, "max_len": 5, "temperature": 0.7, "seed": 2, "progress": False}
    found = grokkit.batch(prompts, tiny_streamed, **settings)
    assert found == grokkit.batch(prompts, tiny_lm, **settings)
    assert {c.n_tokens for c in found} == {5}
    # The first three: a pass for their prompts and four for the rest; and the fourth likewise.
    assert len(passes) == 5 + 5


@pytest.mark.slow
def test_requests_one_by_one(tiny_lm, tiny_streamed):
    prompts = ["The quick", "Two and two make four and four and two make"]
    batch = ContinuousBatch(tiny_streamed, slots=2)
    one = batch.submit(prompts[0], max_len=5, temperature=0.0)
    two = batch.submit(prompts[1], max_len=3, seed=3, stop=["e"])
    assert one.result() == tiny_lm.generate(prompts[0], max_len=5, temperature=0.0)
    assert tiny_lm.generate(prompts[1], max_len=3, seed=3).startswith(two.result())


@pytest.mark.slow
def test_a_file_of_prompts_on_the_command_line(tiny_lm, tiny_streamed, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The quick\nTwo and two make\n")
    out = tmp_path / "out.jsonl"
    cli.main(["sample", tiny_streamed.name, "--prompts", str(prompts), "--out", str(out),
              "--max-len", "4", "--seed", "5", "--stream", "--no-progress"])  # fmt: skip
    found = [json.loads(line)["text"] for line in out.read_text().splitlines()]
    assert found == tiny_lm.generate(["The quick", "Two and two make"], max_len=4, seed=5)


def test_a_full_cache_is_refused_as_in_memory(streamed, resident, tokens):
    for lm in (resident, streamed):
        model = lm.runnable
        with jax.set_mesh(lm.mesh):
            cache = KVCache.empty(lm.config, 2, 6, model.dtype, lm.mesh)
            with pytest.raises(PromptError, match="room for 7 more tokens, found 6 of 6 places"):
                model(jnp.asarray(tokens[:, :7]), cache=cache)


@pytest.mark.slow
def test_analyses(streamed, resident, tokens):
    reading, expected = (logit_lens(lm, tokens[:1], ["resid_post"]) for lm in (streamed, resident))
    np.testing.assert_array_equal(reading.top_tokens, expected.top_tokens)
    # Divergences of a few thousandths of a nat, each a sum of differences.
    np.testing.assert_allclose(reading.kl, expected.kl, atol=1e-6)
    losses, expected = (next_token_losses(lm, tokens) for lm in (streamed, resident))
    assert relative_error(losses, expected) < CLOSE
    some = np.arange(tokens.shape[1])[None] == 3
    found, expected = (
        forced_choices(lm, tokens[:1], layers=[2, -1], positions=some, rows=28, progress=False)
        for lm in (streamed, resident)
    )
    assert relative_error(found.loss[:, 3], expected.loss[:, 3]) < 1e-5


def metric(logits):
    return logits[:, -1, 7]


@pytest.mark.slow
def test_a_patching_sweep(streamed, resident, tokens):
    """Many cases share a pass, which begins at the first layer that they change."""
    clean, corrupted = tokens[0, :6], tokens[1, :6]
    sweeps = [
        patch(lm, clean, corrupted, metric, Positions("resid_pre"), rows=24, progress=False)
        for lm in (streamed, resident)
    ]
    assert relative_error(sweeps[0].values, sweeps[1].values) < 1e-5


@pytest.mark.parametrize("at", ["corrupted", "clean"])
@pytest.mark.slow
def test_attribution_patching(at, streamed, resident, tokens, monkeypatch):
    """The gradient comes from a pass from the last layer to the first."""
    passes = counted(streamed, monkeypatch)
    clean, corrupted = tokens[0, :6], tokens[1, :6]
    for grid in (Positions("resid_pre"), Heads(), Experts()):
        found, expected = (
            attribution_patch(lm, clean, corrupted, metric, grid, at) for lm in (streamed, resident)
        )
        assert np.abs(expected.effect).max() > 1e-3
        assert relative_error(found.effect, expected.effect) < 1e-4
    assert len(passes) == 3 * 3  # of both prompts, and back


@pytest.mark.slow
def test_attribution(streamed, resident, tokens, monkeypatch):
    """One pass; and of each layer no more than is needed besides."""
    passes = counted(streamed, monkeypatch)
    for attribute in (
        lambda lm: logit_attribution(lm, tokens, 7, against=9),
        lambda lm: router_attribution(lm, tokens, 5),
    ):
        found, expected = (attribute(lm) for lm in (streamed, resident))
        assert relative_error(found.sum(), expected.sum()) < 1e-5
        for field in ("embed", "heads", "experts", "total"):
            assert relative_error(getattr(found, field), getattr(expected, field)) < 1e-5, field
    assert len(passes) == 2


def test_what_needs_all_layers_is_refused(streamed):
    with pytest.raises(GrokkitError, match=r"all layers in memory .* without stream=True"):
        _ = streamed.model


def test_bill_is_that_of_the_model_in_memory(streamed, resident, tokens):
    found, expected = streamed.bill(tokens), resident.bill(tokens)
    assert found.rows == expected.rows
    assert expected.seconds == 0 and "disk" not in repr(expected)


def test_repr_says_that_it_is_streamed(streamed):
    assert repr(streamed).endswith("mesh data=1 x model=2 of cpu; layers streamed from disk)")


def test_a_pass_that_fails_leaves_the_model_usable(streamed, tokens):
    class Fails(Exception):
        pass

    def fail(x):
        raise Fails

    before = streamed(tokens).logits
    with pytest.raises(Fails) as error:  # which holds on to the failed pass, as a notebook does
        streamed.run_with_cache(tokens, grokkit.Capture("resid_post", reduce=fail))
    np.testing.assert_array_equal(streamed(tokens).logits, before)
    assert error and not any("reading" in t.name for t in threading.enumerate())


def test_a_file_that_goes_is_named(golden_dir, tmp_path, tokens):
    shutil.copytree(golden_dir, tmp_path / "tiny")
    lm = grokkit.load(
        tmp_path / "tiny", grokkit.make_mesh(1, 2), "float32", progress=False, stream=True
    )
    lm(tokens)
    (tmp_path / "tiny" / "ckpt-0" / "tensor00026_000").unlink()
    with pytest.raises(CheckpointError, match=r"tensor00026_000\n.*was there when the checkpoint"):
        lm(tokens)
