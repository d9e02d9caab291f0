"""Direct attribution: sums, and each term against its definition in float64."""

import numpy as np
import pytest

import grokkit
from grokkit.analysis.attribution import logit_attribution, router_attribution
from grokkit.errors import PromptError, SiteError

EPS = 1e-5
POSITIONS = (2, -1)
LAYER = 4


@pytest.fixture(scope="module")
def tokens(golden_arrays):
    return golden_arrays["tokens"]


def frozen(x, scale):
    return scale / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + EPS)


def terms_by_hand(sites, weights, config, row, position, direction, n_layers):
    """Terms of the heads and the experts for one position, from vectors written in full."""
    heads = np.zeros((n_layers, config.n_heads))
    experts = np.zeros((n_layers, config.n_experts))
    for layer in range(n_layers):
        name = f"transformer/decoder_layer_{layer}"
        at = (layer, row, position)
        norm = frozen(sites["attn_out_pre_norm"][at], weights[f"{name}/rms_norm_1/scale"])
        out = weights[f"{name}/multi_head_attention/linear/w"]
        for head in range(config.n_heads):
            part = out[head * config.d_head : (head + 1) * config.d_head]
            heads[layer, head] = (sites["z"][at][head] @ part * norm) @ direction
        norm = frozen(sites["moe_out_pre_norm"][at], weights[f"{name}/rms_norm_3/scale"])
        for choice, expert in enumerate(sites["expert_indices"][at]):
            written = sites["expert_outputs"][at][choice] * sites["expert_weights"][at][choice]
            experts[layer, expert] = (written * norm) @ direction
    return heads, experts


@pytest.mark.parametrize("devices", ["lm1", "lm8"])
def test_every_logit_is_the_sum(devices, request, tokens):
    lm = request.getfixturevalue(devices)
    found = logit_attribution(lm, tokens, np.arange(lm.config.vocab_size), positions=POSITIONS)
    logits = np.asarray(lm(tokens).logits)[:, list(POSITIONS)]
    np.testing.assert_allclose(found.total, logits, atol=1e-5)
    error = np.linalg.norm(found.sum() - logits) / np.linalg.norm(logits)
    assert error < 1e-5
    assert np.abs(found.sum() - logits).max() < 1e-4 * np.abs(logits).max()


@pytest.mark.parametrize("devices", ["lm1", "lm8"])
def test_terms_of_a_difference(devices, request, tokens, golden_reference, golden_weights):
    lm, sites = request.getfixturevalue(devices), golden_reference
    right, wrong = np.array([[[7]], [[9]]]), 30  # a target of its own for each prompt
    found = logit_attribution(lm, tokens[:2], right, wrong, positions=POSITIONS)
    embedding = golden_weights["language_model/in_out_embed/embeddings"]
    scale = golden_weights["language_model/rms_norm/scale"]
    for row in range(2):
        for i, position in enumerate(POSITIONS):
            stream = sites["resid_post"][-1, row, position]
            unembed = embedding[right[row, 0, 0]] - embedding[wrong]
            direction = unembed * frozen(stream, scale) * lm.config.output_multiplier
            heads, experts = terms_by_hand(
                sites, golden_weights, lm.config, row, position, direction, lm.config.n_layers
            )
            embed = sites["embed"][row, position] @ direction
            tolerance = 1e-4 * np.abs(heads).max()
            np.testing.assert_allclose(found.heads[:, row, i, :, 0], heads, atol=tolerance)
            np.testing.assert_allclose(found.experts[:, row, i, :, 0], experts, atol=tolerance)
            assert found.embed[row, i, 0] == pytest.approx(embed, abs=tolerance)
            logits = sites["logits"][row, position]
            difference = logits[right[row, 0, 0]] - logits[wrong]
            assert found.total[row, i, 0] == pytest.approx(difference, abs=1e-4)
            assert found.sum()[row, i, 0] == pytest.approx(difference, abs=1e-4)


