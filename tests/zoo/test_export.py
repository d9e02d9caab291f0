"""Export: what is shipped is what was trained, in 8 bits."""

import dataclasses
import hashlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grokkit
from grokkit.abstract_model import Output
from grokkit.errors import GrokkitError
from grokkit.quant import dequantize
from grokkit.zoo.nano import evaluate, windows
from grokkit.zoo.nano.data import TOKENIZER_FILE
from grokkit.zoo.nano.export import FLOATS_FILE, export, load_floats
from grokkit.zoo.nano.train import LATEST, initial_state, save_state


@pytest.fixture(scope="module")
def exported(recipe, prepared, tmp_path_factory):
    """A run folder with an untrained state, and the checkpoint exported from it."""
    run = tmp_path_factory.mktemp("exporting")
    for name in (TOKENIZER_FILE, "tokens.npz", "held_out.json"):
        (run / name).write_bytes((prepared / name).read_bytes())
    with jax.numpy_dtype_promotion("standard"):
        state = initial_state(recipe)._replace(step=7)
    save_state(run / LATEST, state)
    directory = run / "checkpoint"
    assert export(recipe, run, directory) == 7
    return run, directory, state


@pytest.fixture(scope="module")
def lm(exported):
    return grokkit.load(exported[1], grokkit.make_mesh(1, 1), "float32", progress=False)


def test_checkpoint_holds_the_rounded_parameters(exported, lm, config):
    _, directory, state = exported
    assert lm.config == config
    assert sorted(p.name for p in directory.iterdir()) == [
        "ckpt-0", "config.json", "tokenizer.model",
    ]  # fmt: skip
    gate = np.asarray(dequantize(lm.model.blocks.moe.gate))
    expected = np.stack([layer["expert_gate"] for layer in state.params["layers"]])
    assert 0 < np.abs(gate - expected).max() < np.abs(expected).max() / 100
    np.testing.assert_array_equal(lm.model.embedding.weight, state.params["embedding"])
    np.testing.assert_array_equal(lm.model.final_norm.scale, state.params["final_norm"])


def test_floats_are_kept(exported, config):
    run, _, state = exported
    params, step = load_floats(run / FLOATS_FILE, config)
    assert step == 7
    assert jax.tree.structure(params) == jax.tree.structure(state.params)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_export_replaces_and_leaves_no_debris(exported, recipe):
    run, directory, state = exported
    other = run / "again" / "nano"
    export(recipe, run, other)
    (other / "card.json").write_text("{}")
    before = evaluate.weights_digest(other)
    changed = {**state.params, "embedding": state.params["embedding"] * 2}
    fresh = dataclasses.replace(recipe, seed=1)
    save_state(run / LATEST, state._replace(params=changed, step=8))
    try:
        assert export(fresh, run, other) == 8
    finally:
        save_state(run / LATEST, state)
        export(recipe, run, directory)
    assert evaluate.weights_digest(other) != before
    assert not (other / "card.json").exists()  # it described other weights
    assert [p.name for p in other.parent.iterdir()] == ["nano"]


