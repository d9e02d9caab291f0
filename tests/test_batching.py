"""Requests that share a batch get the tokens that each would get alone."""

import re

import numpy as np
import pytest
from helpers import random_model

import grokkit
from grokkit import batching, generate
from grokkit.batching import ContinuousBatch
from grokkit.errors import PromptError
from grokkit.generate import generate_tokens
from grokkit.language_model import LanguageModel
from grokkit.sampling import Sampling
from grokkit.stop_strings import StopStrings

LONGEST = 20  # new tokens
END = 2
LENGTHS = 1, 5, 12, 20, 9, 1, 5, 50, 33  # of prompts, which are padded to 16, 32 and 64


@pytest.fixture(scope="module")
def lm(tiny_config, tiny_lm):
    """On one device, where programs compile fastest."""
    mesh = grokkit.make_mesh(1, 1)
    return LanguageModel(random_model(tiny_config, 0, mesh), mesh, tiny_lm.tokenizer, "tiny")


@pytest.fixture(scope="module")
def pool(lm):
    """Requests, and what `generate_tokens` draws for each of them alone."""
    random = np.random.default_rng(0)
    few = [END, *range(60, 66)]  # so that texts end
    requests = [
        {"temperature": 0.0},
        {"temperature": 0.0, "repetition_penalty": 1.7},
        {"temperature": 1.0, "seed": 5},
        {"temperature": 3.0, "top_p": 0.8, "seed": 6},
        {"temperature": 5.0, "allowed": few, "seed": 7},
        {"temperature": 5.0, "allowed": few, "seed": 8},
        {"temperature": 0.7, "top_p": 0.6, "seed": 7},
        {"temperature": 2.0, "top_k": 9, "min_p": 0.1, "seed": 2**32 - 1},
        {"temperature": 9.0, "seed": 0},
    ]
    alone = []
    for i, request in enumerate(requests):
        prompt = random.integers(4, lm.config.vocab_size, LENGTHS[i]).tolist()
        rounds = generate_tokens(lm.model, lm.mesh, [prompt], LONGEST, Sampling(**request))
        tokens = np.concatenate([np.asarray(p.draws.token) for p in rounds])[:LONGEST, 0].tolist()
        alone.append((prompt, request, tokens))
    assert any(END in tokens[1:] for _, _, tokens in alone)
    assert sum(END not in tokens for _, _, tokens in alone) >= 5
    return alone


def expected(lm, prompt, tokens, max_len, stop):
    """Text and reason by the definition, from the tokens drawn alone."""
    decoder, text = lm.tokenizer.stream_decoder(prompt), ""
    for token in tokens[:max_len]:
        if token == END:
            return text, "end"
        text += decoder.push(token)
        if stop and stop in text:
            return text[: text.index(stop)], "stop"
    return text, "length"


def random_schedule(batch, lm, pool, random, step=None):
    """Submit, cancel and step at random; check each request when all have ended."""
    step = step or batch.step
    submitted = []
    for _ in range(30):
        for _ in range(random.integers(0, 4)):
            prompt, request, tokens = pool[random.integers(len(pool))]
            max_len = int(random.integers(1, LONGEST + 1))
            text = expected(lm, prompt, tokens, LONGEST, None)[0]
            start = random.integers(len(text)) if text else 0
            stop = text[start : start + 3] if random.random() < 0.3 else ""
            generation = batch.submit(prompt, max_len, **request, stop=[stop] if stop else [])
            submitted.append((generation, expected(lm, prompt, tokens, max_len, stop), tokens))
        if submitted and random.random() < 0.2:
            submitted[random.integers(len(submitted))][0].cancel()
        step()
    while not batch.idle:
        step()
    reasons = set()
    for generation, (text, reason), tokens in submitted:
        ids = [token.id for token in generation.tokens]
        assert ids == tokens[: len(ids)]
        reasons.add(generation.finish_reason)
        if generation.finish_reason == "cancelled":
            assert text.startswith(generation.text)
        else:
            assert (generation.text, generation.finish_reason) == (text, reason)
    return reasons


