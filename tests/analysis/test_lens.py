"""Lenses against their definition on the float64 reference's stream."""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import random_model

import grokkit
from grokkit.analysis import lens
from grokkit.analysis.lens import TunedLens, fit_tuned_lens, logit_lens
from grokkit.errors import GrokkitError, PromptError, SiteError
from grokkit.model import place


@pytest.fixture(scope="module")
def tokens(golden_arrays):
    return golden_arrays["tokens"]


def log_probs(x, weights, config):
    normed = reference.rms_norm(x, weights["language_model/rms_norm/scale"], config.norm_eps)
    embedding = weights["language_model/in_out_embed/embeddings"]
    return np.log(reference.softmax(normed @ embedding.T * config.output_multiplier))


@pytest.mark.parametrize("devices", ["lm1", "lm8"])
@pytest.mark.parametrize("tuned", [False, True], ids=["logit", "tuned"])
def test_by_definition(
    tuned, devices, request, tokens, golden_reference, golden_weights, monkeypatch
):
    lm, sites = request.getfixturevalue(devices), golden_reference
    # Several pieces, the last of them overlapping.
    monkeypatch.setattr(lens, "_LOGITS_AT_ONCE", 7 * len(tokens) * lm.config.vocab_size)
    translators = None
    if tuned:
        keys = jax.random.split(jax.random.key(0))
        n, d = lm.config.n_layers, lm.config.d_model
        translators = TunedLens(
            jax.random.normal(keys[0], (n, d, d)) * 0.1,
            jax.random.normal(keys[1], (n, d)),
            "resid_mid",
        )
    follow = np.random.default_rng(0).integers(0, lm.config.vocab_size, (*tokens.shape, 2))
    found = logit_lens(lm, tokens, top=3, tuned=translators, follow=follow)
    final = log_probs(sites["resid_post"][-1], golden_weights, lm.config)
    if not tuned:
        assert found.depths[:4] == (
            ("embed", None), ("resid_pre", 0), ("resid_mid", 0), ("resid_post", 0)
        )  # fmt: skip
        assert len(found.depths) == 1 + 3 * lm.config.n_layers
    for i, (site, layer) in enumerate(found.depths):
        x = sites[site] if layer is None else sites[site][layer]
        if translators is not None:
            w, b = (
                np.asarray(a, np.float64)[layer] for a in (translators.weight, translators.bias)
            )
            x = x + x @ w + b
        expected = log_probs(x, golden_weights, lm.config)
        kl = (np.exp(final) * (final - expected)).sum(axis=-1)
        np.testing.assert_allclose(found.kl[i], kl, atol=2e-4)
        best = np.sort(expected, axis=-1)[..., ::-1][..., :3]
        np.testing.assert_allclose(found.top_log_probs[i], best, atol=2e-4)
        picked = np.take_along_axis(expected, found.top_tokens[i], axis=-1)
        np.testing.assert_allclose(picked, best, atol=2e-4)
        followed = np.take_along_axis(expected, follow, axis=-1)
        np.testing.assert_allclose(found.followed_log_probs[i], followed, atol=5e-4)
    if not tuned:
        np.testing.assert_allclose(found.kl[-1], 0, atol=1e-5)
    assert "resid_mid 3" in repr(found)


@pytest.fixture(scope="module")
def rotated(tiny_config):
    """A model whose first layer turns the stream by more than a lens can leave out."""
    mesh = grokkit.make_mesh(1, 1)
    return grokkit.LanguageModel(place(random_model(tiny_config, 3), mesh), mesh, None)


@pytest.fixture(scope="module")
def text(tiny_config):
    return np.random.default_rng(0).integers(3, tiny_config.vocab_size, (96, 12))


