"""A model whose layers stay on disk gives what the one in memory gives."""

import collections
import concurrent.futures
import dataclasses
import errno
import json
import mmap
import shutil
import threading
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error

import grokkit
from grokkit import cli, scoring, streamed_model
from grokkit.analysis.attribution import logit_attribution, router_attribution
from grokkit.analysis.causal_routing import forced_choices, next_token_losses
from grokkit.analysis.grids import Experts, Heads, Positions
from grokkit.analysis.lens import logit_lens
from grokkit.analysis.patching import attribution_patch, patch
from grokkit.batching import ContinuousBatch
from grokkit.checkpoint import (
    ahead,
    loading,
    mapped,
    open_checkpoint,
    pages,
    save_params,
    streaming,
)
from grokkit.checkpoint.loading import plan_params
from grokkit.checkpoint.streaming import LayerReader
from grokkit.errors import CheckpointError, GrokkitError, PromptError
from grokkit.generate import PREFILL_PART, Sampling, generate_tokens
from grokkit.kv_cache import KVCache
from grokkit.model import param_specs
from grokkit.quant import QuantizedArray, n_first

CLOSE = 1e-6


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return grokkit.make_mesh(1, 2)


@pytest.fixture(scope="module")
def resident(golden_dir, mesh) -> grokkit.LanguageModel:
    return grokkit.load(golden_dir, mesh=mesh, dtype="float32", progress=False)


@pytest.fixture(scope="module")
def streamed(golden_dir, mesh) -> grokkit.LanguageModel:
    return grokkit.load(golden_dir, mesh=mesh, dtype="float32", progress=False, stream=True)


@pytest.fixture(scope="module")
def tokens(golden_arrays) -> np.ndarray:
    return golden_arrays["tokens"]


EDITS = [
    grokkit.ForceExperts([1, 2], layers=[4]),
    grokkit.Scale("attn_out", 0.5, layers=[2, 11]),
    grokkit.Add("resid_mid", np.ones(64, np.float32), layers=6, positions=[-1]),
]


@pytest.fixture(scope="module")
def expected(resident, tokens):
    """Logits and every site of the model in memory, with edits."""
    return resident.run_with_cache(tokens, edits=EDITS)


def test_every_site_with_edits_is_that_of_the_model_in_memory(
    streamed, tokens, expected, golden_arrays
):
    logits, cache = streamed.run_with_cache(tokens, edits=EDITS)
    assert relative_error(logits, expected[0]) < CLOSE
    assert relative_error(logits, golden_arrays["exact_logits"]) > 1e-2
    assert cache.keys() == expected[1].keys() == list(grokkit.SITES)
    for name, value in expected[1].items():
        assert cache.entries[name].layers == expected[1].entries[name].layers
        assert cache[name].sharding == value.sharding, name
        if value.dtype == np.int32:
            np.testing.assert_array_equal(cache[name], value)
        else:
            # Of single sites a few differ by a rounding more than the logits.
            assert relative_error(cache[name], value) < 2 * CLOSE, name


def test_captures_of_some_layers_and_reductions(streamed, tokens, golden_arrays):
    captures = [
        grokkit.Capture("pattern", layers=(7, -1, 2), positions=-1),
        grokkit.Capture("resid_post", layers=(2, 7, 11), reduce=lambda x: (x, x.max(axis=-1))),
    ]
    logits, cache = streamed.run_with_cache(tokens, captures)
    assert relative_error(logits, golden_arrays["exact_logits"]) < 1e-4
    assert cache.entries["pattern"].layers == (7, 11, 2)
    pattern = golden_arrays["exact_pattern"][[7, 11, 2]][:, :, :, -1]
    assert relative_error(cache["pattern"], pattern) < 1e-4
    stream = golden_arrays["exact_resid"][[2, 7, 11]]
    assert relative_error(cache["resid_post"][0], stream) < 1e-4
    assert relative_error(cache["resid_post"][1], stream.max(axis=-1)) < 1e-4


