"""Against the official code and the float64 truth, on a checkpoint of twelve layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import forward, relative_error

import grokkit
from grokkit.generate import Sampling, generate_tokens
from grokkit.model import Grok

EXACT = {
    "logits": "exact_logits",
    "router_probs": "exact_router_probs",
    "pattern": "exact_pattern",
    "resid_post": "exact_resid",
}


def top_two(router_probs):
    return np.sort(np.argsort(-np.asarray(router_probs), axis=-1)[..., :2], axis=-1)


@pytest.mark.parametrize("site", EXACT)
def test_the_reference_is_the_definition_that_the_golden_arrays_were_made_by(
    site, golden_reference, golden_arrays
):
    # Two float64 evaluations, one of them stored as float32.
    assert relative_error(golden_reference[site], golden_arrays[EXACT[site]]) < 1e-7


@pytest.mark.parametrize("site", EXACT)
def test_float32_is_exact_to_rounding(site, out8, golden_arrays):
    assert relative_error(out8.captured[site], golden_arrays[EXACT[site]]) < 1e-5


def test_every_token_goes_to_the_exact_experts(out8, golden_arrays):
    expected = top_two(golden_arrays["exact_router_probs"])
    np.testing.assert_array_equal(top_two(out8.captured["router_probs"]), expected)
    # The check can fail: the official bfloat16 arithmetic does choose other experts here.
    assert (top_two(golden_arrays["router_probs"]) != expected).any()


def official_error(golden_arrays):
    return relative_error(golden_arrays["logits"], golden_arrays["exact_logits"])


class Rounding(np.ndarray):
    """A matrix that rounds what is multiplied with it to bfloat16."""

    def __rmatmul__(self, x):
        rounded = np.asarray(x).astype(jnp.bfloat16).astype(np.float64)
        return rounded @ np.asarray(self)


def test_bfloat16_model_is_off_by_no_more_than_its_operands_rounding(
    golden_dir, golden_weights, golden_arrays, lm8
):
    """Where rounding sends one token to another expert, as it does in a few of 456 cases here and
    there, that position is off by more than all the others: so this is about medians. The official
    arrays' are two thirds of what rounding the operands alone gives: some roundings that the code
    asks for were not made."""
    lm = grokkit.load(golden_dir, mesh=grokkit.make_mesh(1, 8), dtype="bfloat16", progress=False)
    assert lm.model.dtype == jnp.bfloat16
    out = forward(lm.model, lm.mesh, golden_arrays["tokens"], ["router_probs"])
    found = {"logits": out.logits, "router_probs": out.captured["router_probs"]}
    in_float32 = ("router", "in_out_embed", "norm")
    weights = {
        name: w if any(part in name for part in in_float32) else w.view(Rounding)
        for name, w in golden_weights.items()
    }
    rounded = reference.forward(weights, lm8.config, golden_arrays["tokens"])

    for site, values in found.items():
        exact = golden_arrays[EXACT[site]]

        def median_error(given, exact=exact):
            off = np.linalg.norm(np.asarray(given, np.float64) - exact, axis=-1)
            return np.median(off / np.linalg.norm(exact, axis=-1))

        error = median_error(values)
        assert error < 1.2 * median_error(rounded[site])
        assert error < 2 * median_error(golden_arrays[site])


def test_bfloat16_products_are_no_further_off_than_the_official_code(
    lm1, golden_arrays, monkeypatch
):
    """A CPU has forms of its own, so that the test above says nothing about accelerators. Here
    theirs are run, with the operands rounded as they are there."""

    def as_on_an_accelerator(*operands, cpu, default):
        if len(operands) == 2 and all(isinstance(a, jax.Array) for a in operands):
            a, b = operands  # of einsum32, whose own default no CPU can run
            return cpu(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16))
        return default(*operands)

    monkeypatch.setattr("jax.lax.platform_dependent", as_on_an_accelerator)
    m = lm1.model
    model = Grok(m.embedding, m.blocks, m.final_norm, m.config, jnp.dtype(jnp.bfloat16))
    with jax.set_mesh(lm1.mesh):
        # A function of this test's own, so that no program traced before is used again.
        out = jax.jit(lambda model, tokens: model(tokens))(model, golden_arrays["tokens"])
    error = relative_error(out.logits, golden_arrays["exact_logits"])
    assert 1e-3 < error < 1.5 * official_error(golden_arrays)


@pytest.fixture(scope="module")
def exact_greedy(golden_weights, golden_arrays, lm8):
    """For each row 24 tokens, and by how much each beat the next best logit."""
    prompts = golden_arrays["tokens"]
    return [reference.greedy(golden_weights, lm8.config, prompt, 24) for prompt in prompts]


def test_greedy_continuation_is_the_argmax_of_a_full_forward_pass_at_each_step(
    lm8, golden_arrays, exact_greedy
):
    prompts = golden_arrays["tokens"].tolist()
    pieces = generate_tokens(lm8.model, lm8.mesh, prompts, 24, Sampling(temperature=0.0))
    found = np.concatenate([np.asarray(p.draws.token) for p in pieces])[:24].T
    # The closest race is won by far more than float32 rounds off, so every token is determined.
    assert min(gap for _, gaps in exact_greedy for gap in gaps) > 1e-4
    assert found.tolist() == [tokens for tokens, _ in exact_greedy]


def test_official_greedy_continuation_is_ours_up_to_a_tie_within_its_rounding(
    golden_arrays, exact_greedy
):
    rounding = np.abs(golden_arrays["logits"] - golden_arrays["exact_logits"]).max()
    for official, (exact, gaps) in zip(golden_arrays["greedy"], exact_greedy, strict=True):
        different = np.flatnonzero(official != exact)
        if different.size:
            assert different[0] >= 12
            assert gaps[different[0]] < rounding


def test_most_of_the_official_greedy_continuation_is_ours(golden_arrays, exact_greedy):
    exact = np.array([tokens for tokens, _ in exact_greedy])
    np.testing.assert_array_equal(golden_arrays["greedy"][0], exact[0])
    assert np.mean(golden_arrays["greedy"] == exact) > 0.5