@pytest.fixture(scope="module")
def batch(lm):
    return ContinuousBatch(lm, slots=4, block=2)


@pytest.fixture(scope="module")
def plain(pool):
    """Those of the pool that need no program of their own."""
    rare = {"allowed", "top_k", "repetition_penalty"}
    return [request for request in pool if not rare & request[1].keys()]


def test_random_schedules_change_no_token(batch, lm, plain):
    reasons = set()
    for seed in range(16):
        reasons |= random_schedule(batch, lm, plain, np.random.default_rng(seed))
    assert {"stop", "length", "cancelled"} <= reasons


@pytest.mark.slow
def test_random_schedules_of_all_settings_change_no_token(batch, lm, pool):
    reasons = set()
    for seed in range(16, 80):
        reasons |= random_schedule(batch, lm, pool, np.random.default_rng(seed))
    assert {"end", "stop", "length", "cancelled"} <= reasons


@pytest.mark.slow
def test_random_schedules_with_prompts_in_parts(batch, lm, pool, monkeypatch):
    monkeypatch.setattr("grokkit.generate.PREFILL_PART", 16)
    together = []

    def counting(model, tokens, lengths, *rest):
        together.append((tokens.shape[1], int((lengths > 0).sum())))
        return generate.prefill_in_parts(model, tokens, lengths, *rest)

    monkeypatch.setattr("grokkit.batching.prefill_in_parts", counting)
    for seed in range(80, 96):
        random_schedule(batch, lm, pool, np.random.default_rng(seed))
    assert {size for size, _ in together} == {16, 32, 64}
    assert {n for _, n in together} >= {1, 2, 3}


def test_random_schedules_with_interrupts(batch, lm, plain, monkeypatch):
    """What waits is spared, all else is cancelled, nothing is lost sight of."""
    random, n = np.random.default_rng(1), 0

    def at_times_cut_off(function):
        def run(*args, **options):
            if random.random() < 0.02:
                raise KeyboardInterrupt
            return function(*args, **options)

        return run

    for name in ("prefill_in_parts", "join", "decode", "to_host"):
        monkeypatch.setattr(batching, name, at_times_cut_off(getattr(batching, name)))
    monkeypatch.setattr(batching.Generation, "take", at_times_cut_off(batching.Generation.take))

    def step():
        nonlocal n
        try:
            batch.step()
        except KeyboardInterrupt:
            n += 1

    for seed in range(96, 104):
        random_schedule(batch, lm, plain, np.random.default_rng(seed), step)
    assert n > 10


def test_slots_over_the_data_axis(tiny_config, lm, plain):
    mesh = grokkit.make_mesh(2, 2)
    spread = LanguageModel(random_model(tiny_config, 0, mesh), mesh, lm.tokenizer)
    batch = ContinuousBatch(spread, slots=2, block=2)
    random_schedule(batch, lm, plain, np.random.default_rng(99))
    keys = batch._state.cache.keys
    assert keys.sharding.shard_shape(keys.shape)[1] == 1


def test_probabilities_and_alternatives_are_those_of_a_stream(lm, batch, pool):
    prompt, request, _ = pool[2]
    generation = batch.submit(prompt, 6, **request)
    batch.submit(pool[3][0], 9, **pool[3][1])
    for found, alone in zip(generation, lm.stream(prompt, 6, **request), strict=True):
        assert (found.id, found.text) == (alone.id, alone.text)
        assert found.prob == pytest.approx(alone.prob, rel=1e-4)
        assert [a[:2] for a in found.alternatives] == [a[:2] for a in alone.alternatives]
    batch.run()


def test_iterating_over_one_lets_the_others_go_on(batch, pool):
    one, two = (batch.submit(p, 12, **request) for p, request, _ in pool[2:4])
    first = next(iter(one))
    assert one.tokens[0] == first and one.finish_reason is None
    assert "running" in repr(one) and "2 of 4 slots running" in repr(batch)
    assert one.result() == one.text
    assert len(two.tokens) >= 8
    assert len(two.result()) > 0 and batch.idle