@pytest.mark.slow
def test_the_same_tokens_are_drawn(streamed, resident, tokens, monkeypatch):
    """Prompts of several lengths in one pass, which takes them in parts, as it does long ones."""
    monkeypatch.setattr(streamed_model, "PREFILL_PART", 8)
    prompts = [tokens[0].tolist(), tokens[1][:5].tolist(), tokens[1].tolist()]
    sampling = Sampling(temperature=[0.0, 0.8, 1.0], top_p=0.9, seed=3)
    edits = streamed.resolve([grokkit.RouterTemperature(2.0, layers=5)], [8, 5, 8])

    passes = []
    layers = LayerReader.layers
    monkeypatch.setattr(LayerReader, "layers", lambda *a: passes.append(1) or layers(*a))
    n, arguments = 5, (prompts, 5, sampling)
    found = []
    for piece in generate_tokens(streamed.runnable, streamed.mesh, *arguments, edits=edits):
        found.append(piece.draws)
        assert len(passes) == len(found)  # a token is shown before the next one's pass
    assert len(found) == n
    expected = [
        piece.draws
        for piece in generate_tokens(resident.runnable, resident.mesh, *arguments, edits=edits)
    ]
    tokens_of, probs_of = (
        [np.concatenate([getattr(d, field) for d in draws])[:n] for draws in (found, expected)]
        for field in ("token", "prob")
    )
    np.testing.assert_array_equal(*tokens_of)
    assert relative_error(*probs_of) < 1e-5


@pytest.fixture(scope="module")
def tiny_streamed(tiny_lm, tiny_config, tiny_tokenizer_file, tmp_path_factory):
    """`tiny_lm`, which reads and writes text, streamed."""
    folder = tmp_path_factory.mktemp("streamed") / "tiny"
    save_params(tiny_lm.model, tiny_config, folder, tiny_tokenizer_file, progress=False)
    return grokkit.load(folder, tiny_lm.mesh, "float32", progress=False, stream=True)


@pytest.mark.slow
def test_text_and_captures_while_generating(tiny_lm, tiny_streamed):
    prompts, wanted = ["The quick", "Two and two make"], ["resid_post", "expert_indices"]
    texts, cache = tiny_streamed.generate_with_cache(prompts, wanted, max_len=4)
    expected_texts, expected = tiny_lm.generate_with_cache(prompts, wanted, max_len=4)
    assert texts == expected_texts
    np.testing.assert_array_equal(cache["expert_indices"], expected["expert_indices"])
    assert relative_error(cache["resid_post"], expected["resid_post"]) < CLOSE


@pytest.mark.slow
def test_text_token_by_token(tiny_lm, tiny_streamed):
    text = tiny_lm.generate("The quick", max_len=6, seed=1)
    assert tiny_streamed.generate("The quick", max_len=6, seed=1) == text
    assert "".join(t.text for t in tiny_streamed.stream("The quick", max_len=6, seed=1)) == text


def counted(streamed, monkeypatch):
    """A list that grows by one with every pass."""
    passes, layers = [], streamed.runnable.reader.layers
    monkeypatch.setattr(
        streamed.runnable.reader, "layers", lambda *a, **k: passes.append(1) or layers(*a, **k)
    )
    return passes


def test_scores_and_perplexity(tiny_lm, tiny_streamed, monkeypatch):
    """All texts share a pass: of several groups, and long ones in parts."""
    prompts = ["The quick", "Two and two make"]
    expected = tiny_lm.score(prompts, [" brown fox", " four."])
    ids = np.random.default_rng(0).integers(4, 300, 70).tolist()
    perplexity = tiny_lm.perplexity(ids, window=32, stride=9)
    for part in (PREFILL_PART, 16):
        monkeypatch.setattr(streamed_model, "PREFILL_PART", part)
        monkeypatch.setattr(scoring, "PREFILL_PART", part)
        passes = counted(tiny_streamed, monkeypatch)
        found = tiny_streamed.score(prompts, [" brown fox", " four."])
        for score, other in zip(found, expected, strict=True):
            assert score.tokens == other.tokens
            assert relative_error(score.logprobs, other.logprobs) < CLOSE
        assert len(passes) == 1
        assert tiny_streamed.perplexity(ids, 32, 9) == pytest.approx(perplexity, rel=CLOSE)
        assert len(passes) == 2
    monkeypatch.setattr(scoring, "_STREAMS", 2 * 4 * 32 * 32)  # two windows at a time, of six
    assert tiny_streamed.perplexity(ids, 32, 9) == pytest.approx(perplexity, rel=CLOSE)
    assert len(passes) == 2 + 3


