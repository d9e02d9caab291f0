import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import float64, random_model, relative_error
from jax.sharding import PartitionSpec as P

import grokkit
from grokkit.taps import Capture, Tap

CONFIG = grokkit.GrokConfig(
    vocab_size=16, d_model=16, n_layers=1, n_heads=8, n_kv_heads=2, d_head=4, d_ff=16,
    attention_multiplier=1.5, attention_softcap=3.0,
)  # fmt: skip
SITES = ("q", "k", "v", "attn_scores", "pattern", "z", "attn_out_pre_norm")


def run_layer(sites):
    """One layer's attention over two rows, of which one has a hidden key."""
    mesh = grokkit.make_mesh(1, 2)
    attention = jax.tree.map(lambda a: a[0], random_model(CONFIG, 0, mesh).blocks.attention)
    x = np.random.default_rng(0).normal(size=(2, 6, 16)).astype(np.float32)
    visible = np.ones((2, 6), bool)
    visible[1, 2] = False

    @jax.jit
    def run(attention, x, visible):
        tap = Tap(tuple(Capture(s) for s in sites))
        positions = jnp.broadcast_to(jnp.arange(6), (2, 6))
        x, visible = jax.reshard((x, visible), P("data"))
        out, cache = attention(
            x, positions, visible, None, jnp.int32(0), jnp.dtype(jnp.float32), tap
        )
        assert cache is None
        return out, tap.captured

    with jax.set_mesh(mesh):
        out, found = run(attention, x, visible)
    if "attn_out_pre_norm" in sites:
        np.testing.assert_array_equal(out, found["attn_out_pre_norm"])
    matrices = {"query": attention.query, "key": attention.key, "value": attention.value}
    weights = {
        f"layer/multi_head_attention/{name}/w": float64(w)
        for name, w in (matrices | {"linear": attention.out}).items()
    }
    expected = {}
    reference.attention(x.astype(np.float64), weights, "layer", CONFIG, ~visible, expected)
    return found, expected


@pytest.fixture(scope="module")
def found_and_expected():
    return run_layer(SITES)


@pytest.mark.parametrize("size", [1, 4, 5])
def test_key_block_by_key_block_is_the_same(size, monkeypatch):
    """Of six keys; where the pattern is asked for there are no blocks."""
    monkeypatch.setattr("grokkit.layers.attention.KEY_BLOCK", size)
    monkeypatch.setattr("grokkit.layers.attention._attend", None)
    found, expected = run_layer(("q", "k", "v", "z", "attn_out_pre_norm"))
    assert relative_error(found["z"], expected["z"]) < 1e-5
    monkeypatch.undo()
    monkeypatch.setattr("grokkit.layers.attention.KEY_BLOCK", size)
    assert relative_error(run_layer(("pattern",))[0]["pattern"], expected["pattern"]) < 1e-5


@pytest.mark.parametrize("site", SITES)
def test_is_the_definition(site, found_and_expected):
    found, expected = found_and_expected
    assert relative_error(found[site], expected[site]) < 1e-5


def test_scores_stay_under_the_soft_cap_which_bites(found_and_expected):
    scores = np.asarray(found_and_expected[0]["attn_scores"])
    assert 0.9 * 3 < np.abs(scores[np.isfinite(scores)]).max() < 3


def test_hidden_and_later_keys_get_nothing(found_and_expected):
    pattern = np.asarray(found_and_expected[0]["pattern"])
    assert (pattern[1, :, :, 2] == 0).all() and (pattern[0, :, 2:, 2] > 0).all()
    assert (pattern[..., np.triu(np.ones((6, 6), bool), 1)] == 0).all()


def test_four_consecutive_heads_read_one_key_value_head(found_and_expected):
    found = found_and_expected[0]
    z, v = np.asarray(found["z"]), np.asarray(found["v"])
    # The first query sees itself alone, so that each head gives its key/value head's value.
    np.testing.assert_allclose(z[:, 0], np.repeat(v[:, 0], 4, axis=1), rtol=1e-6)
