"""Forced choices against plain forward passes with the same edit, removals against loops."""

import math

import numpy as np
import pytest
from helpers import random_model, reference_weights
from jaxtyping import TypeCheckError
from reference import forward as reference_forward

import grokkit
from grokkit.analysis.causal_routing import (
    _decode,
    chosen_set,
    expert_sets,
    forced_choices,
    next_token_losses,
    remove_experts,
    set_probability,
)
from grokkit.errors import GrokkitError, SiteError
from grokkit.model import place
from grokkit.tokenizer import Tokenizer

TEXTS = ["the quick brown fox", "two and two make four"]


@pytest.fixture(scope="module")
def tiny_lm(tiny_config, tiny_tokenizer_file):
    """On one device, where programs compile soonest."""
    mesh = grokkit.make_mesh(1, 1)
    model = place(random_model(tiny_config, 0), mesh)
    return grokkit.LanguageModel(model, mesh, Tokenizer.from_file(tiny_tokenizer_file), "tiny")


def loss_of(logits, ids):
    """Cross-entropy of each next token of one row, by its definition in float64."""
    logits = np.asarray(logits, np.float64)
    losses = []
    for t in range(len(ids) - 1):
        shifted = logits[t] - logits[t].max()
        losses.append(math.log(np.exp(shifted).sum()) - shifted[ids[t + 1]])
    return np.array(losses)


@pytest.fixture(scope="module")
def ids(tiny_lm):
    return tiny_lm.to_tokens(TEXTS)


@pytest.fixture(scope="module")
def forced(tiny_lm):
    return forced_choices(tiny_lm, TEXTS, rows=32, progress=False)


def test_next_token_losses_are_the_references(tiny_lm, ids):
    found = next_token_losses(tiny_lm, TEXTS)
    out = reference_forward(reference_weights(tiny_lm.model), tiny_lm.config, ids[:1])
    n = len(tiny_lm.tokenizer.encode(TEXTS[0]))
    expected = loss_of(out["logits"][0], ids[0, :n])
    np.testing.assert_allclose(found[0, : n - 1], expected, atol=2e-5)
    assert np.isnan(found[0, n - 1 :]).all()


def test_sets_and_their_probability():
    sets = expert_sets(grokkit.GROK_1)
    assert sets.shape == (28, 2)
    assert sets[0].tolist() == [0, 1] and sets[-1].tolist() == [6, 7]
    probs = np.arange(8) / 28
    np.testing.assert_allclose(set_probability(probs, sets)[[0, -1]], [1 / 28, 13 / 28])
    assert chosen_set(np.array([[7, 6], [0, 1]]), sets).tolist() == [27, 0]
    with pytest.raises(GrokkitError, match="not among the sets"):
        chosen_set(np.array([[3, 3]]), sets)


def test_forced_choices_equal_full_forward_passes(tiny_lm, ids, forced):
    clean = next_token_losses(tiny_lm, TEXTS)
    np.testing.assert_allclose(forced.clean, clean, rtol=1e-5, atol=1e-5)
    for row, position, layer, i_set in [(0, 0, 0, 5), (0, 3, 1, 27), (1, 4, 0, 11), (1, 2, 1, 0)]:
        edit = grokkit.ForceExperts(
            forced.sets[i_set], positions=slice(position, position + 1), layers=[layer]
        )
        expected = loss_of(tiny_lm(ids[[row]], edits=[edit]).logits[0], ids[row])[position]
        found = forced.loss[row, position, layer, i_set]
        assert found == pytest.approx(expected, rel=1e-5, abs=2e-5)


def test_the_routers_own_choice_changes_nothing_and_others_do(tiny_lm, forced):
    _, cache = tiny_lm.run_with_cache(TEXTS, ["expert_indices"])
    chosen = chosen_set(np.asarray(cache["expert_indices"]), forced.sets)
    chosen = np.moveaxis(chosen, 0, -1)[:, :-1, :, None]
    own = np.take_along_axis(forced.effect, chosen, axis=-1)
    measured = ~np.isnan(forced.clean)
    assert np.abs(own[measured]).max() < 2e-5
    assert (np.abs(forced.effect[measured]) > 1e-3).mean() > 0.5


def test_gate_policies(tiny_lm, ids):
    only = np.zeros(ids.shape, bool)
    only[1, 2] = True
    kept = forced_choices(tiny_lm, TEXTS, "keep", positions=only, rows=32, progress=False)
    given = forced_choices(tiny_lm, TEXTS, [1.0, 0.0], positions=only, rows=32, progress=False)
    normed = forced_choices(tiny_lm, TEXTS, "renormalise", positions=only, rows=32, progress=False)
    assert np.isfinite(kept.loss).sum() == 2 * 28
    # The norm after the experts takes a common factor away.
    np.testing.assert_allclose(kept.loss, normed.loss, rtol=2e-3)
    edit = grokkit.ForceExperts([2, 5], [1.0, 0.0], positions=slice(2, 3), layers=[1])
    expected = loss_of(tiny_lm(ids[[1]], edits=[edit]).logits[0], ids[1])[2]
    i_set = given.sets.tolist().index([2, 5])
    assert given.loss[1, 2, 1, i_set] == pytest.approx(expected, rel=1e-5, abs=2e-5)
    assert np.nanmax(np.abs(given.loss - kept.loss)) > 1e-3