def test_requests_that_share_a_batch(tiny_lm, tiny_streamed, monkeypatch):
    """Of several lengths, more than there are slots; prompts of all that join share a pass."""
    prompts = ["The quick", "Two and two make four and four and two make", "In", "One"]
    passes = counted(tiny_streamed, monkeypatch)
    settings = {"slots": 3, "max_len": 5, "temperature": 0.7, "seed": 2, "progress": False}
    found = grokkit.batch(prompts, tiny_streamed, **settings)
    assert found == grokkit.batch(prompts, tiny_lm, **settings)
    assert {c.n_tokens for c in found} == {5}
    # The first three: a pass for their prompts and four for the rest; and the fourth likewise.
    assert len(passes) == 5 + 5


@pytest.mark.slow
def test_requests_one_by_one(tiny_lm, tiny_streamed):
    prompts = ["The quick", "Two and two make four and four and two make"]
    batch = ContinuousBatch(tiny_streamed, slots=2)
    one = batch.submit(prompts[0], max_len=5, temperature=0.0)
    two = batch.submit(prompts[1], max_len=3, seed=3, stop=["e"])
    assert one.result() == tiny_lm.generate(prompts[0], max_len=5, temperature=0.0)
    assert tiny_lm.generate(prompts[1], max_len=3, seed=3).startswith(two.result())


