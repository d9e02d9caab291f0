"""Every explorer shows what the model computed, says what is wrong, and can be saved."""

import json
import re
import threading

import numpy as np
import pytest
import reference
from helpers import random_model

from grokkit import ForbidExperts, ForceExperts, Replace, RequireExperts, make_mesh
from grokkit.analysis.lens import logit_lens
from grokkit.analysis.patching import Experts, LogitDifference, Positions, patch
from grokkit.config import GrokConfig
from grokkit.errors import GrokkitError, PromptError
from grokkit.language_model import LanguageModel
from grokkit.runtime import compiling
from grokkit.tokenizer import Tokenizer
from grokkit.widgets import (
    AttentionExplorer,
    LensExplorer,
    PatchingExplorer,
    RoutingExplorer,
    SamplingPlayground,
    patching,
)
from grokkit.widgets.attention import STEPS, attention_data, pack_causal
from grokkit.widgets.lens import LensReading, followed_tokens, lens_data, one_token
from grokkit.widgets.routing import Request, expert_edits, mean_loss, routing_data
from grokkit.widgets.view import page

TEXT = "The quick brown fox jumps"
EVIL = 'fox <script>window.broken = 1</script> & "dog"'
CLEAN, CORRUPTED = "Two and two make", "Two and fox make"


@pytest.fixture(scope="module")
def tiny_lm(tiny_config, tiny_tokenizer_file):
    """On one device, for which programs compile faster; the browser's tests use eight."""
    mesh = make_mesh(1, 1)
    tokenizer = Tokenizer.from_file(tiny_tokenizer_file)
    return LanguageModel(random_model(tiny_config, 0, mesh), mesh, tokenizer, "tiny")


@pytest.fixture(scope="module")
def n(tiny_lm):
    return len(tiny_lm.tokenizer.encode(TEXT))


def test_routing_equals_the_cache(tiny_lm, n, settled):
    explorer = settled(RoutingExplorer(tiny_lm, TEXT, layer=1))
    _, cache = tiny_lm.run_with_cache(TEXT, ["router_probs", "expert_indices", "expert_weights"])
    data = explorer.data
    assert data["tokens"] == tiny_lm.to_str_tokens(TEXT) and explorer.layer == 1
    np.testing.assert_array_equal(data["experts"], cache["expert_indices"][:, 0])
    np.testing.assert_allclose(data["probs"], cache["router_probs"][:, 0], atol=1e-5)
    np.testing.assert_allclose(data["weights"], cache["expert_weights"][:, 0], atol=1e-5)
    assert np.shape(data["probs"]) == (2, n, 8) and data["change"] is None


def padded(ids):
    """With enough pads for the explorers' lengths: another would compile another program."""
    return ids + [0] * (-len(ids) % 16)


def test_routing_changes(tiny_lm, settled):
    edits = [ForbidExperts([0, 5]), RequireExperts(3)]
    explorer = settled(RoutingExplorer(tiny_lm, TEXT, layer=1, n_new=4))
    explorer.change(forced=[3], forbidden=[0, 5])
    settled(explorer)
    prompt = tiny_lm.tokenizer.encode(TEXT)
    sites = ("router_probs", "expert_indices", "expert_weights")
    _, cache = tiny_lm.run_with_cache([padded(prompt)], sites, edits=edits)
    chosen = cache["expert_indices"][:, 0, : len(prompt)]
    np.testing.assert_array_equal(explorer.data["experts"], chosen)
    words = "expert 3 forced, expert 0 forbidden, expert 5 forbidden in every layer"
    assert explorer.data["change"] == words
    outcome = explorer.data["outcome"]
    drawn = [
        [t.id for t in tiny_lm.stream(TEXT, max_len=4, temperature=0.0, edits=some)]
        for some in ([], edits)
    ]
    rows = [padded(prompt + new) for new in drawn]
    for j, judge in enumerate(([], edits)):
        probs = reference.softmax(np.asarray(tiny_lm(rows, edits=judge).logits, np.float64))
        for i, new in enumerate(drawn):
            each = [-np.log(probs[i, len(prompt) - 1 + k, t]) for k, t in enumerate(new)]
            assert outcome["losses"][i][j] == pytest.approx(np.mean(each), abs=1e-4)
    for text, new in zip(outcome["texts"], drawn, strict=True):
        # Of a character that is cut off in the midst of its bytes nothing is shown.
        assert tiny_lm.to_string(prompt + new).startswith(TEXT + text)
        assert len(tiny_lm.to_string(prompt + new)) - len(TEXT + text) <= 3
    explorer.change()
    settled(explorer)
    assert explorer.data["change"] is None and "outcome" not in explorer.data


