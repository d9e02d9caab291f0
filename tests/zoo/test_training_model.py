"""The training forward equals the project's model, and its own gradients are right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grokkit
from grokkit.model import place
from grokkit.quant import dequantize
from grokkit.zoo.nano import loss, training_model
from grokkit.zoo.nano.export import quantised_model
from grokkit.zoo.nano.probes import attention_patterns, head_scores


@pytest.fixture(scope="module")
def params(config):
    params = training_model.init_params(config, jax.random.key(3))
    for i, layer in enumerate(params["layers"]):
        keys = jax.random.split(jax.random.key(i), 2)
        layer["attn_norm"] = jax.random.uniform(keys[0], (config.d_model,), minval=0.5, maxval=2.0)
        layer["router"] = 3 * jax.random.normal(keys[1], layer["router"].shape)
    return params


@pytest.fixture(scope="module")
def tokens(config):
    return np.random.default_rng(0).integers(3, config.vocab_size, (3, 40)).astype(np.int32)


def _rounded(params, config):
    """The parameters with every matrix as its 8 bits stand for it."""
    model = quantised_model(params, config)
    b = model.blocks
    layers = []
    for i, layer in enumerate(params["layers"]):
        matrices = {
            "query": b.attention.query, "key": b.attention.key, "value": b.attention.value,
            "out": b.attention.out, "expert_gate": b.moe.gate, "expert_value": b.moe.value,
            "expert_out": b.moe.out,
        }  # fmt: skip
        layers.append(layer | {name: dequantize(q)[i] for name, q in matrices.items()})
    return params | {"layers": layers}, model


@pytest.mark.slow
def test_equals_the_projects_model_when_nothing_is_dropped(params, tokens, config):
    rounded, model = _rounded(params, config)
    mesh = grokkit.make_mesh(1, 1)
    lm = grokkit.LanguageModel(place(model, mesh), mesh, None)
    states, report = training_model.hidden_states(rounded, jnp.asarray(tokens), config, None)
    logits = states @ params["embedding"].T * config.output_multiplier
    expected = np.asarray(lm(tokens).logits)
    assert np.linalg.norm(logits - expected) < 1e-5 * np.linalg.norm(expected)
    assert float(report["dropped"].max()) == 0
    np.testing.assert_allclose(np.asarray(report["load"]).sum(axis=1), 1, rtol=1e-5)

    losses = training_model.token_losses(rounded, jnp.asarray(tokens), config)
    log_probs = jax.nn.log_softmax(expected[:, :-1], axis=-1)
    picked = np.take_along_axis(np.asarray(log_probs), tokens[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(losses, -picked, rtol=1e-4, atol=1e-5)

    _, cache = lm.run_with_cache(tokens, ["pattern"])
    patterns = attention_patterns(rounded, jnp.asarray(tokens), config)
    np.testing.assert_allclose(patterns, cache["pattern"], atol=1e-5)


def test_attention_gradients_are_those_of_the_definition(params, config):
    layer = params["layers"][0]
    x = jax.random.normal(jax.random.key(1), (2, 70, config.d_model))
    target = jax.random.normal(jax.random.key(2), x.shape)

    def definition(layer, x):
        kv, groups = config.n_kv_heads, config.n_heads // config.n_kv_heads
        q, k, v = (
            (x @ layer[name]).reshape(*x.shape[:2], heads, config.d_head)
            for name, heads in [("query", kv * groups), ("key", kv), ("value", kv)]
        )
        q, k = (training_model._rotate(a, config.rope_base) for a in (q, k))
        k, v = jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * config.attention_multiplier
        scores = config.attention_softcap * jnp.tanh(scores / config.attention_softcap)
        scores = jnp.where(np.tri(x.shape[1], dtype=bool), scores, -jnp.inf)
        out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), v)
        return out.reshape(*x.shape[:2], -1) @ layer["out"]

    def gradients(f):
        return jax.grad(lambda layer, x: jnp.sum(f(layer, x) * target), argnums=(0, 1))(layer, x)

    ours = gradients(lambda layer, x: training_model.attention(layer, x, config))
    theirs = gradients(definition)
    for name in ("query", "key", "value", "out"):
        np.testing.assert_allclose(ours[0][name], theirs[0][name], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-3, atol=1e-4)


def _dense_experts(layer, x, config, kept):
    """Every expert on every token, weighted by the kept choices' gates."""
    probs = jax.nn.softmax(x @ layer["router"], axis=-1)
    hidden = jax.nn.gelu(jnp.einsum("nd,edf->nef", x, layer["expert_gate"]), approximate=True)
    hidden = hidden * jnp.einsum("nd,edf->nef", x, layer["expert_value"])
    return jnp.einsum("nef,efd,ne->nd", hidden, layer["expert_out"], probs * kept)