@pytest.mark.slow
def test_a_file_of_prompts_on_the_command_line(tiny_lm, tiny_streamed, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The quick\nTwo and two make\n")
    out = tmp_path / "out.jsonl"
    cli.main(["sample", tiny_streamed.name, "--prompts", str(prompts), "--out", str(out),
              "--max-len", "4", "--seed", "5", "--stream", "--no-progress"])  # fmt: skip
    found = [json.loads(line)["text"] for line in out.read_text().splitlines()]
    assert found == tiny_lm.generate(["The quick", "Two and two make"], max_len=4, seed=5)


def test_a_full_cache_is_refused_as_in_memory(streamed, resident, tokens):
    for lm in (resident, streamed):
        model = lm.runnable
        with jax.set_mesh(lm.mesh):
            cache = KVCache.empty(lm.config, 2, 6, model.dtype, lm.mesh)
            with pytest.raises(PromptError, match="room for 7 more tokens, found 6 of 6 places"):
                model(jnp.asarray(tokens[:, :7]), cache=cache)


@pytest.mark.slow
def test_analyses(streamed, resident, tokens):
    reading, expected = (logit_lens(lm, tokens[:1], ["resid_post"]) for lm in (streamed, resident))
    np.testing.assert_array_equal(reading.top_tokens, expected.top_tokens)
    # Divergences of a few thousandths of a nat, each a sum of differences.
    np.testing.assert_allclose(reading.kl, expected.kl, atol=1e-6)
    losses, expected = (next_token_losses(lm, tokens) for lm in (streamed, resident))
    assert relative_error(losses, expected) < CLOSE
    some = np.arange(tokens.shape[1])[None] == 3
    found, expected = (
        forced_choices(lm, tokens[:1], layers=[2, -1], positions=some, rows=28, progress=False)
        for lm in (streamed, resident)
    )
    assert relative_error(found.loss[:, 3], expected.loss[:, 3]) < 1e-5


def metric(logits):
    return logits[:, -1, 7]


@pytest.mark.slow
def test_a_patching_sweep(streamed, resident, tokens):
    """Many cases share a pass, which begins at the first layer that they change."""
    clean, corrupted = tokens[0, :6], tokens[1, :6]
    sweeps = [
        patch(lm, clean, corrupted, metric, Positions("resid_pre"), rows=24, progress=False)
        for lm in (streamed, resident)
    ]
    assert relative_error(sweeps[0].values, sweeps[1].values) < 1e-5


@pytest.mark.parametrize("at", ["corrupted", "clean"])
@pytest.mark.slow
def test_attribution_patching(at, streamed, resident, tokens, monkeypatch):
    """The gradient comes from a pass from the last layer to the first."""
    passes = counted(streamed, monkeypatch)
    clean, corrupted = tokens[0, :6], tokens[1, :6]
    for grid in (Positions("resid_pre"), Heads(), Experts()):
        found, expected = (
            attribution_patch(lm, clean, corrupted, metric, grid, at) for lm in (streamed, resident)
        )
        assert np.abs(expected.effect).max() > 1e-3
        assert relative_error(found.effect, expected.effect) < 1e-4
    assert len(passes) == 3 * 3  # of both prompts, and back


@pytest.mark.slow
def test_attribution(streamed, resident, tokens, monkeypatch):
    """One pass; and of each layer no more than is needed besides."""
    passes = counted(streamed, monkeypatch)
    for attribute in (
        lambda lm: logit_attribution(lm, tokens, 7, against=9),
        lambda lm: router_attribution(lm, tokens, 5),
    ):
        found, expected = (attribute(lm) for lm in (streamed, resident))
        assert relative_error(found.sum(), expected.sum()) < 1e-5
        for field in ("embed", "heads", "experts", "total"):
            assert relative_error(getattr(found, field), getattr(expected, field)) < 1e-5, field
    assert len(passes) == 2


def test_what_needs_all_layers_is_refused(streamed):
    with pytest.raises(GrokkitError, match=r"all layers in memory .* without stream=True"):
        _ = streamed.model


def test_bill_is_that_of_the_model_in_memory(streamed, resident, tokens):
    found, expected = streamed.bill(tokens), resident.bill(tokens)
    assert found.rows == expected.rows
    assert expected.seconds == 0 and "disk" not in repr(expected)


def test_bill_says_how_long_a_pass_reads(golden_dir, mesh, resident, tokens, monkeypatch):
    lm = grokkit.load(golden_dir, mesh, "float32", progress=False, stream=True)
    assert isinstance(lm.runnable, streamed_model.StreamedGrok)
    reader = lm.runnable.reader
    clock = iter(range(0, 1000, 2))  # every read seems to take two seconds
    monkeypatch.setattr(streaming.time, "perf_counter", lambda: float(next(clock)))
    largest = max(plan.nbytes for plan in reader._plans[0])
    assert lm.bill(tokens, "embed").seconds == reader.nbytes / (largest / 2)
    lm(tokens)
    found = lm.bill(tokens, "embed")
    assert (
        found.pass_nbytes
        == reader.nbytes
        == sum(a.nbytes for a in jax.tree.leaves(resident.model.blocks))
    )
    assert found.seconds == 12 * 2
    for text in (repr(found), found._repr_html_()):
        assert "a pass reads" in text and "24 s at" in text


def test_repr_says_that_it_is_streamed(streamed):
    assert repr(streamed).endswith("mesh data=1 x model=2 of cpu; layers streamed from disk)")


# Memory and failures


@pytest.mark.parametrize("part", [loading.HostPart, loading.DevicePart])
def test_two_layers_in_memory_at_most(golden_dir, mesh, part, monkeypatch):
    """Of twelve; while one is used the next is being read."""
    monkeypatch.setattr(loading, "new_part", part)
    if part is loading.DevicePart:  # which cannot use what lies otherwise
        monkeypatch.setattr(streaming, "as_stored", lambda plans: plans)
    checkpoint = open_checkpoint(golden_dir)
    plans = plan_params(checkpoint, param_specs(checkpoint.config), mesh)
    reader = LayerReader(plans.blocks)
    made, alive = [], []
    read = reader._read

    def watch(*what):
        arrays = read(*what)
        made.extend(weakref.ref(a) for a in arrays)
        alive.append(sum(ref() is not None for ref in made) / len(arrays))
        return arrays

    monkeypatch.setattr(reader, "_read", watch)
    expected = loading.load_params(checkpoint, param_specs(checkpoint.config), mesh, False).blocks
    reader.past_cache = True  # the others are tested below
    i = -1
    for block in reader.layers():  # enumerate would hold on to the last one
        i += 1
        check_layer(block, jax.tree.map(lambda a, i=i: a[i], expected))
        del block
    assert i == 11 and max(alive) <= 2
    if part is loading.HostPart:  # the same memory, over and over, of both devices
        kept = [p for slot in reader._parts for leaf in slot.values() for p in leaf.values()]
        assert sum(memory_of(kept).values()) < 2.5 * reader.nbytes / reader.n_layers


def check_layer(found, expected):
    """The matrices that are a file's bytes, too, are those that lie by themselves."""

    def check(ours, theirs):
        assert ours.shape == theirs.shape
        if isinstance(ours, QuantizedArray) and ours.stored:
            assert ours.weight.sharding.is_fully_replicated
            ours = n_first(ours)
            np.testing.assert_array_equal(ours.weight, theirs.weight)
            ours, theirs = ours.scales, theirs.scales
        for leaf, like in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
            np.testing.assert_array_equal(leaf, like)
            assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)

    jax.tree.map(check, found, expected, is_leaf=lambda a: isinstance(a, QuantizedArray))