@pytest.mark.parametrize(
    ("request_", "edits"),
    [
        (Request(TEXT, (6, 1), (), (1,)), [ForceExperts([6, 1], layers=[1])]),
        (Request(TEXT, (), (2, 7), None), [ForbidExperts([2, 7])]),
        (Request(TEXT, (), (), None), []),
    ],
)
def test_buttons_are_edits(tiny_lm, request_, edits):
    ids = [padded(tiny_lm.tokenizer.encode(TEXT))]
    found, expected = (
        tiny_lm.run_with_cache(ids, "expert_indices", edits=some)[1]["expert_indices"]
        for some in (expert_edits(tiny_lm, request_), edits)
    )
    np.testing.assert_array_equal(found, expected)


def test_another_layer_computes_nothing(tiny_lm, settled):
    explorer = settled(RoutingExplorer(tiny_lm, TEXT))
    before = explorer.data
    explorer.layer = 1
    assert not explorer.busy and explorer.data is before


def test_attention_equals_the_cache(tiny_lm, n, settled):
    explorer = settled(AttentionExplorer(tiny_lm, TEXT))
    _, cache = tiny_lm.run_with_cache(TEXT, "pattern")
    pattern = np.asarray(cache["pattern"])[:, 0]
    for layer in (0, 1):  # the live view holds one layer, and asks for another
        explorer.show(layer, 5)
        assert list(explorer.data["patterns"]) == [str(layer)]
        np.testing.assert_allclose(unpacked(explorer.data, layer, n), pattern[layer], atol=1.3e-4)
    whole = explorer._whole_data()
    np.testing.assert_allclose(unpacked(whole, 0, n), pattern[0], atol=1.3e-4)
    assert set(whole["patterns"]) == {"0", "1"}


def unpacked(data, layer, n):
    """Patterns as the page reads them."""
    rows, columns = np.tril_indices(n)
    digits = [data["letters"].index(letter) for letter in data["patterns"][str(layer)]]
    entries = np.array(digits).reshape(-1, 2) @ [64, 1]
    pattern = np.zeros((data["n_heads"], n, n))
    pattern[:, rows, columns] = entries.reshape(data["n_heads"], -1) / data["steps"]
    return pattern


def test_packing_keeps_the_lower_triangle():
    pattern = np.array([[[1.0, 0.0], [0.25, 0.75]]])
    np.testing.assert_array_equal(
        pack_causal(pattern), [[STEPS, round(STEPS / 4), round(STEPS * 0.75)]]
    )


def test_lens_equals_the_reading(tiny_lm, n, settled):
    explorer = settled(LensExplorer(tiny_lm, TEXT))
    reading = logit_lens(tiny_lm, TEXT, ["embed", "resid_post"], top=5)
    data = explorer.data
    assert data["depths"] == ["embed", "layer 0", "layer 1"]
    np.testing.assert_array_equal(data["top"], reading.top_tokens[:, 0])
    np.testing.assert_allclose(data["probs"], np.exp(reading.top_log_probs[:, 0]), atol=1e-4)
    np.testing.assert_allclose(data["kl"], reading.kl[:, 0], atol=1e-3)
    ids = tiny_lm.tokenizer.encode(TEXT)
    log_probs = np.log(reference.softmax(np.asarray(tiny_lm(TEXT).logits[0], np.float64)))
    assert [line[0] for line in data["lines"]][:-1] == ids[1:]
    assert [line[1] for line in data["lines"]] == log_probs.argmax(axis=-1).tolist()
    for i, line in enumerate(data["lines"]):
        expected = np.exp(log_probs[i, line])
        np.testing.assert_allclose(data["line_probs"][-1][i], expected, rtol=1e-3, atol=1e-6)
    for i in np.unique(data["top"]):
        assert data["names"][str(i)] == tiny_lm.to_str_tokens(np.array([i]))[0]