def test_a_request_that_cannot_fit_is_refused_and_the_rest_go_on(lm, pool):
    batch = ContinuousBatch(lm, slots=1, block=2, pad_sizes=(16,), capacity=40)
    prompt, request, tokens = pool[0]
    good = batch.submit(prompt, 8, **request)
    for bad, message in [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": [1] * 90, "max_len": 10}, "100 do not fit in the context of 96"),
        ({"prompt": [1] * 10, "max_len": 31}, "41 do not fit in a slot of 40. Shorten"),
        ({"prompt": [1] * 17, "max_len": 3}, "17 tokens, and the largest of pad_sizes is 16"),
        ({"prompt": [5, 9999]}, "the prompt holds token id 9999"),
        ({"prompt": [5], "max_len": 0}, "max_len must be at least 1, found 0"),
        ({"prompt": [5], "top_p": 2.0}, "top_p must be above 0 and at most 1"),
        ({"prompt": [5], "stop": ["a", ""]}, "stop: expected strings of at least one character"),
    ]:
        with pytest.raises(PromptError, match=message):
            batch.submit(**({"max_len": 5} | bad))
    assert good.result() == expected(lm, prompt, tokens, 8, None)[0]
    assert batch.idle


@pytest.mark.parametrize(
    "options, message",
    [
        ({"slots": 0}, "slots must divide over the mesh's 1 'data' devices and be at least 1"),
        ({"capacity": 97}, "capacity must be from 2 to the context of 96, found 97"),
        ({"pad_sizes": (16, 128)}, r"pad_sizes must be from 1 to the 96 tokens.*\(16, 128\)"),
        ({"pad_sizes": ()}, "pad_sizes must be from 1"),
        ({"block": 0}, "block must be at least 1, found 0"),
    ],
)
def test_batches_that_cannot_be_made(options, message, lm):
    with pytest.raises(PromptError, match=message):
        ContinuousBatch(lm, **options)


def test_slots_that_do_not_divide_over_the_mesh(tiny_lm):
    odd = LanguageModel(tiny_lm.model, grokkit.make_mesh(2, 4), tiny_lm.tokenizer)
    with pytest.raises(PromptError, match="mesh's 2 'data' devices .* found 3"):
        ContinuousBatch(odd, slots=3)


@pytest.mark.slow
def test_compiling_ahead_leaves_nothing_to_compile(lm, pool, capsys):
    batch = ContinuousBatch(lm, slots=1, block=2, pad_sizes=(8, 24))
    batch.compile()
    assert "compiling: 100%" in capsys.readouterr().err
    functions = generate.prefill, generate.decode, generate.join
    programs = [function._cache_size() for function in functions]
    prompt, request, tokens = pool[3]
    found = [batch.submit(prompt, 5, **request) for _ in range(3)]
    found += [batch.submit([7] * 20, 5), batch.submit([7] * 5, 5)]
    batch.run()
    assert [function._cache_size() for function in functions] == programs
    text = expected(lm, prompt, tokens, 5, None)[0]
    assert [g.text for g in found[:3]] == [text] * 3


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["prefill_in_parts", "join", "decode", "to_host"])
def test_an_interrupt_cancels_what_runs_and_spares_what_waits(where, lm, batch, pool, monkeypatch):
    prompt, request, tokens = pool[2]
    running = [batch.submit(prompt, 12, **request) for _ in range(4)]
    waiting = batch.submit(prompt, 5, **request)
    with monkeypatch.context() as patch:
        patch.setattr(f"grokkit.batching.{where}", interrupt)
        with pytest.raises(KeyboardInterrupt):
            batch.run()
    assert {g.finish_reason for g in running} == {"cancelled"}
    assert waiting.finish_reason is None
    assert waiting.result() == expected(lm, prompt, tokens, 5, None)[0]