def memory_of(parts):
    """Addresses of some parts' memory, and its bytes."""
    return {part.memory.ctypes.data: part.memory.nbytes for part in parts}


class _Ended:
    """As an array of which JAX is asked whether it is there."""

    def __init__(self, waited, gate=None):
        self.waited, self.gate = waited, gate

    def block_until_ready(self):
        if self.gate:
            assert self.gate.wait(10)
        self.waited.append(self)
        return self


@pytest.mark.parametrize("n_devices", [1, 2])
def test_memory_is_not_read_into_until_its_layer_is_used_no_more(golden_dir, n_devices):
    """Although the next layer has been asked for, and given."""
    reader = reader_of(golden_dir, n_devices)
    expected = [jax.tree.map(np.array, layer) for layer in reader.layers()]
    waited, gate, layers = [], threading.Event(), reader.layers()
    first, given = next(layers), [_Ended(waited, gate)]
    reader.is_used_until(given[0])
    second = next(layers)
    given.append(_Ended(waited))
    reader.is_used_until({"of the second": given[1]})
    for found, layer in ((first, expected[0]), (second, expected[1])):
        jax.tree.map(np.testing.assert_array_equal, found, layer)
    assert not waited
    gate.set()
    third = next(layers)
    assert waited == given[:1] or waited == given  # one of which the thread comes to by itself
    given.append(_Ended(waited))
    reader.is_used_until(given[2])
    jax.tree.map(np.testing.assert_array_equal, third, expected[2])
    layers.close()
    assert given[2] in waited
    # What a pass said does not hold another up.
    del waited[:]
    for found, layer in zip(reader.layers(), expected, strict=True):
        jax.tree.map(np.testing.assert_array_equal, found, layer)
    assert not waited


def test_the_disk_is_told_of_every_layer_before_it_is_read(golden_dir, mesh, monkeypatch):
    """Of the next one's beginning while a layer is read; so it need not wait for processors."""
    monkeypatch.setattr(streaming, "as_stored", lambda plans: plans)
    for is_mapped in ("can_be_mapped", "is_soon_copied"):
        monkeypatch.setattr(streaming, is_mapped, lambda plan: False)
    checkpoint = open_checkpoint(golden_dir)
    reader = LayerReader(plan_params(checkpoint, param_specs(checkpoint.config), mesh).blocks)
    called_for, told, read_leaves = {}, [], streaming.read_leaves

    def watch(plans, parts, **how):
        found = read_leaves(plans, parts, **how)
        told.append(called_for.copy())
        return found

    def call_for(path, offset, n_bytes):
        called_for.setdefault(path, set()).update(range(offset, offset + n_bytes))

    class AtOnce(concurrent.futures.ThreadPoolExecutor):
        def submit(self, function, *what):
            function(*what)

    monkeypatch.setattr(streaming, "read_leaves", watch)
    monkeypatch.setattr(pages, "call_for", call_for)
    monkeypatch.setattr(ahead, "ThreadPoolExecutor", AtOnce)
    for _ in reader.layers():
        pass
    expected = {}
    for i in range(reader.n_layers + 1):
        for plan in reader._plans[i] if i < reader.n_layers else []:
            for source in plan.sources:
                span = range(source.span.offset, source.span.offset + source.span.nbytes)
                expected.setdefault(source.file.path, set()).update(span)
        if i:  # what comes next is known too
            assert told[i - 1] == expected