def test_lens_follows_a_token_by_name_and_by_click(tiny_lm, settled):
    explorer = settled(LensExplorer(tiny_lm, TEXT))
    explorer.follow("␣four")
    settled(explorer)
    four = one_token(tiny_lm, " four")
    assert tiny_lm.to_str_tokens([four]) == [" four"]
    assert explorer.data["follow"] == four
    assert {line[2] for line in explorer.data["lines"]} == {four}
    clicked = explorer.data["top"][1][0][0]
    explorer.view.state = {"token": 0, "follow": clicked}  # as the page does
    settled(explorer)
    assert explorer.data["follow"] == clicked
    explorer.follow(" quick brown")
    settled(explorer)
    assert re.search(r"' quick brown' is \d+ tokens, .* name one", explorer.error)
    explorer.follow("")
    settled(explorer)
    assert explorer.data["follow"] is None and not explorer.error


def test_followed_tokens():
    found = followed_tokens(np.array([5, 6, 7]), np.array([1, 2, 3]), 9)
    np.testing.assert_array_equal(found, [[6, 1, 9], [7, 2, 9], [3, 3, 9]])
    np.testing.assert_array_equal(followed_tokens(np.array([5]), np.array([1]), None), [[1, 1, 1]])


def test_sampling_is_the_stream_and_branches(tiny_lm, settled):
    settings = {"temperature": 1.2, "top_p": 0.9, "seed": 4}
    playground = settled(SamplingPlayground(tiny_lm, TEXT, max_len=6, **settings))
    pieces = list(tiny_lm.stream(TEXT, max_len=6, **settings))
    assert playground.token_ids == [piece.id for piece in pieces]
    for entry, piece in zip(playground.data["drawn"], pieces, strict=True):
        assert entry["prob"] == pytest.approx(piece.prob, abs=1e-5)
        assert [a[0] for a in entry["alternatives"]] == [a[0] for a in piece.alternatives]
    other = next(a for a in playground.alternatives(2) if a[0] != pieces[2].id)
    playground.view._handle_custom_msg({"at": 2, "id": other[0]}, [])  # as a click does
    settled(playground)
    begun = [piece.id for piece in pieces[:2]] + [other[0]]
    rest = tiny_lm.stream(tiny_lm.tokenizer.encode(TEXT) + begun, max_len=3, **settings)
    assert playground.token_ids == begun + [piece.id for piece in rest]
    by_hand = playground.data["drawn"][2]
    assert by_hand["by_hand"] and by_hand["text"] == other[1]
    assert by_hand["prob"] == pytest.approx(other[2])
    with pytest.raises(PromptError, match="is no alternative there"):
        playground.branch(0, 999)
    playground.view._handle_custom_msg({"at": 77, "id": 1}, [])
    assert playground.error == "there is no token 77; 6 were drawn"


@pytest.mark.parametrize(
    ("site", "grid", "cell"),
    [
        ("stream before each layer", Positions("resid_pre"), (1, 2)),
        ("experts", Experts(), (1, 4)),
    ],
)
def test_patching_equals_the_sweep(tiny_lm, settled, site, grid, cell):
    explorer = settled(PatchingExplorer(tiny_lm, CLEAN, CORRUPTED, " four", " the", site))
    assert not explorer.error
    metric = LogitDifference(one_token(tiny_lm, " four"), one_token(tiny_lm, " the"))
    sweep = patch(tiny_lm, CLEAN, CORRUPTED, metric, grid, progress=False)
    data = explorer.data
    np.testing.assert_allclose(data["values"], sweep.values, atol=1e-4)
    assert data["clean"] == pytest.approx(sweep.clean, abs=1e-4)
    assert data["corrupted"] == pytest.approx(sweep.corrupted, abs=1e-4)
    assert data["axis"] == grid.axis
    explorer.show(*cell)
    settled(explorer)
    run = explorer.data["runs"]["{},{}".format(*cell)]
    # The run of one cell is another program than the sweep: the same number both ways.
    assert run["metric"] == pytest.approx(sweep.values[cell], abs=1e-4)
    assert set(explorer.data["runs"]) == {"clean", "corrupted", "{},{}".format(*cell)}


