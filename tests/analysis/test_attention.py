"""Head scores against loops over queries, and against patterns whose scores are known."""

import jax.numpy as jnp
import numpy as np
import pytest
import reference

from grokkit import Capture
from grokkit.analysis import attention
from grokkit.errors import GrokkitError

LAYERS, BATCH, HEADS, N = 2, 3, 4, 12


@pytest.fixture(scope="module")
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def scores(rng):
    values = rng.normal(size=(LAYERS, BATCH, HEADS, N, N)) * 8
    return np.where(np.tri(N, dtype=bool), 10 * np.tanh(values / 10), -np.inf).astype(np.float32)


@pytest.fixture(scope="module")
def pattern(scores):
    return reference.softmax(scores).astype(np.float32)


@pytest.fixture(scope="module")
def tokens(rng):
    return rng.integers(0, 5, (BATCH, N))


@pytest.fixture(scope="module")
def queries(rng):
    return rng.uniform(size=(BATCH, N)) < 0.6


def by_loop(pattern, queries, value):
    """Mean of `value(row, query, weights)` over counted queries for which it is a number."""
    result = np.empty((LAYERS, HEADS))
    for layer in range(LAYERS):
        for head in range(HEADS):
            found = [
                value(row, q, pattern[layer, row, head, q])
                for row in range(BATCH)
                for q in range(N)
                if queries is None or queries[row, q]
            ]
            result[layer, head] = np.mean([x for x in found if x is not None])
    return result


def previous(row, q, w, tokens):
    return w[q - 1] if q else None


def duplicate(row, q, w, tokens):
    places = [k for k in range(q) if tokens[row, k] == tokens[row, q]]
    return sum(w[k] for k in places) if places else None


def induction(row, q, w, tokens):
    places = [k for k in range(1, q) if tokens[row, k - 1] == tokens[row, q]]
    return sum(w[k] for k in places) if places else None


def first(row, q, w, tokens):
    return w[0] if q else None


def entropy(row, q, w, tokens):
    return -sum(p * np.log(p) for p in w if p > 0)


CASES = {
    "previous": (previous, lambda p, t, q: attention.previous_token_score(p, q)),
    "duplicate": (duplicate, attention.duplicate_token_score),
    "induction": (induction, attention.induction_score),
    "first": (first, lambda p, t, q: attention.first_token_mass(p, q)),
    "entropy": (entropy, lambda p, t, q: attention.attention_entropy(p, q)),
}


@pytest.mark.parametrize("some", [False, True], ids=["all queries", "some queries"])
@pytest.mark.parametrize("name", CASES)
def test_score_by_definition(name, some, pattern, tokens, queries):
    definition, score = CASES[name]
    chosen = queries if some else None
    expected = by_loop(pattern, chosen, lambda *a: definition(*a, tokens))
    np.testing.assert_allclose(score(pattern, tokens, chosen), expected, rtol=1e-5)


def test_known_patterns():
    """One head that looks back one token, one an induction head, one that duplicates."""
    half = np.arange(5)
    tokens = np.concatenate([half, half])[None]
    look = np.zeros((1, 3, 10, 10), np.float32)
    for q in range(10):
        look[0, 0, q, max(q - 1, 0)] = 1
        look[0, 1, q, q - 4 if q >= 5 else 0] = 1
        look[0, 2, q, q - 5 if q >= 5 else 0] = 1
    assert attention.previous_token_score(look).tolist() == pytest.approx([1, 1 / 9, 1 / 9])
    assert attention.induction_score(look, tokens).tolist() == [0, 1, 0]
    assert attention.duplicate_token_score(look, tokens).tolist() == [0, 0, 1]
    assert attention.distance_profile(look)[0].tolist() == pytest.approx([0.1, 1] + [0] * 8)
    assert attention.attention_entropy(look).tolist() == [0, 0, 0]


def test_distance_profile(pattern, queries):
    found = np.asarray(attention.distance_profile(pattern, queries))
    for distance in range(N):
        reach = [(b, q) for b in range(BATCH) for q in range(distance, N) if queries[b, q]]
        if not reach:
            assert np.isnan(found[..., distance]).all()
            continue
        expected = np.mean([pattern[:, b, :, q, q - distance] for b, q in reach], axis=0)
        np.testing.assert_allclose(found[..., distance], expected, rtol=1e-5)


def test_share_near_the_cap(scores, queries):
    found = np.asarray(attention.softcap_share(scores, 10.0, 0.8, queries))
    expected = np.empty((LAYERS, HEADS))
    for layer in range(LAYERS):
        for head in range(HEADS):
            seen = [scores[layer, b, head, q, : q + 1] for b, q in np.argwhere(queries)]
            expected[layer, head] = np.mean(np.abs(np.concatenate(seen)) > 8)
    assert 0 < expected.min() and expected.max() < 1
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("devices", ["lm1", "lm8"])
def test_inside_the_compiled_program(devices, request, golden_arrays, golden_reference):
    """As a capture's `reduce`, and on the captured array: the same, and the reference's."""
    lm, tokens = request.getfixturevalue(devices), golden_arrays["tokens"]
    score = attention.previous_token_score
    _, cache = lm.run_with_cache(
        tokens, ["pattern", Capture("pattern", reduce=score, name="reduced")]
    )
    expected = score(golden_reference["pattern"].astype(np.float32))
    np.testing.assert_allclose(cache["reduced"], expected, atol=1e-5)
    np.testing.assert_allclose(score(cache["pattern"]), expected, atol=1e-5)


def test_errors(pattern, tokens):
    distinct = np.tile(np.arange(N), (BATCH, 1))
    with pytest.raises(GrokkitError, match="no counted query has an earlier occurrence"):
        attention.duplicate_token_score(pattern, distinct)
    with pytest.raises(GrokkitError, match="no counted query has a token after an earlier"):
        attention.induction_score(pattern, distinct)
    with pytest.raises(GrokkitError, match="tokens: expected one for each of the pattern's 3 x 12"):
        attention.induction_score(pattern, tokens[:, :7])
    with pytest.raises(GrokkitError, match="as many queries as keys, found 1 and 12"):
        attention.distance_profile(jnp.asarray(pattern[..., :1, :]))
    with pytest.raises(GrokkitError, match="found 0.0 and 0.9"):
        attention.softcap_share(pattern, 0.0)
