"""Sampling by its definition, and generation against full forward passes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest
import reference
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import grokkit
from grokkit import generate
from grokkit.errors import PromptError
from grokkit.generate import bucket, check_max_len, generate_tokens, pad_right
from grokkit.model import initialise, place
from grokkit.sampling import Rows, Sampling, nucleus, sample

PROBS = np.array([0.3, 0.02, 0.25, 0.05, 0.15, 0.03, 0.08, 0.12])
N = 8192


@jax.jit
def _sample(logits, temperature, top_p, seed, position):
    rows = [jax.reshard(r, P("data")) for r in (temperature, top_p, seed)]
    return sample(jax.reshard(logits, P("data")), Rows(*rows), jax.reshard(position, P("data")))


def draw(logits, temperature=1.0, top_p=1.0, seed=None, position=5, mesh=None):
    """Draws of N rows, all settings broadcast to them; by default each row has its own seed."""
    seed = np.arange(N) if seed is None else seed
    with jax.set_mesh(grokkit.make_mesh(1, 1) if mesh is None else mesh):
        return _sample(
            np.broadcast_to(np.asarray(logits, np.float32), (N, np.shape(logits)[-1])),
            np.broadcast_to(np.float32(temperature), N),
            np.broadcast_to(np.float32(top_p), N),
            np.broadcast_to(np.asarray(seed, np.uint32), N),
            np.broadcast_to(np.asarray(position, np.int32), N),
        )


def p_value(tokens, probs):
    """Pearson's chi-squared: how likely frequencies at least this far from `probs` are."""
    counts = np.bincount(tokens, minlength=len(probs))
    assert (counts[probs == 0] == 0).all()
    expected = len(tokens) * probs[probs > 0]
    statistic = np.sum((counts[probs > 0] - expected) ** 2 / expected)
    freedom = np.sum(probs > 0) - 1
    return float(jax.scipy.stats.chi2.sf(float(statistic), float(freedom)))


# The distribution


@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
def test_frequencies_follow_the_softmax_of_logits_over_temperature(temperature):
    tokens = np.asarray(draw(np.log(PROBS), temperature).token)
    expected = PROBS ** (1 / temperature)
    assert p_value(tokens, expected / expected.sum()) > 0.001
    # The test tells temperatures apart.
    wrong = PROBS ** (1 / (temperature * 1.15))
    assert p_value(tokens, wrong / wrong.sum()) < 0.001


@pytest.mark.parametrize("top_p, kept", [(0.9, [0, 2, 4, 7, 6]), (0.5, [0, 2]), (0.01, [0])])
def test_frequencies_follow_the_softmax_over_the_nucleus(top_p, kept):
    tokens = np.asarray(draw(np.log(PROBS), top_p=top_p).token)
    expected = np.zeros(8)
    expected[kept] = PROBS[kept] / PROBS[kept].sum()
    if len(kept) == 1:
        assert set(tokens) == set(kept)
    else:
        assert p_value(tokens, expected) > 0.001


def test_nucleus_is_taken_after_the_temperature():
    probs = np.array([0.4, 0.3, 0.2, 0.1])
    cold = probs**2 / np.sum(probs**2)
    assert probs[:2].sum() < 0.75 < cold[:2].sum()
    assert set(np.asarray(draw(np.log(probs), 0.5, 0.75).token)) == {0, 1}
    assert set(np.asarray(draw(np.log(probs), 1.0, 0.75).token)) == {0, 1, 2}


def test_draws_of_one_seed_at_many_positions_follow_the_softmax_too():
    tokens = np.asarray(draw(np.log(PROBS), seed=7, position=np.arange(N)).token)
    assert p_value(tokens, PROBS) > 0.001


def test_neighbouring_seeds_and_positions_draw_independently():
    """Seed s + 1 must not repeat seed s one position later, as texts of a batch would."""
    grid = {
        (ds, dp): np.asarray(
            draw(np.log(PROBS), seed=ds + np.arange(N), position=dp + np.arange(N) % 50).token
        )
        for ds, dp in [(0, 0), (0, 1), (1, 0), (1, 1)]
    }
    chance = np.sum(PROBS**2)
    allowed = 4 * np.sqrt(chance * (1 - chance) / N)
    for shift in [(0, 1), (1, 0), (1, 1)]:
        assert abs(np.mean(grid[0, 0] == grid[shift]) - chance) < allowed
    assert abs(np.mean(grid[0, 1] == grid[1, 0]) - chance) < allowed