@pytest.mark.parametrize("devices", ["lm1", "lm8"])
@pytest.mark.parametrize("layer", [0, LAYER])
def test_router_logits_are_the_sum(layer, devices, request, tokens, golden_reference):
    lm = request.getfixturevalue(devices)
    found = router_attribution(lm, tokens, layer, range(lm.config.n_experts), positions=None)
    logits = golden_reference["router_logits"][layer]
    assert found.heads.shape[0] == layer + 1 and found.experts.shape[0] == layer
    assert np.abs(found.sum() - logits).max() < 1e-4 * np.abs(logits).max()
    np.testing.assert_allclose(found.total, logits, atol=1e-4)


def test_terms_of_the_margin(lm8, tokens, golden_reference, golden_weights):
    found = router_attribution(lm8, tokens, LAYER, positions=POSITIONS)
    sites, name = golden_reference, f"transformer/decoder_layer_{LAYER}"
    row, i, position = 1, 0, POSITIONS[0]
    logits = sites["router_logits"][LAYER, row, position]
    order = np.argsort(-logits)
    margin = logits[order[1]] - logits[order[2]]
    assert found.total[row, i, 0] == pytest.approx(margin, abs=1e-4) and margin > 0
    assert found.sum()[row, i, 0] == pytest.approx(margin, abs=1e-4)
    router = golden_weights[f"{name}/router/w"]
    stream = sites["resid_mid"][LAYER, row, position]
    direction = router[:, order[1]] - router[:, order[2]]
    direction = direction * frozen(stream, golden_weights[f"{name}/rms_norm_2/scale"])
    heads, experts = terms_by_hand(
        sites, golden_weights, lm8.config, row, position, direction, LAYER + 1
    )
    np.testing.assert_allclose(found.heads[:, row, i, :, 0], heads, atol=1e-4)
    np.testing.assert_allclose(found.experts[:, row, i, :, 0], experts[:LAYER], atol=1e-4)


def test_named_terms(lm1, tokens):
    found = logit_attribution(lm1, tokens[:1, :6], [3, 8])
    terms = found.terms(target=1)
    c = lm1.config
    assert len(terms) == 1 + c.n_layers * (c.n_heads + c.n_experts)
    assert sum(terms.values()) == pytest.approx(float(found.total[0, 0, 1]), abs=1e-4)
    assert terms["L2H3"] == found.heads[2, 0, 0, 3, 1]
    assert terms["L5E6"] == found.experts[5, 0, 0, 6, 1]
    top = found.top(4, target=1)
    assert [abs(v) for _, v in top] == sorted((abs(v) for v in terms.values()), reverse=True)[:4]
    assert found.positions == (5,) and found.top(1)[0][0] in repr(found)


def test_on_a_data_parallel_mesh(lm1, golden_dir, tokens):
    lm = grokkit.load(golden_dir, mesh=grokkit.make_mesh(2, 1), dtype="float32", progress=False)
    expected, found = (logit_attribution(m, tokens[:2, :5], [3, 8]) for m in (lm1, lm))
    np.testing.assert_allclose(found.heads, expected.heads, atol=1e-4)


def test_errors(lm1, tiny_lm, tokens):
    with pytest.raises(PromptError, match="targets: ids go from 0 to 255, found 5 to 256"):
        logit_attribution(lm1, tokens, [5, 256])
    with pytest.raises(PromptError, match="targets: expected integers, found array"):
        logit_attribution(lm1, tokens, np.array([0.5]))
    with pytest.raises(PromptError, match="against: shape .* does not broadcast"):
        logit_attribution(lm1, tokens, 5, np.zeros((7, 1, 1), int))
    with pytest.raises(SiteError, match="there is no position 99"):
        logit_attribution(lm1, tokens, 5, positions=[99])
    with pytest.raises(SiteError, match="at least one, found none"):
        logit_attribution(lm1, tokens, 5, positions=[])
    with pytest.raises(SiteError, match="the prompts have different lengths"):
        logit_attribution(tiny_lm, ["Two and", "The quick brown fox"], 5)
    with pytest.raises(SiteError, match="there is no layer 12; there are 12, 0 to 11"):
        router_attribution(lm1, tokens, 12)
    with pytest.raises(PromptError, match="experts: ids go from 0 to 7"):
        router_attribution(lm1, tokens, 1, 8)
    with pytest.raises(PromptError, match="experts: name them"):
        router_attribution(lm1, tokens, 1, None, 2)
