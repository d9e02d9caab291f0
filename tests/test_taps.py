"""Captures: what they select, that they are values, and what they refuse."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import forward, relative_error

from grokkit.axes import AXES
from grokkit.errors import SiteError
from grokkit.taps import SITES, Capture, Tap, site

N_LAYERS, N_POSITIONS = 12, 19


def mean_and_largest(x):
    return {"mean": jnp.mean(x, axis=-1), "largest": jnp.max(x)}


SELECTIONS = {
    # What is asked for, and the same in numpy on the whole activation, layer axis first.
    "one layer": (Capture("q", layers=3), lambda x: x[[3]]),
    "layers out of order": (Capture("q", layers=[7, -12, 2]), lambda x: x[[7, 0, 2]]),
    "last layer of attention": (Capture("pattern", layers=-1), lambda x: x[[-1]]),
    "numpy layers": (Capture("moe_out", layers=np.array([0, 11])), lambda x: x[[0, 11]]),
    "one position": (Capture("z", positions=4), lambda x: x[:, :, 4]),
    "position from the end": (Capture("resid_post", positions=-1), lambda x: x[:, :, -1]),
    "positions": (Capture("k", positions=[5, -19, 5]), lambda x: x[:, :, [5, 0, 5]]),
    "slice": (Capture("v", positions=slice(2, -3, 4)), lambda x: x[:, :, 2:-3:4]),
    "slice backwards": (Capture("v", positions=slice(None, None, -2)), lambda x: x[:, :, ::-2]),
    "a query": (Capture("attn_scores", positions=6), lambda x: x[:, :, :, 6]),
    "queries": (Capture("pattern", positions=slice(16, None)), lambda x: x[:, :, :, 16:]),
    "outside the layers": (Capture("logits", positions=(1, -2)), lambda x: x[:, [1, -2]]),
    "reduced": (
        Capture("resid_mid", reduce=mean_and_largest),
        lambda x: {"mean": x.mean(axis=-1), "largest": x.max(axis=(1, 2, 3))},
    ),
    "reduced in two layers at two positions": (
        Capture("router_probs", layers=(10, 1), positions=(3, 4), reduce=mean_and_largest),
        lambda x: {
            "mean": x[[10, 1]][:, :, [3, 4]].mean(axis=-1),
            "largest": x[[10, 1]][:, :, [3, 4]].max(axis=(1, 2, 3)),
        },
    ),
}


@pytest.fixture(scope="module")
def selected(lm8, golden_arrays):
    """All selections, from one forward pass."""
    captures = [
        dataclasses.replace(capture, name=label).resolve(N_LAYERS, N_POSITIONS)
        for label, (capture, _) in SELECTIONS.items()
    ]
    return forward(lm8.model, lm8.mesh, golden_arrays["tokens"], captures).captured


@pytest.mark.parametrize("label", SELECTIONS)
def test_capture_keeps_what_was_asked_for(label, selected, out8):
    capture, choose = SELECTIONS[label]
    expected = choose(np.asarray(out8.captured[capture.site]))
    found = selected[label]
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert relative_error(a, b) < 1e-5


def test_selections_can_differ(selected, out8):
    """The test above would find a wrong layer or position: neighbours are far apart."""
    z = np.asarray(out8.captured["z"])
    assert np.abs(z[3] - z[4]).max() > 0.1 and np.abs(z[:, :, 4] - z[:, :, 5]).max() > 0.1
    assert np.abs(np.asarray(selected["one position"]) - z[:, :, 5]).max() > 0.1


def test_captures_of_one_site_need_names_to_be_told_apart():
    assert Capture("q").key == "q"
    assert Capture("q", name="queries").key == "queries"


@pytest.mark.parametrize("positions", [None, 3, -1, (1, 2), [1, 2], slice(1, 5), np.array([1, 2])])
def test_captures_are_values(positions):
    one = Capture("q", layers=[1, 2], positions=positions)
    other = Capture("q", layers=(1, 2), positions=positions)
    assert one == other and hash(one) == hash(other)
    assert one != Capture("q", layers=(2, 1), positions=positions)
    assert one != Capture("k", layers=(1, 2), positions=positions)


def test_numpy_integers_count_as_integers():
    assert Capture("q", layers=np.int64(3), positions=np.int32(2)) == Capture("q", 3, 2)


def test_slices_of_captures_are_told_apart():
    assert Capture("q", positions=slice(1, 5)) != Capture("q", positions=slice(1, 6))


def test_resolve_counts_from_zero():
    found = Capture("q", layers=(-1, 0), positions=(-1, 3)).resolve(12, 19)
    assert (found.layers, found.positions) == ((11, 0), (18, 3))
    assert Capture("q", positions=-19).resolve(12, 19).positions == 0


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Capture("resid"), r"no activation site 'resid'; the sites are embed, resid_pre, "),
        (lambda: site("Q"), r"no activation site 'Q'; the sites are .* logits$"),
        (lambda: Capture("logits", layers=(1,)), r"'logits': this site is not in a layer"),
        (lambda: Capture("q", layers=()), r"'q': layers is empty, so it would match nothing"),
        (lambda: Capture("q", positions=[]), r"'q': positions is empty, so it would match nothing"),
        (
            lambda: Capture("q", layers=12).resolve(12, 19),
            r"'q': there is no layer 12; there are 12, 0 to 11",
        ),
        (lambda: Capture("q", layers=-13).resolve(12, 19), r"there is no layer -13"),
        (
            lambda: Capture("z", positions=19).resolve(12, 19),
            r"'z': there is no position 19; there are 19, 0 to 18",
        ),
        (lambda: Capture("z", positions=(0, -20)).resolve(12, 19), r"there is no position -20"),
        (
            lambda: Capture("z", positions=slice(19, 30)).resolve(12, 19),
            r"'z': positions slice\(19, 30, None\) match none of 19",
        ),
        (
            lambda: Capture("z", layers=(3, -9)).resolve(12, 19),
            r"'z': a layer is named twice in layers \(3, -9\)",
        ),
    ],
)
def test_what_would_match_nothing_is_refused(make, message):
    with pytest.raises(SiteError, match=message):
        make()


def test_sites_come_in_the_order_of_the_forward_pass_with_names_of_their_own(golden_reference):
    assert list(SITES) == list(golden_reference)
    assert [s.name for s in SITES.values()] == list(SITES)
    assert len({s.hook for s in SITES.values()}) == len(SITES)
    for found in SITES.values():
        assert found.meaning
        assert set(found.axes) <= set(AXES)
        assert found.in_layer == found.hook.startswith("blocks.{}.")


def test_without_captures_and_edits_a_tap_is_the_identity():
    tap = Tap()
    value = jnp.arange(3)
    assert tap("q", value) is value
    assert not tap.wants("q") and tap.captured == {}
    assert Tap((Capture("q"),)).wants("q") and not Tap((Capture("q"),)).wants("k")