def test_fitting(rotated, text, tmp_path):
    fitted, losses = fit_tuned_lens(
        rotated, text[:80], steps=60, batch=8, learning_rate=5e-3, progress=False
    )
    assert losses.shape == (60, 2)
    plain = logit_lens(rotated, text[80:], ["resid_post"]).kl.mean(axis=(1, 2))
    tuned = logit_lens(rotated, text[80:], tuned=fitted).kl.mean(axis=(1, 2))
    assert tuned[0] < 0.9 * plain[0]  # held-out text reads better before the last layer
    assert tuned[1] < 1e-4  # and at the last layer there is nothing to learn
    np.testing.assert_allclose(losses[0, 0], plain[0], rtol=0.2)
    fitted.save(tmp_path / "lens.safetensors")
    loaded = TunedLens.load(tmp_path / "lens.safetensors")
    assert eqx.tree_equal(loaded, fitted) and loaded.site == "resid_post"
    assert [p.name for p in tmp_path.iterdir()] == ["lens.safetensors"]


@pytest.mark.parametrize("shape", [(1, 8), (2, 1)])
def test_gradients_on_several_devices(shape, rotated, text, tiny_config):
    mesh = grokkit.make_mesh(*shape)
    model = jax.tree.map(np.asarray, rotated.model)
    lm = grokkit.LanguageModel(place(model, mesh), mesh, None)
    expected, found = (
        fit_tuned_lens(m, text[:4], "resid_mid", steps=3, batch=4, progress=False)
        for m in (rotated, lm)
    )
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4)
    np.testing.assert_allclose(found[0].bias, expected[0].bias, atol=1e-4)


def test_loss_gradient(rotated, text):
    """The layer's gradient against a difference quotient of the lens's own reading."""
    n, d = rotated.config.n_layers, rotated.config.d_model
    step = np.random.default_rng(0).normal(size=(n, d)) * 0.05

    def loss(size):
        shifted = TunedLens(
            jnp.zeros((n, d, d)), jnp.asarray(step * size, jnp.float32), "resid_mid"
        )
        return logit_lens(rotated, text[:4], tuned=shifted).kl.mean(axis=(1, 2))

    _, cache = rotated.run_with_cache(text[:4], ["resid_mid", "final_norm"])
    with jax.set_mesh(rotated.mesh):
        _, gradient = lens._losses(
            rotated.model.ends,
            TunedLens.identity(n, d, "resid_mid"),
            *lens._place(rotated, (cache["resid_mid"], cache["final_norm"])),
        )
    slope = (np.asarray(gradient.bias) * step).sum(axis=-1)
    np.testing.assert_allclose(slope, (loss(1) - loss(-1)) / 2, rtol=0.05, atol=1e-3)


def test_errors(lm1, tokens, tmp_path, monkeypatch):
    with pytest.raises(SiteError, match="a lens reads the residual stream: .* found 'z'"):
        logit_lens(lm1, tokens, ["z"])
    with pytest.raises(SiteError, match="each once, found"):
        logit_lens(lm1, tokens, ["embed", "embed"])
    with pytest.raises(SiteError, match="top: expected 1 to 256 tokens, found 0"):
        logit_lens(lm1, tokens, top=0)
    with pytest.raises(PromptError, match="for a text of .* found an array of shape"):
        logit_lens(lm1, tokens, follow=np.zeros((1, 1, 1), int))
    with pytest.raises(PromptError, match="ids go from 0 to 255, found 256 to 256"):
        logit_lens(lm1, tokens, follow=np.full((*tokens.shape, 1), 256))
    with pytest.raises(SiteError, match="the lens is of 'resid_post' for 3 layers of width 5"):
        logit_lens(lm1, tokens, tuned=TunedLens.identity(3, 5))
    with pytest.raises(SiteError, match="expected one of each layer, found 'embed'"):
        fit_tuned_lens(lm1, tokens, "embed", batch=1)
    with pytest.raises(PromptError, match="at least one batch of 800"):
        fit_tuned_lens(lm1, tokens, batch=800)
    (tmp_path / "other.safetensors").write_bytes(b"something else")
    with pytest.raises(GrokkitError, match=r"other.safetensors: expected a safetensors file that"):
        TunedLens.load(tmp_path / "other.safetensors")
    with pytest.raises(GrokkitError, match="missing.safetensors"):
        TunedLens.load(tmp_path / "missing.safetensors")
    monkeypatch.setitem(sys.modules, "optax", None)
    with pytest.raises(GrokkitError, match=r"pip install 'grokkit\[recipe\]'"):
        fit_tuned_lens(lm1, tokens, batch=1)
