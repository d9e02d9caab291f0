"""The settings of sampling, one by one and together, against their definitions in plain Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import PartitionSpec as P

import grokkit
from grokkit.errors import PromptError
from grokkit.generate import generate_tokens
from grokkit.sampling import Sampling, _constrain, _kept, mark_seen, sample

VOCAB = 12


def may_be_drawn(logits, seen, temperature, top_p, top_k, min_p, penalty, allowed):
    """Tokens and their probabilities, step by step as grokkit/sampling.py lists them."""
    logits = {t: float(logits[t]) for t in range(len(logits))}
    for t in seen:
        logits[t] = logits[t] / penalty if logits[t] > 0 else logits[t] * penalty
    logits = {t: x / temperature for t, x in logits.items() if t in allowed}
    order = sorted(logits, key=lambda t: (-logits[t], t))
    order = order[: top_k or None]
    weight = {t: np.exp(logits[t] - logits[order[0]]) for t in order}
    total, kept = 0.0, []
    for t in order:
        if total >= top_p * sum(weight.values()) and top_p < 1:
            break
        kept.append(t)
        total += weight[t]
    kept = [t for t in kept if weight[t] >= min_p * weight[kept[0]]]
    return {t: weight[t] / sum(weight[k] for k in kept) for t in kept}


@jax.jit
def found(logits, rows, seen):
    wanted = _constrain(logits, rows.constraints, seen)
    scaled = (wanted - jnp.max(wanted, axis=-1, keepdims=True)) / rows.temperature[:, None]
    return jnp.where(_kept(scaled, rows), scaled, -jnp.inf)


@pytest.mark.parametrize("seed", range(8))
def test_what_may_be_drawn_is_the_definition(seed):
    n, random = 64, np.random.default_rng(seed)
    logits = random.normal(size=(n, VOCAB)).astype(np.float32) * 3
    seen = random.random((n, VOCAB)) < 0.3
    allowed = random.random((n, VOCAB)) < 0.7
    allowed[:, 3] = True

    def sometimes(values, off):
        return np.where(random.random(n) < 0.4, off, values).tolist()

    sampling = Sampling(
        temperature=random.uniform(0.3, 2, n).tolist(),
        top_p=sometimes(random.uniform(0.05, 1, n), 1.0),
        top_k=sometimes(random.integers(1, VOCAB + 3, n), 0),
        min_p=sometimes(random.uniform(0, 1, n), 0.0),
        repetition_penalty=sometimes(random.uniform(0.5, 3, n), 1.0),
        allowed=allowed,
    )
    kept = np.asarray(found(logits, sampling.rows(n, VOCAB), seen))
    for i in range(n):
        expected = may_be_drawn(
            logits[i], np.flatnonzero(seen[i]), sampling.temperature[i], sampling.top_p[i],
            sampling.top_k[i], sampling.min_p[i], sampling.repetition_penalty[i],
            set(np.flatnonzero(allowed[i])),
        )  # fmt: skip
        probs = reference.softmax(kept[i].astype(np.float64))
        assert set(np.flatnonzero(probs)) == set(expected)
        np.testing.assert_allclose(probs[list(expected)], list(expected.values()), rtol=1e-4)


def test_equal_logits_rank_by_their_ids():
    rows = Sampling(top_k=[1, 3, 5, 0]).rows(4, 5)
    kept = np.isfinite(
        np.asarray(found(np.zeros((4, 5), np.float32), rows, np.zeros((4, 5), bool)))
    )
    assert kept.sum(axis=1).tolist() == [1, 3, 5, 5]
    assert kept[1].tolist() == [True, True, True, False, False]


def test_min_p_of_one_leaves_the_most_probable():
    rows = Sampling(min_p=1.0).rows(1, 3)
    kept = np.asarray(found(np.float32([[1, 2, 1.999]]), rows, np.zeros((1, 3), bool)))
    assert np.isfinite(kept).tolist() == [[False, True, False]]


@pytest.mark.parametrize("mesh", [(1, 1), (2, 4)], ids=str)
def test_draws_follow_the_definition(mesh):
    n = 4096
    logits = np.log(np.array([0.3, 0.02, 0.25, 0.05, 0.15, 0.03, 0.08, 0.12], np.float32))
    options = {"temperature": 1.3, "top_p": 0.95, "top_k": 5, "min_p": 0.2}
    sampling = Sampling(**options, repetition_penalty=1.5, allowed=[0, 2, 3, 4, 6, 7])
    expected = may_be_drawn(logits, [0], 1.3, 0.95, 5, 0.2, 1.5, {0, 2, 3, 4, 6, 7})
    with jax.set_mesh(grokkit.make_mesh(*mesh)):
        rows, batch, position = jax.tree.map(
            lambda a: jax.device_put(a, P("data")),
            (sampling.rows(n, 8), np.tile(logits, (n, 1)), np.full(n, 3, np.int32)),
        )
        seen = jax.device_put(np.tile(np.arange(8) == 0, (n, 1)), P("data"))
        draw = jax.jit(sample)(batch, rows, position, seen)
    frequency = np.bincount(draw.token, minlength=8) / n
    assert set(np.flatnonzero(frequency)) == set(expected) == {0, 2, 4, 6, 7}
    error = np.sqrt(0.25 / n)
    for token, prob in expected.items():
        assert frequency[token] == pytest.approx(prob, abs=4 * error)
    # The reported probabilities stay the model's own.
    np.testing.assert_allclose(draw.prob, np.exp(logits)[np.asarray(draw.token)], rtol=1e-5)


def test_mark_seen_takes_real_tokens_only():
    with jax.set_mesh(grokkit.make_mesh(2, 4)):
        seen = jax.device_put(np.zeros((2, 6), bool), P("data"))
        tokens, counts = np.array([[5, 1, 1, 3], [0, 2, 4, 4]]), np.array([3, 1])
        seen = jax.jit(mark_seen)(seen, *(jax.device_put(a, P("data")) for a in (tokens, counts)))
    assert [np.flatnonzero(row).tolist() for row in np.asarray(seen)] == [[1, 5], [0]]


# Through the model


def greedy(weights, config, prompt, n, penalty, allowed):
    """`n` tokens by the definition, and how clearly each won."""
    tokens, gaps = list(prompt), []
    for _ in range(n):
        logits = reference.forward(weights, config, [tokens])["logits"][0, -1]
        for t in set(tokens):
            logits[t] = logits[t] / penalty if logits[t] > 0 else logits[t] * penalty
        logits = [x if t in allowed else -np.inf for t, x in enumerate(logits)]
        second, first = np.argsort(logits)[-2:]
        gaps.append(logits[first] - logits[second])
        tokens.append(int(first))
    return tokens[len(prompt) :], min(gaps)


def test_repetition_penalty_and_allowed_tokens_while_generating(
    lm8, golden_arrays, golden_weights, monkeypatch
):
    monkeypatch.setattr("grokkit.generate.PREFILL_PART", 8)  # what is seen comes in parts too
    prompts = [golden_arrays["tokens"].tolist()[0][:13], golden_arrays["tokens"].tolist()[1][:4]]
    penalties, allowed = [1.8, 0.6], [range(0, 256, 2), range(3, 256, 3)]
    mask = np.zeros((2, 256), bool)
    for row, ids in zip(mask, allowed, strict=True):
        row[list(ids)] = True
    sampling = Sampling(temperature=0.0, repetition_penalty=penalties, allowed=mask)
    pieces = list(generate_tokens(lm8.model, lm8.mesh, prompts, 10, sampling, block=3))
    tokens = np.concatenate([np.asarray(p.draws.token) for p in pieces])[:10].T
    for row, prompt, penalty, ids in zip(tokens, prompts, penalties, allowed, strict=True):
        exact, gap = greedy(golden_weights, lm8.config, prompt, 10, penalty, set(ids))
        assert gap > 1e-5
        assert row.tolist() == exact
    assert len(set(tokens[0])) > len(set(tokens[1]))


def test_text_of_allowed_tokens(tiny_lm):
    allowed = [t for t in range(4, 320) if tiny_lm.to_str_tokens([t])[0].isalpha()]
    options = {"max_len": 12, "allowed": allowed, "top_k": 20, "min_p": 0.01, "seed": 1}
    pieces = list(tiny_lm.stream("Two", **options))
    text = "".join(map(str, pieces))
    assert text.isalpha() and len(text) >= 12 and {p.id for p in pieces} <= set(allowed)


def test_defaults_run_the_program_that_knows_no_constraints():
    assert Sampling(temperature=0.5, top_p=0.9, seed=3).rows(2, 8).constraints is None
    assert Sampling(top_k=[0, 1]).rows(2, 8).constraints is not None


def test_a_mask_of_0_and_1_is_the_originals():
    """Not the ids 0 and 1; ids that are as many as there are tokens stay ids."""
    mask = np.array([0, 1, 1, 0, 0, 0, 1, 0])
    for same in (mask, mask.astype(np.int32), jnp.asarray(mask), mask.astype(bool), [1, 2, 6]):
        found = Sampling(allowed=same).rows(2, 8).constraints.allowed
        assert (found == mask.astype(bool)).all() and found.shape == (2, 8)
    each = Sampling(allowed=np.array([mask, 1 - mask])).rows(2, 8).constraints.allowed
    assert (each[1] == (1 - mask).astype(bool)).all()
    assert Sampling(allowed=range(8)).rows(1, 8).constraints.allowed.all()
    with pytest.raises(PromptError, match="at least one token to draw"):
        Sampling(allowed=np.zeros(8, np.int32)).rows(1, 8)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"top_k": -1}, "top_k must be an integer, 0 or more, found -1"),
        ({"top_k": [1, 2, 3]}, "top_k: expected one value, or one for each of 2 prompts, found 3"),
        ({"min_p": -0.1}, "min_p must be from 0 to 1, found -0.1"),
        ({"min_p": 1.5}, "min_p must be from 0 to 1, found 1.5"),
        ({"min_p": float("nan")}, "min_p must be from 0 to 1, found nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0, found 0.0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty must be above 0, found inf"),
        ({"allowed": [3, 8]}, "allowed holds token id 8; ids go from 0 to 7"),
        ({"allowed": [-1]}, "allowed holds token id -1"),
        ({"allowed": []}, "allowed must leave at least one token to draw, found none"),
        ({"allowed": np.zeros(8, bool)}, "allowed must leave at least one token"),
        ({"allowed": np.ones(7, bool)}, r"expected a mask of shape \(8,\) or \(2, 8\), found \(7,"),
    ],
)
def test_what_cannot_be_honoured_is_refused(options, message):
    with pytest.raises(PromptError, match=message):
        Sampling(**options).rows(2, 8)
