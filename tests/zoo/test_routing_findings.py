"""The findings page's tables, on a random model with a little text; and the shipped passages."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from helpers import random_model

import grokkit
from grokkit.errors import GrokkitError
from grokkit.model import place
from grokkit.tokenizer import Tokenizer
from grokkit.zoo.nano.held_out import Passage, load_sample, take_passages
from grokkit.zoo.nano.routing_findings import fill, measure
from grokkit.zoo.nano.routing_tables import prepare

PAGE = Path(__file__).parents[2] / "docs" / "findings-routing.md"
PASSAGES = {
    "english": ["the quick brown fox jumps over", "two and two make four; four"] * 2,
    "german": ["Der Rest ist Schweigen, sagte er", "und ging. Der Rest ist Schweigen"] * 2,
}


@pytest.fixture(scope="module")
def data(tiny_config, tiny_tokenizer_file):
    mesh = grokkit.make_mesh(1, 1)
    tokenizer = Tokenizer.from_file(tiny_tokenizer_file)
    model = place(random_model(tiny_config, 0), mesh)
    lm = grokkit.LanguageModel(model, mesh, tokenizer, "tiny")
    shortest = min(len(tokenizer.encode(t)) for texts in PASSAGES.values() for t in texts)
    return prepare(lm, PASSAGES, shortest, samples=9)


@pytest.mark.slow
def test_tables_fill_the_page(data, monkeypatch):
    monkeypatch.setattr("grokkit.zoo.nano.routing_tables.MIN_COUNT", 2)
    tables = measure(data, per_passage=1, progress=False)
    page = fill(PAGE.read_text(encoding="utf-8"), tables)
    assert fill(page, tables) == page
    for name, table in tables.items():
        assert f"<!-- table: {name} -->\n{table}\n<!-- end -->" in page
    rows = [line.split(" | ") for line in tables["service"].splitlines()[2:]]
    assert len(rows) == 2 * 2 and {len(row) for row in rows} == {10}
    shares = [float(cell.strip("*| ")) for cell in rows[0][2:]]
    assert sum(shares) == pytest.approx(2, abs=0.05)
    assert "of 2 layers" in tables["summary"] and "nan" not in "".join(tables.values())


def test_prepared_arrays_are_the_models(data):
    logits_row = data.lm.run_with_cache(data.ids[:1], ["expert_indices"])[1]["expert_indices"]
    np.testing.assert_array_equal(np.asarray(logits_row)[:, 0], data.experts[:, 0])
    assert data.names == ["english", "german"] and data.domains.tolist() == [0] * 4 + [1] * 4
    with pytest.raises(GrokkitError, match="english: a passage has"):
        prepare(data.lm, PASSAGES, 90, 9)


def test_a_page_with_other_places_is_refused():
    with pytest.raises(GrokkitError, match=r"\['a'\], and the tables are \['b'\]"):
        fill("<!-- table: a -->\n<!-- end -->", {"b": ""})
    with pytest.raises(GrokkitError, match="does not end"):
        fill("<!-- table: a -->", {"a": ""})


def test_shipped_passages_are_five_domains_and_do_not_overlap():
    sample = load_sample()
    assert sorted(sample) == ["code", "french", "prose", "spanish", "verse"]
    for passages in sample.values():
        assert len({p.text for p in passages}) == len(passages) == 16
        assert {len(p.text) for p in passages} == {700}


def test_passages_are_spread_and_do_not_overlap():
    lines = "".join(f"{i:07d}\n" for i in range(100))
    found = take_passages({"a": lines, "b": lines, "short": "x"}, n=10, characters=40)
    assert {p.document for p in found} == {"a", "b"}
    for name in ("a", "b"):
        starts = [lines.index(p.text) for p in found if p.document == name]
        assert all(b - a >= 40 for a, b in itertools.pairwise(starts))
        assert all(start % 8 == 0 for start in starts)
    with pytest.raises(GrokkitError, match="found 0"):
        take_passages({"short": "x"}, 3)


def test_a_file_that_is_no_sample_is_refused(tmp_path):
    path = tmp_path / "sample.json"
    for text in ("{}", "[", '{"domains": {"a": {"passages": [{"document": "x"}]}}}'):
        path.write_text(text)
        with pytest.raises(GrokkitError, match="sample.json: expected held-out passages"):
            load_sample(path)
    path.write_text('{"domains": {"a": {"passages": [{"document": "x", "text": "y"}]}}}')
    assert load_sample(path) == {"a": [Passage("x", "y")]}
