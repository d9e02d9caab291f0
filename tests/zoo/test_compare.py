"""The comparison of models in fewer bits."""

import numpy as np
import pytest

import grokkit
import grokkit.zoo
from grokkit.zoo.nano.compare import chosen_sets, compare, differ, table


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
        "| int4: loss | 2.2000 (+10.00%) | 1.0000 (+0.00%) | 1.6000 (+6.67%) |",
        "| int4: sets changed | 25.0% | 0.0% | 12.5% |",
        "int4: sets changed by layer: 0.0%, 25.0%",
    ]


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