def test_layers_that_memory_would_not_keep_are_read_past_the_page_cache(
    golden_dir, mesh, monkeypatch
):
    checkpoint = open_checkpoint(golden_dir)
    blocks = plan_params(checkpoint, param_specs(checkpoint.config), mesh).blocks
    past, read_leaves = [], streaming.read_leaves
    # Copies: the reader uses its memory again.
    expected = [jax.tree.map(np.array, layer) for layer in LayerReader(blocks).layers()]

    def watch(plans, parts, **how):
        past.append(how["past_cache"])
        return read_leaves(plans, parts, **how)

    monkeypatch.setattr(streaming, "read_leaves", watch)
    reader = LayerReader(blocks)
    for memory, is_past in ((reader.nbytes * 2, False), (reader.nbytes, True)):
        past.clear()
        monkeypatch.setattr(streaming, "_physical_memory", lambda n=memory: n)
        reader = LayerReader(blocks)
        for found, layer in zip(reader.layers(), expected, strict=True):
            jax.tree.map(np.testing.assert_array_equal, found, layer)
        assert past == [is_past] * 12


def test_a_pass_that_fails_leaves_the_model_usable(streamed, tokens):
    class Fails(Exception):
        pass

    def fail(x):
        raise Fails

    before = streamed(tokens).logits
    with pytest.raises(Fails) as error:  # which holds on to the failed pass, as a notebook does
        streamed.run_with_cache(tokens, grokkit.Capture("resid_post", reduce=fail))
    np.testing.assert_array_equal(streamed(tokens).logits, before)
    assert error and not any("reading" in t.name for t in threading.enumerate())


def test_a_file_that_goes_is_named(golden_dir, tmp_path, tokens):
    shutil.copytree(golden_dir, tmp_path / "tiny")
    lm = grokkit.load(
        tmp_path / "tiny", grokkit.make_mesh(1, 2), "float32", progress=False, stream=True
    )
    lm(tokens)
    (tmp_path / "tiny" / "ckpt-0" / "tensor00026_000").unlink()
    with pytest.raises(CheckpointError, match=r"tensor00026_000\n.*was there when the checkpoint"):
        lm(tokens)


# Pages of the files themselves


@pytest.fixture(scope="module")
def converted(golden_dir, tmp_path_factory):
    """tiny in grokkit's own layout, where arrays lie as the model holds them."""
    target = tmp_path_factory.mktemp("converted") / "tiny"
    grokkit.convert(golden_dir, target, progress=False)
    return target


def plans_of(directory, n_devices=1):
    checkpoint = open_checkpoint(directory)
    specs = param_specs(checkpoint.config)
    return plan_params(checkpoint, specs, grokkit.make_mesh(1, n_devices)).blocks


def reader_of(directory, n_devices=1):
    return LayerReader(plans_of(directory, n_devices))


def resident_bytes(directory):
    """How much of a directory's files this process has in memory, by the addresses of its maps."""
    found, addresses, counts = {}, (0, 0), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if "-" in first:
            start, end = (int(address, 16) for address in first.split("-"))
            addresses, counts = (start, end), str(directory) in line
        elif counts and first == "Rss:":
            found[addresses] = 1024 * int(line.split()[1])
    return found