def test_temperature_zero_takes_the_first_of_the_most_probable():
    assert set(np.asarray(draw([1.0, 3.0, 3.0, 2.0], 0.0).token)) == {1}
    assert set(np.asarray(draw([1.0, 3.0, 3.0, 2.0], 0.0, top_p=0.2).token)) == {1}


@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 1e-37])
def test_the_smallest_temperatures_take_the_most_probable(temperature):
    logits = np.array([50.0, 90.0, 89.0, -50.0])
    assert set(np.asarray(draw(logits, temperature).token)) == {1}
    assert set(np.asarray(draw(logits, temperature, top_p=0.9).token)) == {1}


def test_infinite_temperature_is_approached_from_below():
    tokens = np.asarray(draw(np.log(PROBS), 1e30).token)
    assert p_value(tokens, np.full(8, 1 / 8)) > 0.001


def test_forbidden_tokens_are_never_drawn():
    logits = np.log(PROBS)
    logits[[0, 4]] = -np.inf
    expected = np.where(np.isinf(logits), 0.0, PROBS)
    assert p_value(np.asarray(draw(logits).token), expected / expected.sum()) > 0.001


def test_each_row_has_its_own_settings():
    half = np.arange(N) < N // 2
    found = np.asarray(
        draw(np.log(PROBS), np.where(half, 0.0, 1.0), np.where(half, 1.0, 0.5)).token
    )
    assert set(found[half]) == {0} and set(found[~half]) == {0, 2}


def test_reported_probabilities_are_the_models_own():
    found = draw(np.log(PROBS) + 3, 0.3, 0.6)
    np.testing.assert_allclose(found.prob, PROBS[np.asarray(found.token)], rtol=1e-5)
    np.testing.assert_array_equal(found.top_tokens[0], np.argsort(-PROBS))
    np.testing.assert_allclose(found.top_probs[0], np.sort(PROBS)[::-1], rtol=1e-5)


def test_at_most_eight_alternatives():
    found = draw(np.arange(20.0))
    np.testing.assert_array_equal(found.top_tokens[3], np.arange(19, 11, -1))


def test_draws_do_not_depend_on_the_mesh():
    logits = np.random.default_rng(0).normal(size=64)
    one, eight = (
        draw(logits, 0.8, 0.9, mesh=grokkit.make_mesh(*shape)) for shape in [(1, 1), (2, 4)]
    )
    np.testing.assert_array_equal(one.token, eight.token)


# The nucleus


def kept(logits, top_p):
    logits = np.atleast_2d(np.asarray(logits, np.float32))
    top_p = np.broadcast_to(np.float32(top_p), len(logits))
    return np.asarray(jax.jit(nucleus)(jnp.asarray(logits), jnp.asarray(top_p)))


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 0.999), st.floats(0.1, 5))
@settings(max_examples=50, deadline=None)
def test_nucleus_is_the_definition(seed, top_p, spread):
    logits = (np.random.default_rng(seed).normal(size=12) * spread).astype(np.float32)
    reached = np.cumsum(np.sort(reference.softmax(logits.astype(np.float64)))[::-1])
    assume(np.abs(reached - top_p).min() > 1e-5)  # float32 cannot tell these
    expected = reference.nucleus(logits.astype(np.float64), top_p)
    np.testing.assert_array_equal(kept(logits, top_p)[0], expected)


@pytest.mark.parametrize(
    "top_p, expected", [(0.25, [0]), (0.26, [0, 1]), (0.5, [0, 1]), (0.75, [0, 1, 2])]
)
def test_of_equally_probable_tokens_the_first_are_kept(top_p, expected):
    assert np.flatnonzero(kept(np.zeros(4), top_p)[0]).tolist() == expected


def test_nucleus_of_one_keeps_every_token_and_the_smallest_keeps_one():
    logits = np.array([0.0, -80.0, 1.0, -200.0])
    assert kept(logits, 1.0)[0].all()
    assert np.flatnonzero(kept(logits, 1e-30)[0]).tolist() == [2]


def test_each_row_has_its_own_nucleus():
    found = kept(np.log([PROBS] * 3), [0.01, 0.5, 1.0])
    assert found.sum(axis=1).tolist() == [1, 2, 8]


# Continuations of the golden model