def test_patching_defaults_to_what_the_runs_predict(tiny_lm, settled):
    explorer = settled(PatchingExplorer(tiny_lm, CLEAN, CORRUPTED))
    best = [int(np.asarray(tiny_lm(text).logits[0, -1]).argmax()) for text in (CLEAN, CORRUPTED)]
    if best[0] == best[1]:
        assert "so that their difference is always 0" in explorer.error
        explorer = settled(PatchingExplorer(tiny_lm, CLEAN, CORRUPTED, against=" the"))
    assert not explorer.error
    assert explorer.data["answer"] == tiny_lm.to_str_tokens([best[0]])[0]
    explorer.show(9, 0)
    settled(explorer)
    assert explorer.error.startswith("there is no cell 9, 0; the sweep has 2 layers")


MAKERS = [
    lambda lm, text: RoutingExplorer(lm, text),
    lambda lm, text: AttentionExplorer(lm, text),
    lambda lm, text: LensExplorer(lm, text),
    lambda lm, text: SamplingPlayground(lm, text, max_len=3),
    lambda lm, text: PatchingExplorer(lm, text, text, " four", " the"),
]
NAMES = ["routing", "attention", "lens", "sampling", "patching"]


@pytest.mark.parametrize("make", MAKERS, ids=NAMES)
def test_a_bad_prompt_is_said_in_place(tiny_lm, settled, make):
    explorer = settled(make(tiny_lm, TEXT))
    good = explorer.data
    field = explorer._inputs[0] if hasattr(explorer, "_inputs") else explorer._text
    for bad, words in (("", "empty"), ("fox " * 300, "tokens")):
        field.value = bad
        settled(explorer)
        assert words in explorer.error and explorer.error in repr(explorer)
        assert words in explorer._status.value and 'role="alert"' in explorer._status.value
        assert explorer.view.status == "failed"
        assert explorer.data == good  # the page still has something to show
        with pytest.raises(GrokkitError, match="nothing to save"):
            explorer.to_html("never written")
    field.value = TEXT
    settled(explorer)
    assert not explorer.error and "ready" in explorer._status.value
    assert explorer.view.status == "ready"


@pytest.mark.parametrize("make", MAKERS, ids=NAMES)
def test_a_prompt_with_markup_is_harmless(tiny_lm, settled, make, tmp_path):
    explorer = settled(make(tiny_lm, EVIL))
    assert not explorer.error
    path = explorer.to_html(tmp_path / "explorer.html")
    text = path.read_text()
    assert len(re.findall(r"<script\b", text)) == 2 and text.count("window.broken") <= 1
    found = re.search(r'id="grokkit-data">(.*?)</script>', text)
    assert found is not None
    assert json.loads(found[1]) == {
        "kind": explorer.kind, "data": explorer._whole_data(), "state": explorer.view.state
    }  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["explorer.html"]


def test_busy_while_computing_and_a_newer_text_supersedes(tiny_lm, settled, monkeypatch):
    explorer = settled(RoutingExplorer(tiny_lm, TEXT))
    reached, go_on = threading.Event(), threading.Event()
    run = LanguageModel.run_with_cache

    def slow(*arguments, **options):
        if not reached.is_set():
            reached.set()
            assert go_on.wait(60)
        return run(*arguments, **options)

    monkeypatch.setattr(LanguageModel, "run_with_cache", slow)
    shown = []
    explorer.view.observe(lambda change: shown.append(change["new"]["tokens"]), "data")
    explorer.text = "The lazy dog"
    assert reached.wait(60)
    assert explorer.busy and "computing" in explorer._status.value and "busy" in repr(explorer)
    assert explorer.view.status == "busy"
    explorer.text = "four"  # returns at once
    explorer.refresh()  # the button after the field: the same request
    go_on.set()
    settled(explorer)
    assert shown == [tiny_lm.to_str_tokens("four")]
    assert explorer.view.status == "ready"


def test_a_compilation_is_told(tiny_lm, settled, monkeypatch):
    explorer = settled(RoutingExplorer(tiny_lm, TEXT))
    run = LanguageModel.run_with_cache
    shown, told = [], threading.Event()

    def show(change):
        shown.append(re.sub("<[^>]*>", "", change["new"]))
        if "compiling" in change["new"]:
            told.set()

    def slow(*arguments, **options):
        with compiling.notice("compiling <it>", kept=True):
            assert told.wait(60)
        return run(*arguments, **options)

    monkeypatch.setattr(compiling, "_DELAY", 0.0)
    monkeypatch.setattr(LanguageModel, "run_with_cache", slow)
    explorer._status.observe(show, "value")
    explorer.text = "The lazy dog"
    settled(explorer)
    line = "compiling &lt;it&gt;, once; kept for the next time (1 s)"
    assert shown[:2] == ["computing …", line] and shown[-1] == "ready"