@pytest.mark.parametrize(
    ("n_devices", "system"), [(1, ""), (2, ""), (1, "in pieces"), (1, "without advice")]
)
def test_layers_from_the_page_cache_are_those_that_are_copied(
    converted, n_devices, system, monkeypatch
):
    if system:  # these arrays would be too small to be had a piece at a time
        monkeypatch.setattr(pages, "LARGE", 1)
        monkeypatch.setattr(pages, "AT_ONCE", mmap.PAGESIZE)
    if system == "without advice":
        monkeypatch.setattr(pages, "_advise", lambda *what: errno.EINVAL)
    reader, copying = reader_of(converted, n_devices), reader_of(converted, n_devices)
    copying.past_cache = True
    for backwards in (False, True):
        for layer, other in zip(
            reader.layers(backwards=backwards), copying.layers(backwards=backwards), strict=True
        ):
            jax.tree.map(np.testing.assert_array_equal, layer, other)
            assert jax.tree.map(jnp.shape, layer) == jax.tree.map(jnp.shape, reader.abstract())
            for leaf, like in zip(*map(jax.tree.leaves, (layer, reader.abstract())), strict=True):
                assert leaf.sharding == like.sharding


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux says what is mapped")
@pytest.mark.parametrize("n_devices", [1, 2, 8])
def test_the_files_pages_of_two_layers_at_most_are_used(converted, n_devices):
    reader, seen = reader_of(converted, n_devices), []
    of_a_layer = reader.nbytes / reader.n_layers
    for layer in reader.layers():
        jax.block_until_ready(layer)
        there = resident_bytes(converted)
        seen.append(sum(there.values()))
        inside = [
            any(a <= leaf.addressable_data(0).unsafe_buffer_pointer() < b for a, b in there)
            for leaf in jax.tree.leaves(layer)
        ]
        if n_devices == 1:
            assert all(inside)  # nothing was copied
            assert not any(reader._parts)
    ends = 2 * 2 * mmap.PAGESIZE * len(inside)  # an array begins and ends within a page
    assert of_a_layer <= max(seen) <= 2 * of_a_layer + ends


def test_a_streamed_model_of_mapped_layers_gives_what_the_resident_one_gives(converted, tokens):
    mesh = grokkit.make_mesh(1, 1)
    lm, streamed = (
        grokkit.load(converted, mesh, "float32", progress=False, stream=stream)
        for stream in (False, True)
    )
    (logits, cache), (found, found_cache) = (
        model.run_with_cache(tokens, "expert_indices") for model in (lm, streamed)
    )
    assert relative_error(found, logits) < CLOSE
    np.testing.assert_array_equal(found_cache["expert_indices"], cache["expert_indices"])


def test_a_mapped_file_that_changes_is_named(converted, tmp_path, tokens):
    shutil.copytree(converted, tmp_path / "tiny")
    lm = grokkit.load(tmp_path / "tiny", grokkit.make_mesh(1, 1), "float32", False, stream=True)
    lm(tokens)
    shard = max((tmp_path / "tiny").glob("*.safetensors"), key=lambda path: path.stat().st_size)
    shard.write_bytes(shard.read_bytes() + b"more")
    with pytest.raises(CheckpointError, match=rf"{shard.name}\n.*was there when the checkpoint"):
        lm(tokens)


def test_a_mapped_file_that_cannot_be_read_is_named(converted, monkeypatch):
    monkeypatch.setattr(pages, "_advise", lambda address, n_bytes, advice: errno.EIO)
    with pytest.raises(OSError, match=r"Input/output error: '.*\.safetensors'"):
        next(reader_of(converted).layers())


@pytest.mark.parametrize("n_devices", [1, 2, 8])
@pytest.mark.parametrize("past_cache", [False, True])
@pytest.mark.parametrize("layout", ["official", "converted"])
def test_matrices_are_used_as_they_lie(golden_dir, converted, layout, past_cache, n_devices):
    """In the page cache, or read past it; by all devices in one place."""
    directory = golden_dir if layout == "official" else converted
    reader = reader_of(directory, n_devices)
    expected = loading.load_planned(plans_of(directory, n_devices), "", progress=False)
    assert not reader.past_cache
    reader.past_cache = past_cache
    stored = set()
    for i, layer in enumerate(reader.layers()):
        check_layer(layer, jax.tree.map(lambda a, i=i: a[i], expected))
        assert jax.tree.map(jnp.shape, layer) == jax.tree.map(jnp.shape, reader.abstract())
        if past_cache:  # in memory that was read into
            kept = [part.memory for leaf in reader._parts[i % 2].values() for part in leaf.values()]
            there = [(m.ctypes.data, m.ctypes.data + m.nbytes) for m in kept]
        else:
            there = list(resident_bytes(directory))
        for part in (layer.moe, layer.attention):
            for name, found in vars(part).items():
                if not isinstance(found, QuantizedArray):
                    continue
                places = {
                    shard.data.unsafe_buffer_pointer() for shard in found.weight.addressable_shards
                }
                for place in places:
                    assert any(a <= place < b for a, b in there)  # it was not copied
                if found.stored:
                    assert len(places) == 1
                    stored.add((type(part).__name__, name))
    # Of the converted ones those whose parts are in one piece need not be told where they lie.
    in_pieces = {("MoE", "gate"), ("MoE", "value"), ("MoE", "out"), ("Attention", "out")}
    rest = {("Attention", name) for name in ("query", "key", "value")}
    if layout == "official":
        assert stored == in_pieces | rest
    else:
        assert stored == (in_pieces if n_devices > 1 else set())
    assert reader.rate() > 0