def continue_golden(lm8, prompts, sampling, n=24):
    pieces = list(generate_tokens(lm8.model, lm8.mesh, prompts, n, sampling))
    return jax.tree.map(
        lambda *parts: np.concatenate([np.asarray(p) for p in parts])[:n],
        *(piece.draws for piece in pieces),
    )


@pytest.fixture(scope="module")
def prompts(golden_arrays):
    """Of different lengths."""
    tokens = golden_arrays["tokens"].tolist()
    return [tokens[0][:17], tokens[1][:5]]


def test_greedy_continuations_of_prompts_of_different_lengths(lm8, prompts, golden_weights):
    found = continue_golden(lm8, prompts, Sampling(temperature=0.0)).token.T
    for row, prompt in zip(found, prompts, strict=True):
        exact, gaps = reference.greedy(golden_weights, lm8.config, prompt, 24)
        assert min(gaps) > 1e-5
        assert row.tolist() == exact


def test_probabilities_on_the_way_are_those_of_a_full_forward_pass(lm8, prompts, golden_weights):
    found = continue_golden(lm8, prompts, Sampling(temperature=0.7, top_p=0.9, seed=3))
    for row, prompt in enumerate(prompts):
        text = [*prompt, *found.token[:, row].tolist()]
        logits = reference.forward(golden_weights, lm8.config, [text])["logits"][0]
        for step, token in enumerate(found.token[:, row]):
            row_logits = logits[len(prompt) + step - 1]
            probs = reference.softmax(row_logits)
            assert found.prob[step, row] == pytest.approx(probs[token], rel=1e-4)
            best = np.sort(probs)[::-1][:8]
            np.testing.assert_allclose(found.top_probs[step, row], best, rtol=1e-4)
            assert reference.nucleus(row_logits / 0.7, 0.9 + 1e-4)[token]


def test_long_prompts_are_run_in_parts(lm8, prompts, monkeypatch):
    """Of 8 tokens here: some prompts end in the first part, others go on."""
    assert min(map(len, prompts)) <= 8 < max(map(len, prompts))
    lengths = []
    settings = Sampling(temperature=0.8, seed=5)
    whole = continue_golden(lm8, prompts, settings)
    monkeypatch.setattr(generate, "PREFILL_PART", 8)
    prefill = generate.prefill

    def counted(model, tokens, *rest):
        lengths.append(tokens.shape[1])
        return prefill(model, tokens, *rest)

    monkeypatch.setattr(generate, "prefill", counted)
    found = continue_golden(lm8, prompts, settings)
    np.testing.assert_array_equal(found.token, whole.token)
    np.testing.assert_allclose(found.prob, whole.prob, rtol=1e-4)
    assert len(lengths) > 1 and set(lengths) == {8}


def test_settings_and_seeds_can_be_given_for_each_prompt(lm8, prompts):
    each = continue_golden(
        lm8, prompts, Sampling(temperature=[0.0, 1.5], top_p=[1.0, 0.8], seed=[9, 4])
    ).token
    greedy = continue_golden(lm8, prompts, Sampling(temperature=0.0)).token
    seeded = continue_golden(lm8, prompts, Sampling(temperature=1.5, top_p=0.8, seed=3)).token
    np.testing.assert_array_equal(each[:, 0], greedy[:, 0])
    np.testing.assert_array_equal(each[:, 1], seeded[:, 1])  # seed 3 + 1


def test_another_seed_gives_another_text(lm8, prompts):
    one, other, again = (
        continue_golden(lm8, prompts, Sampling(seed=seed)).token for seed in (1, 100, 1)
    )
    np.testing.assert_array_equal(one, again)
    assert (one != other).any(axis=0).all()
    assert (one[:, 0] != one[:, 1]).any()


# Lengths