def test_export_without_a_run_says_so(recipe, tmp_path):
    with pytest.raises(GrokkitError, match="train first"):
        export(recipe, tmp_path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("length", [64, 65, 96, 300])
def test_every_token_is_scored_once_with_half_a_context_before_it(length):
    stream = np.arange(length)
    rows, counts = evaluate.scored_windows(stream, 64)
    assert rows.shape[1] == 64
    scored = rows[:, 1:][counts]
    np.testing.assert_array_equal(np.sort(scored), np.arange(1, length))
    before = (rows[:, 1:] - rows[:, :1])[counts]
    assert (before[scored >= 64] >= 32).all()


def test_losses_are_the_models_own(lm):
    tokens = np.random.default_rng(0).integers(3, 512, (19, 30))  # more than a batch
    losses = evaluate.model_losses(lm, tokens)
    for row in (0, 18):
        log_probs = jax.nn.log_softmax(lm(tokens[row : row + 1]).logits[0], axis=-1)
        expected = -np.asarray(log_probs)[np.arange(29), tokens[row, 1:]]
        np.testing.assert_allclose(losses[row], expected, rtol=1e-4, atol=1e-5)


class _Oracle(grokkit.LanguageModel):
    """Writes given answers, whatever its weights say."""

    def __init__(self, lm, answer):
        super().__init__(lm.model, lm.mesh, lm.tokenizer)
        self._answer = answer

    def __call__(self, tokens, edits=()):
        logits = np.zeros((*tokens.shape, self.config.vocab_size), np.float32)
        for row, ids in enumerate(tokens):
            question, _, answer = self.tokenizer.decode(ids).partition("=")
            said = self.tokenizer.encode(f"{question}={self._answer(question, answer)}")
            for i in range(len(ids) - 1):
                logits[row, i, said[i + 1]] = 1
        return Output(jnp.asarray(logits), None, {})


def test_sums_are_judged_exactly(lm):
    def right(question, answer):
        return answer

    def wrong_last_digit(question, answer):
        return answer[:-2] + str((int(answer[-2]) + 1) % 10) + "\n"

    def no_newline(question, answer):
        return answer[:-1] + "="

    def right_below_hundred(question, answer):
        return answer if len(answer) == 3 else "999\n"

    shares = [
        evaluate.measure_sums(_Oracle(lm, f))["unseen"]
        for f in (right, wrong_last_digit, no_newline, right_below_hundred)
    ]
    assert shares[:3] == [1, 0, 0]
    unseen = windows.sum_pairs()[1]
    assert shares[3] == pytest.approx((unseen.sum(axis=1) < 100).mean())


@pytest.mark.slow
def test_card_of_an_untrained_model(lm, corpus, exported, capsys, monkeypatch):
    run, directory, _ = exported
    monkeypatch.setattr(evaluate, "BARS", {"red": 0.5, "blue": 1.5})
    monkeypatch.setattr(evaluate, "PERMUTATIONS", 99)
    card = evaluate.evaluate(lm, corpus, run)
    for row in card["domains"].values():
        # An untrained model knows next to nothing: about log2(512) bits a token.
        tokens = sum(map(len, corpus.held_out.values()))
        size = sum(len(t.encode()) for texts in corpus.held_out_texts.values() for t in texts)
        assert row["bits_per_byte"] == pytest.approx(9 * tokens / size, rel=0.25)
        assert row["share_of_xz"] == row["bits_per_byte"] / row["xz_bits_per_byte"]
    assert card["sums"]["unseen"] == 0
    length = lm.config.context_length // 4
    assert card["copying"][f"length_{length}"]["ratio"] == pytest.approx(1, abs=0.1)
    assert card["copying"]["induction"]["heads"] == 0
    load = np.array(card["routing"]["load"])
    np.testing.assert_allclose(load.sum(axis=1), 1, atol=1e-3)
    assert load.shape == (lm.config.n_layers, lm.config.n_experts)
    assert all(0.01 <= p <= 1 for p in card["routing"]["permutation_p"])
    assert abs(card["quantisation"]["relative_cost"]) < 0.01
    assert card["quantisation"]["step"] == 7

    text = evaluate.table(card)
    assert "MISSED" in text and f"{card['sums']['unseen']:.1%} of 8" in text
    evaluate.write_card(card, directory)
    assert (directory / "card.json").exists()
    (directory / "card.json").unlink()
    assert math.isfinite(card["quantisation"]["loss_float"])


def test_weights_digest_changes_with_a_byte(exported, tmp_path):
    _, directory, _ = exported
    copy = tmp_path / "copy" / "ckpt-0"
    copy.mkdir(parents=True)
    for file in (directory / "ckpt-0").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert evaluate.weights_digest(copy.parent) == evaluate.weights_digest(directory)
    last = max(copy.iterdir())
    last.write_bytes(last.read_bytes()[:-1] + b"\0")
    whole = b"".join(f.read_bytes() for f in sorted(copy.iterdir()))
    assert evaluate.weights_digest(copy.parent) == hashlib.sha256(whole).hexdigest()
    assert evaluate.weights_digest(copy.parent) != evaluate.weights_digest(directory)