def test_an_unexpected_error_is_told_and_survived(tiny_lm, settled, monkeypatch):
    explorer = settled(AttentionExplorer(tiny_lm, TEXT))

    def broken(*_, **__):
        raise RuntimeError("out of <memory>")

    monkeypatch.setattr(LanguageModel, "run_with_cache", broken)
    explorer.text = "fox"
    settled(explorer)
    assert explorer.error == "RuntimeError: out of <memory>"
    assert "out of &lt;memory&gt;" in explorer._status.value
    assert "in broken" in explorer.traceback
    monkeypatch.undo()
    explorer.refresh()
    settled(explorer)
    assert not explorer.error and explorer.data["tokens"] == tiny_lm.to_str_tokens("fox")


def test_pages_of_64_tokens_and_8_layers_are_small():
    config = GrokConfig(
        vocab_size=512, d_model=48, n_layers=8, n_heads=48, n_kv_heads=8, d_head=2, d_ff=8
    )
    rng = np.random.default_rng(0)
    n, tokens = 64, [" unhappily"] * 64
    layers, heads, k = config.n_layers, config.n_heads, config.n_experts_per_token
    probs = rng.dirichlet(np.ones(config.n_experts), (layers, n)).astype(np.float32)
    indices = np.argsort(-probs, axis=-1)[..., :k]
    weights = np.take_along_axis(probs, indices, axis=-1)
    pattern = rng.dirichlet(np.ones(n), (layers, heads, n)).astype(np.float32)
    top = rng.integers(0, 512, (layers + 1, 1, n, 5))
    depths = (("embed", None), *(("resid_post", i) for i in range(layers)))
    logs = np.log(rng.uniform(0, 1, top.shape)).astype(np.float32)
    kl = rng.uniform(0, 9, (layers + 1, 1, n)).astype(np.float32)
    reading = LensReading(depths, top, logs, kl, logs[..., :3])
    names = {str(i): " unhappily" for i in range(512)}
    run = {"metric": 1.23456, "top": [[i, " unhappily", 0.12345] for i in range(8)]}
    entry = {"id": 100000, "text": " unhappily", "prob": 0.12345, "by_hand": False,
             "alternatives": [[100000, " unhappily", 0.12345]] * 8}  # fmt: skip
    data = {
        "routing": routing_data(tokens, probs, indices, weights),
        "attention": attention_data(tokens, pack_causal(pattern), range(layers)),
        "lens": lens_data(tokens, names, reading, top[0, 0, :, :3], 7),
        "sampling": {"prompt": "x", "drawn": [entry] * n, "ended": False, "done": True},
        "patching": {
            "site": "experts", "estimate": False, "axis": "position", "answer": "x",
            "against": "y", "clean": 1.0, "corrupted": 0.0,
            "tokens": {"clean": tokens, "corrupted": tokens},
            "values": rng.normal(size=(layers, n)).round(5).tolist(),
            # Even with the run of every cell opened.
            "runs": {f"{i},{j}": run for i in range(layers) for j in range(n)},
        },
    }  # fmt: skip
    sizes = {kind: len(page(kind, kind, found, {}).encode()) for kind, found in data.items()}
    assert max(sizes.values()) < 2 * 10**6, sizes
    assert sizes["attention"] > layers * heads * n * (n + 1) // 2  # all heads are in it


def test_a_page_too_large_is_refused(tiny_lm, settled, monkeypatch, tmp_path):
    monkeypatch.setattr("grokkit.widgets.explorer.MAX_PAGE_BYTES", 1000)
    explorer = settled(RoutingExplorer(tiny_lm, TEXT))
    with pytest.raises(GrokkitError, match=r"would take [\d,]+ bytes, more than the 1,000"):
        explorer.to_html(tmp_path / "large.html")
    assert list(tmp_path.iterdir()) == []


