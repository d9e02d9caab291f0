"""Log-probabilities and perplexity against their definitions, from float64 logits."""

import numpy as np
import pytest
import reference
from helpers import random_model, reference_weights

import grokkit
from grokkit.errors import PromptError
from grokkit.language_model import LanguageModel

PROMPT, ANSWERS = "Two and two make", [" four.", " eight; and the fox", " o"]


@pytest.fixture(scope="module")
def logprobs(tiny_lm, tiny_config):
    """Of every token but the first of a text, by the definition."""
    weights = reference_weights(tiny_lm.model)

    def of(ids):
        logits = reference.forward(weights, tiny_config, [list(ids)])["logits"][0]
        probs = reference.softmax(logits)
        return [np.log(probs[i, token]) for i, token in enumerate(ids[1:])]

    return of


@pytest.fixture(scope="module", params=[(1, 8), (2, 2)], ids=str)
def lm(request, tiny_lm, tiny_config):
    """Without and with the batch cut; of 8 devices none has a whole vocabulary."""
    mesh = grokkit.make_mesh(*request.param)
    return LanguageModel(random_model(tiny_config, 0, mesh), mesh, tiny_lm.tokenizer)


def test_scores_are_sums_of_log_probabilities(lm, logprobs):
    scores = lm.score(PROMPT, ANSWERS)
    start = len(lm.tokenizer.encode(PROMPT))
    for answer, found in zip(ANSWERS, scores, strict=True):
        ids = lm.tokenizer.encode(PROMPT + answer)
        assert found.tokens == tuple(ids[start:])
        np.testing.assert_allclose(found.logprobs, logprobs(ids)[start - 1 :], atol=1e-4)
        assert found.total == pytest.approx(sum(logprobs(ids)[start - 1 :]), abs=1e-4)
        assert found.mean == pytest.approx(found.total / len(found.tokens))
        assert f"total {found.total:.4f}" in repr(found)


@pytest.fixture(scope="module")
def lm1(tiny_lm, tiny_config):
    """On one device, where programs compile fastest."""
    mesh = grokkit.make_mesh(1, 1)
    return LanguageModel(random_model(tiny_config, 0, mesh), mesh, tiny_lm.tokenizer)


def test_one_continuation_several_prompts_and_token_ids(lm1, logprobs):
    start = len(lm1.tokenizer.encode(PROMPT))
    scores = lm1.score(PROMPT, ANSWERS[:2])
    alone = lm1.score(PROMPT, ANSWERS[1])
    assert alone.total == pytest.approx(scores[1].total, abs=1e-4)
    both = lm1.score([PROMPT, PROMPT], ANSWERS[:2])
    assert [s.tokens for s in both] == [s.tokens for s in scores[:2]]
    ids = lm1.tokenizer.encode(PROMPT + ANSWERS[1])
    by_ids = lm1.score(ids[: start - 2], ids[start - 2 :])
    np.testing.assert_allclose(by_ids.logprobs, logprobs(ids)[start - 3 :], atol=1e-4)


def test_a_token_that_spans_both_is_the_continuations(lm1):
    whole = lm1.tokenizer.encode("The quick")
    found = lm1.score("The qui", "ck")
    assert found.tokens == tuple(whole[-len(found.tokens) :])
    assert lm1.to_string(found.tokens).endswith("ck")


@pytest.mark.parametrize("n, window, stride", [(40, 16, 9), (40, 16, 13), (9, 16, 8)])
def test_perplexity_is_that_of_the_sliding_window(n, window, stride, lm1, logprobs):
    ids = np.random.default_rng(n).integers(4, 300, n).tolist()
    predicted = {}
    for start in range(0, n, stride):
        row = ids[start : start + window]
        for i, logprob in enumerate(logprobs(row), start=start + 1):
            predicted.setdefault(i, logprob)
    assert sorted(predicted) == list(range(1, n))
    expected = np.exp(-np.mean(list(predicted.values())))
    assert lm1.perplexity(ids, window, stride) == pytest.approx(expected, rel=1e-4)


def test_long_texts_are_run_in_parts(lm1, logprobs, monkeypatch):
    for module in ("scoring", "generate", "model"):
        monkeypatch.setattr(f"grokkit.{module}.PREFILL_PART", 16)
    ids = np.random.default_rng(0).integers(4, 300, 42).tolist()
    expected = np.exp(-np.mean(logprobs(ids)))
    assert lm1.perplexity(ids) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "prompt, continuation, message",
    [
        ("", "a", "the prompt is empty"),
        ("a", "", "the continuation is empty"),
        ([5], [], "the continuation is empty"),
        ("a", [5], "must both be text, or both token ids"),
        (["a", "b"], ["c", "d", "e"], "found 3 and 2"),
        ([5], [9999], "text 0 holds token id 9999"),
        ([5] * 50, [5] * 50, "100 do not fit in the context of 96"),
    ],
)
def test_scores_that_cannot_be_given(prompt, continuation, message, lm1):
    with pytest.raises(PromptError, match=message):
        lm1.score(prompt, continuation)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"window": 97}, "window must be from 2 to the context of 96, found 97"),
        ({"window": 1}, "window must be from 2"),
        ({"window": 8, "stride": 8}, "stride must be from 1 to window - 1, 7"),
        ({"stride": 0}, "stride must be from 1"),
        ({"text": [5]}, "at least two tokens, found 1"),
        ({"text": [5, -1]}, "the text holds token id -1"),
    ],
)
def test_perplexities_that_cannot_be_given(options, message, lm1):
    with pytest.raises(PromptError, match=message):
        lm1.perplexity(**({"text": [5, 6, 7]} | options))