@pytest.mark.parametrize("capacity", [60, 12])
def test_expert_gradients_are_those_of_every_expert_on_every_token(params, config, capacity):
    layer = params["layers"][1]
    x = jax.random.normal(jax.random.key(5), (60, config.d_model))
    target = jax.random.normal(jax.random.key(6), x.shape)
    order = np.argsort(-np.asarray(x @ layer["router"]), axis=-1, kind="stable")[:, :2]
    kept = np.zeros((60, config.n_experts), np.float32)
    taken = np.zeros(config.n_experts, int)
    for choice in (0, 1):  # all first choices before any second one
        for token in range(60):
            expert = order[token, choice]
            if taken[expert] < capacity:
                kept[token, expert] = 1
            taken[expert] += 1
    assert (kept.sum() < 120) == (capacity == 12)

    def ours(layer, x):
        return jnp.sum(training_model.experts(layer, x, config, capacity)[0] * target)

    def dense(layer, x):
        return jnp.sum(_dense_experts(layer, x, config, jnp.asarray(kept)) * target)

    (a, a_grads), (b, b_grads) = (
        jax.value_and_grad(f, argnums=(0, 1))(layer, x) for f in (ours, dense)
    )
    np.testing.assert_allclose(a, b, rtol=1e-4)
    np.testing.assert_allclose(a_grads[1], b_grads[1], rtol=1e-3, atol=1e-4)
    for name in ("router", "expert_gate", "expert_value", "expert_out"):
        np.testing.assert_allclose(a_grads[0][name], b_grads[0][name], rtol=1e-3, atol=1e-4)
    report = training_model.experts(layer, x, config, capacity)
    assert float(report[3]) == pytest.approx(1 - kept.sum() / 120, abs=1e-6)


def test_weighted_loss_and_its_gradients(config):
    keys = jax.random.split(jax.random.key(0), 4)
    n = loss.LOSS_CHUNK + 100  # a whole chunk and a part of one
    states = jax.random.normal(keys[0], (n, 16))
    embedding = jax.random.normal(keys[1], (50, 16))
    targets = jax.random.randint(keys[2], (n,), 0, 50)
    weights = jax.random.uniform(keys[3], (n,))

    def definition(states, embedding):
        log_probs = jax.nn.log_softmax(states @ embedding.T * 0.7, axis=-1)
        picked = jnp.take_along_axis(log_probs, targets[:, None], axis=-1)[:, 0]
        return -2 * jnp.sum(weights * picked) / jnp.sum(weights)

    def ours(states, embedding):
        return 2 * loss.weighted_loss(states, embedding, targets, weights, 0.7)

    (a, a_grads), (b, b_grads) = (
        jax.value_and_grad(f, argnums=(0, 1))(states, embedding) for f in (ours, definition)
    )
    np.testing.assert_allclose(a, b, rtol=1e-5)
    for x, y in zip(a_grads, b_grads, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-7)


def test_balancing_loss_is_one_when_even_and_larger_when_not(config):
    layer = training_model.init_params(config, jax.random.key(0))["layers"][0]
    x = jax.random.normal(jax.random.key(1), (512, config.d_model))
    even = training_model.experts(layer, x, config, 512)
    assert float(even[1]) == pytest.approx(1, abs=0.02)
    crowded = layer | {"router": layer["router"].at[:, 0].add(x.mean(axis=0) * 1e3)}
    shifted = training_model.experts(crowded, x + x.mean(axis=0) * 50, config, 512)
    assert float(shifted[1]) > 1.5
    assert float(shifted[2].max()) == pytest.approx(0.5, abs=0.01)


def test_head_scores_know_the_two_patterns():
    period, t = 10, 20
    pattern = np.zeros((1, 1, 2, t, t), np.float32)
    for query in range(t):
        pattern[0, 0, 0, query, max(query - 1, 0)] = 1
        pattern[0, 0, 1, query, max(query - period + 1, 0)] = 1
    scores = head_scores(pattern, period)
    np.testing.assert_allclose(scores["previous"], [[1.0, 1 / 19]], atol=1e-6)
    np.testing.assert_allclose(scores["induction"], [[0.0, 1.0]], atol=1e-6)
