"""The measurements behind docs/findings-circuits.md, on a model with random weights."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import reference
from helpers import random_model

import grokkit
from grokkit.errors import GrokkitError
from grokkit.model import place
from grokkit.tokenizer import Tokenizer
from grokkit.zoo.nano import circuit_findings, circuit_tables

PAGE = Path(__file__).parents[2] / "docs" / "findings-circuits.md"
PASSAGES = ["The quick brown fox jumps over the lazy dog. " * 4, "Two and two make four; " * 16] * 4


@pytest.fixture(scope="module")
def lm(tiny_config, tiny_tokenizer_file):
    mesh = grokkit.make_mesh(1, 1)
    model = place(random_model(tiny_config, 0), mesh)
    return grokkit.LanguageModel(model, mesh, Tokenizer.from_file(tiny_tokenizer_file), "tiny")


def test_copies(lm):
    kinds = circuit_tables.make_copies(lm, PASSAGES, 6, 10)
    assert len(kinds) == 3
    for copies in kinds:
        assert copies.repeated.shape == copies.unrelated.shape == (6, 20)
        np.testing.assert_array_equal(copies.repeated[:, :10], copies.repeated[:, 10:])
        np.testing.assert_array_equal(copies.unrelated[:, 10:], copies.repeated[:, 10:])
        assert (copies.unrelated[:, :10] != copies.repeated[:, :10]).any(axis=1).all()
    assert all(len(np.unique(row)) <= 16 for row in kinds[1].unrelated)


def test_loss_without_heads(lm):
    """Against silencing by the edit that names layers and heads, and a loss written out."""
    tokens = circuit_tables.make_copies(lm, PASSAGES, 2, 6)[0].repeated
    edits = [grokkit.Scale("z", 0.0, layers=[0], heads=[3, 5]),
             grokkit.Scale("z", 0.0, layers=[1], heads=[2])]  # fmt: skip
    logits = np.asarray(lm(tokens, edits=edits).logits, np.float64)
    losses = [
        -np.log(reference.softmax(logits[row, i - 1])[tokens[row, i]])
        for row in range(2)
        for i in range(7, 12)
    ]
    silent = circuit_tables.without_heads(lm, [(0, 3), (0, 5), (1, 2)])
    found = circuit_tables.second_half_loss(lm, tokens, [silent])
    assert found == pytest.approx(np.mean(losses), abs=1e-4)


def test_ranking_and_controls(lm):
    scores = np.array([[0.1, 0.9, 0.3], [0.5, 0.2, 0.4]])
    assert circuit_tables.ranked(scores, 3) == [(0, 1), (1, 0), (1, 2)]
    heads = [(0, 1), (0, 4), (1, 7)]
    for seed in range(5):
        others = circuit_tables.matched_heads(lm, heads, np.random.default_rng(seed))
        assert [layer for layer, _ in others] == [0, 0, 1]
        assert not set(others) & set(heads) and len(set(others)) == 3


def test_right_sums(lm, monkeypatch):
    """A model that always writes one row's answer is right about that row alone."""
    pairs = np.array([[27, 58], [11, 22]])
    row = np.array(lm.tokenizer.encode("27+58=85\n"))
    logits = np.zeros((2, len(row), lm.config.vocab_size))
    logits[:, np.arange(len(row) - 1), row[1:]] = 1
    monkeypatch.setattr(type(lm), "__call__", lambda *a, **k: SimpleNamespace(logits=logits))
    assert circuit_tables.sum_accuracy(lm, pairs).tolist() == [True, False]


def test_the_page_has_a_place_for_each_table():
    places = re.findall(r"<!-- table: (\S+) -->", PAGE.read_text(encoding="utf-8"))
    sums = [f"sum-{question.name}" for question in circuit_tables.QUESTIONS]
    expected = ["summary", "heads", "knockout", *sums, "sum-stream", "sum-knockout", "lens"]
    assert places == expected


def test_too_little_text(lm):
    with pytest.raises(GrokkitError, match="at least 4 passages of 96 tokens, .* found 0 passages"):
        circuit_findings.measure(lm, ["Too short."] * 8)


@pytest.mark.slow
def test_everything_is_measured(lm):
    tables = circuit_findings.measure(
        lm, PASSAGES, count=2, length=8, n_sums=4, lens_steps=2, progress=False
    )
    places = re.findall(r"<!-- table: (\S+) -->", PAGE.read_text(encoding="utf-8"))
    assert sorted(tables) == sorted(places)
    assert "| L0H" in tables["heads"] or "| L1H" in tables["heads"]
    assert "nan" not in "".join(tables.values())
    total = re.findall(r"all terms .*\| ([-+\d.]+) \| ([-+\d.]+) \|", tables["sum-tens"])[0]
    prompts = ("27+58=", "27+48=")
    eight, seven = (lm.tokenizer.encode(f"1{digit}")[-1] for digit in "87")
    for prompt, found in zip(prompts, total, strict=True):
        logits = np.asarray(lm(prompt).logits)[0, -1]
        assert float(found) == pytest.approx(logits[eight] - logits[seven], abs=0.006)