def test_any_number_of_cases_is_one_program(tiny_lm, ids):
    before = _decode._cache_size()
    for layers in ([0], [1], [-1, 0]):
        only = np.zeros(ids.shape, bool)
        only[0, : 1 + len(layers)] = True
        found = forced_choices(tiny_lm, ids, layers=layers, positions=only, rows=24, progress=False)
        assert found.layers == tuple(i % 2 for i in layers)
    assert _decode._cache_size() == before + 1


def test_same_on_four_devices(tiny_lm, tiny_config, ids, forced):
    mesh = grokkit.make_mesh(2, 2)
    lm = grokkit.LanguageModel(
        place(random_model(tiny_config, 0), mesh), mesh, tiny_lm.tokenizer, "four devices"
    )
    only = np.zeros(ids.shape, bool)
    only[:, 3] = True
    found = forced_choices(lm, ids, layers=[1], positions=only, rows=32, progress=False)
    np.testing.assert_allclose(
        found.loss[:, 3, 0], forced.loss[:, 3, 1], rtol=1e-5, atol=2e-5
    )  # fmt: skip


@pytest.fixture(scope="module")
def three(tiny_lm):
    return tiny_lm.to_tokens([*TEXTS, "that he had asked"])


@pytest.fixture(scope="module")
def removal(tiny_lm, three):
    return remove_experts(tiny_lm, three, rows=2, progress=False)


def means(tiny_lm, ids, edits=()):
    """Mean next-token loss of each row, pads left out."""
    logits = tiny_lm(ids, edits=edits).logits
    real = [row[row != tiny_lm.config.pad_token] for row in ids]
    return [loss_of(logits[i], row).mean() for i, row in enumerate(real)]


def test_forbidding_equals_edited_passes(tiny_lm, three, removal):
    together = remove_experts(tiny_lm, three, layers="together", rows=2, progress=False)
    assert removal.layers == (0, 1) and together.layers is None
    np.testing.assert_allclose(removal.clean, means(tiny_lm, three), atol=2e-5)
    edit = grokkit.ForbidExperts(3, layers=[1])
    np.testing.assert_allclose(removal.loss[1, 3], means(tiny_lm, three, [edit]), atol=2e-5)
    edit = grokkit.ForbidExperts(6, layers=[0, 1])
    np.testing.assert_allclose(together.loss[0, 6], means(tiny_lm, three, [edit]), atol=2e-5)


def test_silencing_equals_edited_passes(tiny_lm, three):
    silenced = remove_experts(tiny_lm, three, "zero", layers=[-1], rows=2, progress=False)
    edit = grokkit.Replace("expert_outputs", 0.0, experts=[3], layers=[1])
    assert silenced.layers == (1,)
    np.testing.assert_allclose(silenced.loss[0, 3], means(tiny_lm, three, [edit]), atol=2e-5)


def test_effect_of_removal_by_domain(removal):
    domains = np.array([0, 1, 0])
    change = removal.loss - removal.clean
    by_hand = np.average(change[0, 2, [0, 2]], weights=removal.tokens[[0, 2]])
    effect = removal.effect(domains)
    assert effect.shape == (2, 8, 2)
    assert effect[0, 2, 0] == pytest.approx(by_hand)
    twice = removal.effect(domains, np.array([1, 2, 2]))
    np.testing.assert_allclose(twice[..., 0], change[..., 2])


def test_removing_an_unused_expert_does_nothing(tiny_lm, three, removal):
    _, cache = tiny_lm.run_with_cache(three, ["expert_indices"])
    used = np.asarray(cache["expert_indices"])
    change = np.abs(removal.loss - removal.clean)
    unused = 0
    for row, ids in enumerate(three):
        n = (ids != tiny_lm.config.pad_token).sum()
        for layer in range(2):
            for expert in range(8):
                hit = expert in used[layer, row, : n - 1]
                unused += not hit
                assert (change[layer, expert, row] > 1e-5) == hit
    assert unused > 0


def test_wrong_input_is_refused(tiny_lm, removal):
    with pytest.raises(SiteError, match="there is no 2; there are 2, 0 to 1"):
        forced_choices(tiny_lm, TEXTS, layers=[2], progress=False)
    with pytest.raises(SiteError, match="at least one"):
        remove_experts(tiny_lm, TEXTS, layers=[], progress=False)
    with pytest.raises(GrokkitError, match="positions: expected booleans of shape"):
        forced_choices(tiny_lm, TEXTS, positions=np.ones((1, 3), bool), progress=False)
    with pytest.raises(GrokkitError, match="no position is left"):
        forced_choices(tiny_lm, np.array([[5]]), progress=False)
    with pytest.raises(GrokkitError, match="rows must be a positive multiple"):
        forced_choices(tiny_lm, TEXTS, rows=0, progress=False)
    with pytest.raises((GrokkitError, TypeCheckError), match="forbid"):
        remove_experts(tiny_lm, TEXTS, "delete", progress=False)  # type: ignore[arg-type]
    with pytest.raises(GrokkitError, match="one for each of 3 sequences"):
        removal.effect(np.array([0, 1]))
    with pytest.raises(GrokkitError, match=r"domains \[1\] have no sequences"):
        removal.effect(np.array([0, 1, 1]), np.array([0, 0]))
