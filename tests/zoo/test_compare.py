"""The comparison of models in fewer bits."""

import re
from pathlib import Path

import numpy as np
import pytest

import grokkit
import grokkit.zoo
from grokkit.zoo.nano.compare import (
    chosen_sets,
    compare,
    compare_4_bits,
    differ,
    other_text,
    table,
    token_streams,
)
from grokkit.zoo.nano.data import Corpus

DOCS = Path(__file__).parents[2] / "docs" / "quantisation.md"


def test_sets_differ_whatever_their_order():
    a = np.sort([[0, 1], [3, 2], [4, 5]])
    b = np.sort([[1, 0], [2, 4], [5, 4]])
    assert differ(a, b).tolist() == [False, True, False]


def test_table():
    changed = {"prose": np.array([0.0, 0.5]), "code": np.array([0.0, 0.0])}
    found = {
        "8 bits": {"loss": {"prose": 2.0, "code": 1.0}, "changed": changed},
        "int4": {"loss": {"prose": 2.2, "code": 1.0}, "changed": changed},
    }
    assert table(found).splitlines() == [
        "| | prose | code | mean |",
        "|---|---|---|---|",
        "| 8 bits: loss | 2.0000 | 1.0000 | 1.5000 |",
        "| int4: loss | +10.00 % | +0.00 % | +6.67 % |",
        "| int4: sets changed | 25.0 % | 0.0 % | 12.5 % |",
        "int4: 0.0, 25.0 % of sets changed, layer by layer",
    ]


def test_text_in_the_models_own_tokens():
    lm = grokkit.load("nano", grokkit.make_mesh(1, 1), progress=False)
    found = token_streams(lm.tokenizer, {"prose": ["The duty", "of the"]})
    expected = [*lm.tokenizer.encode("The duty"), 2, *lm.tokenizer.encode("of the"), 2]
    assert found["prose"].tolist() == expected


def test_text_of_other_packages_is_named(tmp_path):
    (tmp_path / "card.json").write_text('{"data": {"prose": "a", "code": "b"}}')
    corpus = Corpus({}, {}, {}, digests={"prose": "a", "code": "c"}, tokenizer=b"")
    assert other_text(tmp_path, corpus) == ["code"]
    assert other_text(tmp_path / "elsewhere", corpus) == []


@pytest.mark.slow
def test_the_cost_that_the_documentation_states():
    """On the passages that ship with nano, as `python -m grokkit.zoo.nano compare` prints it."""
    printed = {
        line.split(" | ")[0].removeprefix("| "): line.removesuffix(" |").split(" | ")[1:]
        for line in compare_4_bits(Path(str(grokkit.zoo.shipped("nano")))).splitlines()
        if line.startswith("| groups of")
    }
    said = re.search(
        r"with groups of 32 \+([\d.]+) % and ([\d.]+) %", " ".join(DOCS.read_text().split())
    )
    assert said is not None
    for kind, text, tolerance in [("loss", said[1], 0.03), ("sets changed", said[2], 0.2)]:
        mean = float(printed[f"groups of 32: {kind}"][-1].removesuffix(" %"))
        assert mean == pytest.approx(float(text), abs=tolerance)


@pytest.mark.slow
def test_compared_with_itself_and_with_4_bits(tmp_path):
    mesh = grokkit.make_mesh(1, 1)
    target = tmp_path / "int4"
    grokkit.convert(grokkit.zoo.shipped("nano"), target, experts="int4", progress=False)
    lm = grokkit.load("nano", mesh, progress=False)
    models = {"a": lm, "b": lm, "c": grokkit.load(target, mesh, progress=False)}
    text = "Two and two make four, and the annual message of the president said so. " * 40
    stream = np.array(lm.tokenizer.encode(text))
    found = compare(models, {"text": stream}, windows=16)
    assert found["a"]["loss"] == found["b"]["loss"]
    assert not found["b"]["changed"]["text"].any()
    assert found["c"]["loss"]["text"] == pytest.approx(found["a"]["loss"]["text"], rel=0.05)
    changed = found["c"]["changed"]["text"]
    # Before the first layer's experts nothing has changed, after them a little has.
    assert changed[0] == 0 and 0 < changed[-1] < 0.2
    assert chosen_sets(lm, stream[None, :256].repeat(16, 0)).shape == (16, 6, 256, 2)