def test_an_interrupt_of_the_last_round_loses_sight_of_nobody(batch, pool, monkeypatch):
    last = batch.submit(pool[2][0], 1)  # whose slot is free as soon as its token is asked for
    with monkeypatch.context() as patch:
        patch.setattr("grokkit.batching.to_host", interrupt)
        with pytest.raises(KeyboardInterrupt):
            batch.step()
    assert last.finish_reason == "cancelled" and batch.idle


def test_an_interrupt_of_compiling_ahead(lm, pool, monkeypatch):
    prompt, request, tokens = pool[2]
    batch = ContinuousBatch(lm, slots=4, block=2, pad_sizes=(16,))
    with monkeypatch.context() as patch:
        patch.setattr("grokkit.batching.decode", interrupt)
        with pytest.raises(KeyboardInterrupt):
            batch.compile(progress=False)
    assert batch.submit(prompt, 5, **request).result() == expected(lm, prompt, tokens, 5, None)[0]


def test_a_request_may_fill_its_slot_and_the_context(lm, pool):
    """The last block is then cut by the end of the slot; nothing before it is written over."""
    prompt, request, _ = pool[2]
    for capacity, ids in [(len(prompt) + 7, prompt), (96, [5] * 89)]:
        batch = ContinuousBatch(lm, slots=2, block=4, capacity=capacity)
        rounds = generate_tokens(lm.model, lm.mesh, [ids], 7, Sampling(**request))
        alone = np.concatenate([np.asarray(p.draws.token) for p in rounds])[:7, 0].tolist()
        found = [batch.submit(ids, n, **request) for n in (7, 6, 7)]
        batch.run()
        for generation in found:
            text, reason = expected(lm, ids, alone, generation.max_len, None)
            assert (generation.text, generation.finish_reason) == (text, reason)


@pytest.mark.slow
def test_settings_that_few_use_beside_others(lm, batch, pool):
    """Texts that end, a repetition penalty, and their programs, which are left when they end."""
    wanted = [pool[4], pool[1], pool[0], pool[5]]
    found = [batch.submit(prompt, 20, **request) for prompt, request, _ in wanted]
    batch.run()
    for generation, (prompt, _, tokens) in zip(found, wanted, strict=True):
        text, reason = expected(lm, prompt, tokens, 20, None)
        assert (generation.text, generation.finish_reason) == (text, reason)
    assert "end" in {g.finish_reason for g in found}
    batch.submit(pool[0][0], 6, temperature=0.0).result()
    assert batch._state.seen is None


# Stop strings


@pytest.mark.parametrize("stop", ["", 5, None])
def test_what_cannot_be_looked_for(stop):
    with pytest.raises(PromptError, match="stop: expected strings of at least one character"):
        StopStrings(["a", stop])


def split(text, random):
    """Cut into pieces, some of them empty."""
    cuts = sorted(random.integers(0, len(text) + 1, random.integers(0, len(text) + 2)).tolist())
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@pytest.mark.parametrize("seed", range(20))
def test_stop_strings_are_found_wherever_tokens_are_cut(seed):
    from grokkit.continuation import StreamedToken

    random = np.random.default_rng(seed)
    for _ in range(50):
        text = "".join(random.choice(list("ab"), 12))
        stop = ["".join(random.choice(list("ab"), random.integers(1, 5))) for _ in range(2)]
        pieces = split(text, random)
        finder, got, stopped = StopStrings(stop), "", False
        for i, piece in enumerate(pieces):
            certain, stopped = finder.push(StreamedToken(i, piece, 1.0, ()))
            got += "".join(t.text for t in certain)
            seen = "".join(pieces[: i + 1])
            ends = [m.start() for s in stop for m in re.finditer(re.escape(s), seen)]
            assert stopped == bool(ends)
            if stopped:
                assert got == seen[: min(ends)]
                break
            assert seen.startswith(got)
        if not stopped:
            assert got + "".join(t.text for t in finder.finish()) == text