@pytest.mark.parametrize("n_devices", [1, 2])
def test_official_matrices_as_they_lie_give_the_results_of_turned_ones(
    golden_dir, tokens, n_devices
):
    """Products of few rows are summed in another order, and no others."""

    def load(dtype, stream):
        mesh = grokkit.make_mesh(1, n_devices)
        return grokkit.load(golden_dir, mesh, dtype, progress=False, stream=stream)

    lm, streamed, rounded, rounded_streamed = (
        load(dtype, stream) for dtype in ("float32", "bfloat16") for stream in (False, True)
    )
    assert streamed.runnable.reader.abstract().moe.gate.stored
    for rows in (1, 40):
        ids = np.random.default_rng(rows).integers(3, lm.config.vocab_size, (1, rows))
        expected = lm(ids).logits
        assert relative_error(streamed(ids).logits, expected) < CLOSE
        # In bfloat16, a token whose experts are nearly even may choose others.
        found, rounding = (
            relative_error(m(ids).logits, expected) for m in (rounded_streamed, rounded)
        )
        assert found < 1.5 * rounding
    found, expected = (logit_attribution(m, tokens, 7, against=9).heads for m in (streamed, lm))
    assert relative_error(found, expected) < 1e-5
    clean, corrupted = tokens[0, :6], tokens[1, :6]
    found, expected = (
        attribution_patch(m, clean, corrupted, lambda logits: logits[:, -1, 5], Heads()).effect
        for m in (streamed, lm)
    )
    assert np.abs(expected).max() > 1e-3
    assert relative_error(found, expected) < 1e-4


@pytest.mark.parametrize("n_devices", [1, 2])
def test_official_matrices_that_cannot_be_used_where_they_lie(golden_dir, n_devices):
    """Where files' beginnings differ in length."""
    plans = plans_of(golden_dir, n_devices)
    assert mapped.as_stored(plans).moe.gate.stored
    source = plans.moe.gate.weight.sources[1]
    for more in (1, -64):
        span = dataclasses.replace(source.span, offset=source.span.offset + more)
        sources = list(plans.moe.gate.weight.sources)
        sources[1] = dataclasses.replace(source, span=span)
        weight = dataclasses.replace(plans.moe.gate.weight, sources=tuple(sources))
        matrix = jax.tree.unflatten(
            jax.tree.structure(plans.moe.gate), [weight, plans.moe.gate.scales]
        )
        assert mapped.as_stored(matrix) is matrix


@pytest.mark.parametrize("what", ["turned", "other dtype", "unaligned", "cut", "accelerator"])
def test_what_cannot_be_used_where_it_lies(converted, golden_dir, what, monkeypatch):
    plan = plans_of(golden_dir if what == "turned" else converted, 2 if what == "cut" else 1)
    plan = plan.moe.out.weight.layer(3)  # two devices share its last axis
    source = plan.sources[0]
    if what == "other dtype":
        plan = dataclasses.replace(plan, dtype=np.dtype(np.float32))
    if what == "unaligned":
        span = dataclasses.replace(source.span, offset=source.span.offset + 8)
        plan = dataclasses.replace(plan, sources=(dataclasses.replace(source, span=span),))
    if what == "accelerator":
        gpu = collections.namedtuple("Device", "platform")("gpu")
        monkeypatch.setattr(mapped, "_places", lambda plan: {gpu: (slice(None),) * len(plan.shape)})
    assert not mapped.can_be_mapped(plan)
    monkeypatch.undo()
    whole = jax.tree.leaves(reader_of(converted)._plans[3])
    assert all(map(mapped.can_be_mapped, whole))