def test_mean_loss_by_hand():
    logits = np.log([[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]]).astype(np.float32)
    assert mean_loss(logits, [0, 0, 1], 1) == pytest.approx(-np.log(0.5 * 0.75) / 2, abs=1e-4)
    assert mean_loss(logits, [0, 0, 1], 3) is None


def test_a_cell_is_the_edit_by_hand(tiny_lm, settled):
    """What a click runs, against patching written out."""
    explorer = settled(PatchingExplorer(tiny_lm, CLEAN, CORRUPTED, " four", " the"))
    _, cache = tiny_lm.run_with_cache(CLEAN, "resid_pre")
    edit = Replace("resid_pre", np.asarray(cache["resid_pre"]), layers=[1], positions=[3])
    expected = np.asarray(tiny_lm(CORRUPTED, edits=[edit]).logits[0, -1])
    assert explorer._swept is not None
    run = patching.run_case(tiny_lm, explorer._swept, 1, 3)
    probs = reference.softmax(expected.astype(np.float64))
    assert [each[0] for each in run["top"]] == np.argsort(-probs)[:8].tolist()
    np.testing.assert_allclose(
        [each[2] for each in run["top"]], np.sort(probs)[::-1][:8], atol=2e-5
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda lm: RoutingExplorer(lm, layer=2), r"layer: there are 2, 0 to 1; found 2"),
        (lambda lm: AttentionExplorer(lm, head=8), r"a head from 0 to 7, found 0 and 8"),
        (lambda lm: PatchingExplorer(lm, site="everything"), r"found 'everything'"),
        (lambda lm: LensExplorer(lm, max_tokens=0), r"max_tokens must be at least 1"),
    ],
)
def test_bad_arguments(tiny_lm, make, message):
    with pytest.raises(PromptError, match=message):
        make(tiny_lm)


@pytest.mark.parametrize(
    ("forced", "forbidden", "message"),
    [
        ([1, 2, 3], [], "3 experts are forced, and a token uses 2; release one"),
        ([], list(range(7)), "7 of 8 experts are forbidden, and a token needs 2; allow another"),
        ([1], [1], "expert 1 is both forced and forbidden"),
    ],
)
def test_too_many_experts_are_refused_in_place(tiny_lm, settled, forced, forbidden, message):
    explorer = RoutingExplorer(tiny_lm, TEXT)
    explorer.change(forced, forbidden)
    settled(explorer)
    assert explorer.error == message


@pytest.mark.slow
def test_a_mesh_with_a_data_axis(tiny_config, tiny_tokenizer_file, tiny_lm, settled):
    """Texts are repeated for it."""
    mesh = make_mesh(2, 4)
    tokenizer = Tokenizer.from_file(tiny_tokenizer_file)
    lm = LanguageModel(random_model(tiny_config, 0, mesh), mesh, tokenizer, "spread")
    makers = {
        RoutingExplorer: lambda lm: RoutingExplorer(lm, TEXT),
        LensExplorer: lambda lm: LensExplorer(lm, TEXT),
        PatchingExplorer: lambda lm: PatchingExplorer(lm, CLEAN, CORRUPTED, " four", " the"),
    }
    for kind, make in makers.items():
        found, expected = settled(make(lm)), settled(make(tiny_lm))
        assert not found.error
        key = {RoutingExplorer: "probs", LensExplorer: "probs", PatchingExplorer: "values"}[kind]
        np.testing.assert_allclose(found.data[key], expected.data[key], atol=1e-3)
        if kind is PatchingExplorer:
            found.show(1, 1)
            assert not settled(found).error
            metric = found.data["runs"]["1,1"]["metric"]
            assert metric == pytest.approx(expected.data["values"][1][1], abs=1e-3)
    there, here = (settled(SamplingPlayground(each, TEXT, max_len=4)) for each in (lm, tiny_lm))
    assert not there.error and there.token_ids == here.token_ids and len(there.token_ids) == 4
    routing = {}
    for each in (lm, tiny_lm):
        explorer = RoutingExplorer(each, TEXT, n_new=3)
        explorer.change(forced=[1])
        routing[each] = settled(explorer).data["outcome"]
    assert routing[lm]["texts"] == routing[tiny_lm]["texts"]
    np.testing.assert_allclose(routing[lm]["losses"], routing[tiny_lm]["losses"], atol=1e-3)
