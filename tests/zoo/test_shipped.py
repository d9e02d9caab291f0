"""The shipped nano: its files, its card, and the page that quotes the card."""

import json
from pathlib import Path

import pytest

import grokkit
from grokkit.zoo import shipped
from grokkit.zoo.nano import evaluate

NANO_PAGE = Path(__file__).parents[2] / "docs" / "nano.md"


@pytest.fixture(scope="module")
def directory():
    found = shipped("nano")
    assert found is not None
    return found


@pytest.fixture(scope="module")
def card(directory):
    return json.loads((directory / evaluate.CARD_FILE).read_text())


def test_preset_is_the_shipped_config(directory):
    assert grokkit.GrokConfig.from_json(directory / "config.json") == grokkit.NANO


def test_small_enough_to_ship(directory):
    assert sum(f.stat().st_size for f in directory.rglob("*") if f.is_file()) < 25e6


def test_unknown_model_is_not_shipped():
    assert shipped("giant") is None


def test_card_is_of_these_weights(directory, card):
    assert card["weights_sha256"] == evaluate.weights_digest(directory)
    assert card["parameters"] == grokkit.NANO.n_params


def test_page_quotes_the_card(card):
    assert evaluate.table(card) in NANO_PAGE.read_text()


def test_a_figure_of_the_card_is_reached_again(directory, card):
    lm = grokkit.load(directory, grokkit.make_mesh(1, 8), "float32", progress=False)
    length = lm.config.context_length // 8
    tokens = evaluate.repeated_sequences(7, 32, length, lm.config.vocab_size)
    losses = evaluate.model_losses(lm, tokens).mean(axis=0)
    found = card["copying"][f"length_{length}"]
    assert losses[: length - 1].mean() == pytest.approx(found["first_half"], rel=1e-3)
    assert losses[length:].mean() == pytest.approx(found["second_half"], rel=1e-3)