@given(st.integers(1, 20_000), st.sampled_from([1, 8]))
def test_bucket_is_long_enough_and_not_much_longer(n, steps):
    size = bucket(n, steps=steps)
    assert n <= size <= max(16, n + 16, 2 * n if steps == 1 else n * 9 // 8 + 16)


@given(st.integers(1, 20_000), st.integers(0, 1000))
def test_bucket_never_passes_its_limit(n, more):
    assert n <= bucket(n, limit=n + more) <= n + more


@pytest.mark.parametrize("steps, most", [(1, 14), (8, 90)])
def test_there_are_few_buckets(steps, most):
    assert len({bucket(n, steps=steps) for n in range(1, 100_000)}) <= most


def test_pad_right_fills_up():
    np.testing.assert_array_equal(pad_right([[5, 6], [7]], 3, 9), [[5, 6, 9], [7, 9, 9]])


# What is refused, and before anything is computed


def refuse(lm8, message, prompts=((1, 2),), max_len=3, mesh=None, **settings):
    with pytest.raises(PromptError, match=message):
        generate_tokens(
            lm8.model,
            lm8.mesh if mesh is None else mesh,
            [list(p) for p in prompts],
            max_len,
            Sampling(**settings),
        )


@pytest.mark.parametrize("max_len", [5.5, "5", None])
def test_a_number_of_tokens_is_an_integer(max_len):
    with pytest.raises(PromptError, match=f"max_len must be an integer, found {max_len!r}"):
        check_max_len(max_len)
    check_max_len(np.int64(5))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_len": 0}, "max_len must be at least 1, found 0"),
        ({"max_len": -5}, "max_len must be at least 1, found -5"),
        ({"temperature": -0.1}, "temperature must be 0 or more, found -0.1"),
        ({"temperature": float("nan")}, "temperature must be 0 or more, found nan"),
        ({"temperature": float("inf")}, "temperature must be 0 or more, found inf"),
        ({"temperature": [0.5, 1.0]}, "temperature: expected one value, or one for each of 1"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, found 0.0"),
        ({"top_p": 1.01}, "top_p must be above 0 and at most 1, found 1.01"),
        ({"top_p": -0.5}, "top_p must be above 0 and at most 1, found -0.5"),
        ({"top_p": float("nan")}, "top_p must be above 0 and at most 1, found nan"),
        ({"seed": -1}, r"seed must be an integer from 0 to 2\*\*32 - 1, found -1"),
        ({"seed": 2**32}, r"seed must be an integer from 0 to 2\*\*32 - 1, found 4294967296"),
        ({"seed": 2**80}, "seed must be an integer"),
        ({"seed": [1, 2]}, "seed: expected one value, or one for each of 1 prompts, found 2"),
        ({"prompts": []}, "expected at least one prompt, found none"),
        ({"prompts": [[1], []]}, "prompt 1 is empty; it must hold at least one token"),
        ({"prompts": [[1, 256]]}, "prompt 0 holds token id 256; ids go from 0 to 255"),
        ({"prompts": [[1], [2, -1]]}, "prompt 1 holds token id -1; ids go from 0 to 255"),
        (
            {"prompts": [[1], [2] * 60], "max_len": 5},
            r"prompt 1 has 60 tokens and max_len is 5: 65 do not fit in the context of 64",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused(settings, message, lm8):
    refuse(lm8, message, **settings)


def test_prompts_that_do_not_divide_over_the_data_axis_are_refused(lm8):
    message = "number of prompts must divide over the mesh's 2 'data' devices, found 3"
    refuse(lm8, message, prompts=[[1], [2], [3]], mesh=grokkit.make_mesh(2, 4))


def test_the_whole_context_can_be_used(lm8):
    generate_tokens(lm8.model, lm8.mesh, [[1] * 60], 4, Sampling())  # is not refused


def test_the_largest_seed_wraps_around(lm8):
    rows = Sampling(seed=2**32 - 1).rows(2, 256)
    assert rows.seed.tolist() == [2**32 - 1, 0]


@pytest.mark.slow
def test_memory_stays_level_over_two_thousand_tokens(tiny_config):
    config = dataclasses.replace(tiny_config, context_length=2200)
    mesh = grokkit.make_mesh(1, 1)
    model = place(initialise(config, jax.random.key(0)), mesh)
    process, held, resident = psutil.Process(), [], []
    pieces = generate_tokens(model, mesh, [[5, 6, 7]], 2000, Sampling(seed=1), block=8)
    for i, piece in enumerate(pieces):
        np.asarray(piece.draws.token)
        if i % 10:
            continue
        held.append(sum(a.nbytes for a in jax.live_arrays()))
        resident.append(process.memory_info().rss)
    assert len(held) > 20
    # The last round has no next one under way.
    assert max(held[1:]) - min(held[1:]) < 2000 * 4, "arrays are kept from step to step"
    assert max(resident[len(resident) // 2 :]) - resident[len(resident) // 4] < 16 * 2**20
