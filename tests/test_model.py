"""The whole forward pass against its definition: every site, any mesh, any split into steps."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import float64, forward, random_model, reference_weights, relative_error
from jax.sharding import PartitionSpec as P

import grokkit
from grokkit import generate
from grokkit.errors import ConfigError
from grokkit.kv_cache import KVCache
from grokkit.layers.block import run_layer
from grokkit.layers.ends import enter, leave
from grokkit.model import Grok, check_mesh, initialise, param_specs, place
from grokkit.quant import QuantizedArray
from grokkit.sampling import Rows
from grokkit.sharding import abstract, is_spec
from grokkit.taps import Capture

ROUNDING = 1e-5
"""Relative L2 error allowed to float32; it is about 1e-6."""


# Every site


@pytest.mark.parametrize("out", ["out1", "out8"])
@pytest.mark.parametrize("site", grokkit.SITES)
def test_site_is_what_the_definition_says(site, out, golden_reference, request):
    found = request.getfixturevalue(out).captured[site]
    if site == "expert_indices":
        np.testing.assert_array_equal(found, golden_reference[site])
    else:
        assert relative_error(found, golden_reference[site]) < ROUNDING


@pytest.mark.parametrize("site", grokkit.SITES.values(), ids=lambda s: s.name)
def test_site_has_the_axes_that_it_declares(site, out8, lm8, golden_arrays):
    config = lm8.config
    batch, n = golden_arrays["tokens"].shape
    sizes = {
        "layer": config.n_layers,
        "batch": batch,
        "position": n,
        "query": n,
        "key": n,
        "head": config.n_heads,
        "kv_head": config.n_kv_heads,
        "d_head": config.d_head,
        "d_model": config.d_model,
        "expert": config.n_experts,
        "choice": config.n_experts_per_token,
        "vocab": config.vocab_size,
    }
    axes = ("layer", *site.axes) if site.in_layer else site.axes
    assert out8.captured[site.name].shape == tuple(sizes[axis] for axis in axes)


def test_reference_reaches_every_site_and_no_other(golden_reference):
    assert set(golden_reference) == set(grokkit.SITES)


# Any mesh


@pytest.mark.parametrize("mesh", [(1, 2), (1, 4), (2, 4)], ids=str)
def test_logits_do_not_depend_on_the_mesh(mesh, golden_dir, golden_arrays, out1):
    mesh = grokkit.make_mesh(*mesh)
    lm = grokkit.load(golden_dir, mesh=mesh, dtype="float32", progress=False)
    found = lm(golden_arrays["tokens"]).logits
    assert len(found.sharding.device_set) == mesh.size
    assert relative_error(found, np.asarray(out1.logits, np.float64)) < ROUNDING


def test_logits_on_eight_devices_are_those_on_one(out1, out8):
    assert len(out8.logits.sharding.device_set) == 8
    assert relative_error(out8.logits, out1.logits) < ROUNDING


def test_capturing_leaves_the_logits_unchanged(lm8, golden_arrays, out8):
    plain = lm8(golden_arrays["tokens"])
    assert plain.captured == {} and plain.cache is None
    assert relative_error(plain.logits, out8.logits) < 1e-6


# Other sizes and constants than Grok-1's


@pytest.fixture(scope="module")
def odd_config() -> grokkit.GrokConfig:
    """Nothing as in Grok-1: three queries a key/value head, three of five experts, a vocabulary
    that four devices cannot share, other constants."""
    return grokkit.GrokConfig(
        vocab_size=37,
        d_model=40,
        n_layers=3,
        n_heads=12,
        n_kv_heads=4,
        d_head=6,
        d_ff=24,
        n_experts=5,
        n_experts_per_token=3,
        context_length=32,
        embedding_multiplier=5.0,
        output_multiplier=0.3,
        attention_multiplier=1.5,
        attention_softcap=2.0,
        rope_base=50.0,
        norm_eps=0.1,
        pad_token=3,
    )


@pytest.fixture(scope="module")
def odd_model(odd_config) -> Grok:
    return random_model(odd_config, 1, grokkit.make_mesh(1, 4))


@pytest.fixture(scope="module")
def odd_tokens(odd_config):
    tokens = np.random.default_rng(2).integers(4, odd_config.vocab_size, (3, 9))
    tokens[0, 4] = tokens[2, 0] = odd_config.pad_token
    return tokens


ODD_SITES = ("attn_scores", "pattern", "expert_outputs", "resid_post", "logits")


def run_odd(model, tokens, lengths):
    mesh = grokkit.make_mesh(1, 4)
    return forward(model, mesh, tokens, ODD_SITES, lengths=np.array(lengths, np.int32))


@pytest.fixture(scope="module")
def odd_expected(odd_model, odd_config, odd_tokens):
    return reference.forward(reference_weights(odd_model), odd_config, odd_tokens)


@pytest.fixture(scope="module")
def odd_out(odd_model, odd_tokens):
    return run_odd(odd_model, odd_tokens, [9, 9, 9])


@pytest.mark.parametrize("site", ODD_SITES)
def test_every_number_of_the_configuration_is_used(site, odd_out, odd_expected):
    assert relative_error(odd_out.captured[site], odd_expected[site]) < ROUNDING


def test_the_soft_cap_matters_here(odd_expected):
    scores = odd_expected["attn_scores"]
    assert 1.5 < np.abs(scores[np.isfinite(scores)]).max() < 2


def test_logits_that_do_not_divide_over_the_devices_are_whole_on_each(odd_out):
    assert odd_out.logits.shape[-1] % 4
    assert odd_out.logits.sharding.is_fully_replicated


def test_weights_that_are_not_quantised_do_as_well(odd_model, odd_tokens, odd_expected):
    def float_matrix(w):
        if not isinstance(w, QuantizedArray):
            return w
        *lead, n_axis, k_axis = w.weight.sharding.spec
        layout = jax.NamedSharding(w.weight.sharding.mesh, jax.P(*lead, k_axis, n_axis))
        return jax.device_put(float64(w).astype(np.float32), layout)

    model = jax.tree.map(float_matrix, odd_model, is_leaf=lambda w: isinstance(w, QuantizedArray))
    assert {a.dtype for a in jax.tree.leaves(model)} == {jnp.dtype(jnp.float32)}
    out = run_odd(model, odd_tokens, [9, 9, 9])
    assert relative_error(out.logits, odd_expected["logits"]) < ROUNDING


def test_pads_inside_a_text_are_hidden_from_every_query(odd_out):
    pattern = np.asarray(odd_out.captured["pattern"])
    assert (pattern[:, 0, :, :, 4] == 0).all()
    assert (pattern[:, 2, :, :, 0] == 0).all()
    # The pad's own query still sees what came before it; one with nothing before it sees nothing.
    totals = pattern.sum(axis=-1)
    np.testing.assert_allclose(totals[:, :2], 1, rtol=1e-5)
    np.testing.assert_allclose(totals[:, 2, :, 1:], 1, rtol=1e-5)
    assert (totals[:, 2, :, 0] == 0).all()


def test_lengths_hide_what_lies_beyond(odd_model, odd_tokens, odd_config):
    lengths = [9, 5, 7]
    expected = reference.forward(reference_weights(odd_model), odd_config, odd_tokens, lengths)
    out = run_odd(odd_model, odd_tokens, lengths)
    assert relative_error(out.captured["pattern"], expected["pattern"]) < ROUNDING
    assert relative_error(out.logits, expected["logits"]) < ROUNDING


# Layer by layer


@pytest.mark.parametrize(
    "start, stop, backwards", [(0, None, False), (3, 7, True), (12, 12, False)]
)
def test_layers_are_given_one_by_one(lm8, start, stop, backwards):
    blocks = lm8.model.blocks
    numbers = list(range(12))[start:stop]
    with jax.set_mesh(lm8.mesh):
        found = list(lm8.model.layers(start, stop, backwards))
        assert len(found) == len(numbers)
        for i, block in zip(numbers[::-1] if backwards else numbers, found, strict=True):
            np.testing.assert_array_equal(block.moe.router, blocks.moe.router[i])
            np.testing.assert_array_equal(block.moe.gate.read().weight, blocks.moe.gate.weight[i])
            part = lm8.model.part(i, lambda b: (b.attn_norm, b.attention.out))
            expected = jax.tree.map(lambda a, i=i: a[i], (blocks.attn_norm, blocks.attention.out))
            jax.tree.map(np.testing.assert_array_equal, part, expected)


def test_layers_run_one_by_one_give_the_pass(lm8, golden_arrays):
    model, tokens = lm8.model, jnp.asarray(golden_arrays["tokens"])
    with jax.set_mesh(lm8.mesh):
        x, rows, _ = enter(model.ends, tokens, None, None, (), ())
        for i, block in enumerate(model.layers()):
            x = run_layer(block, x, rows, None, jnp.int32(i), model.dtype)[0]
        logits, _ = leave(model.ends, x, rows, False, (), ())
    assert relative_error(logits, lm8(tokens).logits) < 1e-6


# In steps


def serve(lm, mesh, tokens, steps, dtype=jnp.float32):
    """Feed each row its own number of tokens at each step, padded on the right to the most of
    them; the logits found, in the order of the tokens."""
    rows, n = tokens.shape
    cache = KVCache.empty(lm.config, rows, n + 5, jnp.dtype(dtype), mesh)
    model = place(lm.model, mesh)
    done = np.zeros(rows, int)
    found = np.full((rows, n, lm.config.vocab_size), np.nan)
    for step in steps:
        fed = np.full((rows, max(step)), 7, np.int32)
        for row, count in enumerate(step):
            fed[row, :count] = tokens[row, done[row] : done[row] + count]
        lengths = np.array(step, np.int32)
        out = forward(model, mesh, fed, cache=cache, lengths=lengths)
        cache, logits = out.cache, np.asarray(out.logits)
        for row, count in enumerate(step):
            found[row, done[row] : done[row] + count] = logits[row, :count]
        done += step
        np.testing.assert_array_equal(cache.length, done)
    return found, done


@pytest.fixture(scope="module")
def padded(golden_arrays):
    """The golden tokens with pads among them: in the prompts, and among the tokens after them."""
    tokens = golden_arrays["tokens"].copy()
    tokens[0, [3, 16]] = tokens[1, [0, 9]] = 0
    return tokens


@pytest.fixture(scope="module")
def padded_logits(padded, golden_weights, lm8):
    return reference.forward(golden_weights, lm8.config, padded)["logits"]


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param([(11, 6)] + [(1, 1)] * 8, id="prefill and decode"),
        pytest.param([(8, 5), (2, 8), (1, 1), (1, 1)], id="chunked prefill"),
    ],
)
def test_cached_steps_equal_the_full_forward_pass_at_every_position(
    steps, lm8, padded, padded_logits
):
    found, done = serve(lm8, grokkit.make_mesh(2, 4), padded, steps)
    assert len(set(done)) == 2, "the rows should end at different places"
    for row, n in enumerate(done):
        for position in range(n):
            error = relative_error(found[row, position], padded_logits[row, position])
            assert error < ROUNDING, (row, position)


def test_keys_are_read_block_by_block_up_to_the_last_that_is_seen(
    lm8, padded, padded_logits, monkeypatch
):
    monkeypatch.setattr("grokkit.layers.attention.KEY_BLOCK", 5)
    tokens, lengths = padded[:, :7], np.array([7, 4], np.int32)
    cache = KVCache.empty(lm8.config, 2, 23, jnp.dtype(jnp.float32), lm8.mesh)
    values = np.array(cache.values)
    values[..., 10:, :] = np.nan
    values = jax.device_put(values, cache.values.sharding)
    cache = dataclasses.replace(cache, is_new=False, values=values)
    out = forward(lm8.model, lm8.mesh, tokens, cache=cache, lengths=lengths)
    for row, n in enumerate(lengths):
        assert relative_error(np.asarray(out.logits)[row, :n], padded_logits[row, :n]) < ROUNDING


def test_a_new_cache_gives_what_reading_its_empty_slots_too_gives(lm8, golden_arrays):
    new = KVCache.empty(lm8.config, 2, 24, jnp.dtype(jnp.bfloat16), lm8.mesh)
    assert new.is_new
    tokens = golden_arrays["tokens"]
    lengths = np.array([tokens.shape[1], 5], np.int32)
    old = dataclasses.replace(new, is_new=False)
    found, expected = (
        forward(lm8.model, lm8.mesh, tokens, cache=cache, lengths=lengths) for cache in (new, old)
    )
    for row, n in enumerate(lengths):
        logits = (np.asarray(out.logits)[row, :n] for out in (found, expected))
        assert relative_error(*logits) < ROUNDING
    assert not found.cache.is_new
    assert jax.tree.structure(found.cache) == jax.tree.structure(expected.cache)
    pattern = forward(lm8.model, lm8.mesh, tokens, cache=new, captures=("pattern",))
    assert pattern.captured["pattern"].shape[-1] == new.capacity


def test_bfloat16_cache_holds_the_rounded_keys_and_values(lm8, golden_arrays, out8):
    cache = KVCache.empty(lm8.config, 2, 24, jnp.dtype(jnp.bfloat16), lm8.mesh)
    out = forward(lm8.model, lm8.mesh, golden_arrays["tokens"], cache=cache)
    # Values are cached as they are; those of layer 0 do not depend on what was cached.
    values = np.asarray(out.cache.values).view(jnp.bfloat16).astype(np.float32)
    assert (values[:, :, :, 19:] == 0).all()
    exact = np.asarray(out8.captured["v"])[0].swapaxes(1, 2)
    np.testing.assert_allclose(values[0, :, :, :19], exact, rtol=2**-8, atol=1e-6)
    # The official code, all in bfloat16, is 3 to 6 % off.
    assert 1e-4 < relative_error(out.logits, golden_arrays["exact_logits"]) < 0.1


# Gradients


def test_gradient_is_the_slope_of_the_definition(lm8, golden_arrays, golden_weights):
    """Along a random direction in embedding space, by central differences in float64."""
    tokens = golden_arrays["tokens"][:, :7]
    name = "language_model/in_out_embed/embeddings"
    direction = np.random.default_rng(0).normal(size=golden_weights[name].shape)
    direction /= np.linalg.norm(direction)

    def exact(step):
        weights = golden_weights | {name: golden_weights[name] + step * direction}
        return reference.forward(weights, lm8.config, tokens)["logits"][1, -1, 5]

    step = 1e-5
    slope = (exact(step) - exact(-step)) / (2 * step)

    @jax.jit
    def gradient(model, tokens):
        def logit(embedding):
            changed = dataclasses.replace(
                model, embedding=dataclasses.replace(model.embedding, weight=embedding)
            )
            return jax.reshard(changed(tokens).logits, P())[1, -1, 5]

        return jax.grad(logit)(model.embedding.weight)

    with jax.set_mesh(lm8.mesh):
        found = gradient(lm8.model, jnp.asarray(tokens))
    assert found.shape == direction.shape and np.isfinite(found).all()
    assert abs(slope) > 0.01
    assert np.sum(np.asarray(found, np.float64) * direction) == pytest.approx(slope, rel=1e-3)


# The full size, without its weights


OFFICIAL = {
    # Per layer: leaf, shape, official PartitionSpec.
    "attention.query.weight": ((6144, 6144), ("data", "model")),
    "attention.query.scales": ((1, 6144), (None, "model")),
    "attention.key.weight": ((6144, 1024), ("data", "model")),
    "attention.key.scales": ((1, 1024), (None, "model")),
    "attention.value.weight": ((6144, 1024), ("data", "model")),
    "attention.value.scales": ((1, 1024), (None, "model")),
    "attention.out.weight": ((6144, 6144), ("model", "data")),
    "attention.out.scales": ((8, 6144), ("model", "data")),
    "moe.router": ((6144, 8), ("data",)),
    "moe.gate.weight": ((8, 6144, 32768), (None, "data", "model")),
    "moe.gate.scales": ((8, 1, 32768), (None, None, "model")),
    "moe.value.weight": ((8, 6144, 32768), (None, "data", "model")),
    "moe.value.scales": ((8, 1, 32768), (None, None, "model")),
    "moe.out.weight": ((8, 32768, 6144), (None, "model", "data")),
    "moe.out.scales": ((8, 8, 6144), (None, "model", "data")),
    "attn_norm.scale": ((6144,), ()),
    "attn_out_norm.scale": ((6144,), ()),
    "moe_norm.scale": ((6144,), ()),
    "moe_out_norm.scale": ((6144,), ()),
}
OFFICIAL_DTYPES = {"weight": jnp.int8, "scales": jnp.bfloat16}


def named_leaves(tree):
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_spec)
    return {jax.tree_util.keystr(p, simple=True, separator="."): leaf for p, leaf in leaves}


@pytest.fixture(scope="module")
def grok_1():
    """Grok-1's arrays on the 8-device mesh, without data."""
    return abstract(param_specs(grokkit.GROK_1), grokkit.make_mesh(1, 8))


def test_grok_1_has_the_official_arrays_in_the_official_layout(grok_1):
    leaves = named_leaves(grok_1)
    embedding, final_norm = leaves.pop("embedding.weight"), leaves.pop("final_norm.scale")
    assert (embedding.shape, embedding.dtype) == ((131072, 6144), jnp.float32)
    assert embedding.sharding.shard_shape(embedding.shape) == (131072, 6144 // 8)
    assert final_norm.shape == (6144,) and final_norm.sharding.is_fully_replicated
    assert set(leaves) == {f"blocks.{name}" for name in OFFICIAL}
    for name, (shape, spec) in OFFICIAL.items():
        leaf = leaves[f"blocks.{name}"]
        if name.endswith(".weight"):  # held turned round: output axis first
            *lead, k, n = shape
            shape = (*lead, n, k)
            spec = (*spec[:-2], spec[-1], spec[-2])
        assert leaf.shape == (64, *shape), name
        assert leaf.dtype == OFFICIAL_DTYPES.get(name.split(".")[-1], jnp.float32), name
        parts = [8 if axis == "model" else 1 for axis in spec] + [1] * (len(shape) - len(spec))
        share = (64, *(size // n for size, n in zip(shape, parts, strict=True)))
        assert leaf.sharding.shard_shape(leaf.shape) == share, name


def test_grok_1_takes_the_official_bytes():
    total = sum(spec.nbytes for spec in named_leaves(param_specs(grokkit.GROK_1)).values())
    headers = 318_239_886_140 - total
    # 770 pickles of one or two arrays, each with a few hundred bytes around the numbers.
    assert 770 * 100 < headers < 770 * 400


def test_grok_1_runs_in_the_abstract(grok_1):
    mesh = grokkit.make_mesh(1, 8)
    tokens = jax.ShapeDtypeStruct((1, 512), jnp.int32)
    with jax.set_mesh(mesh):
        out = jax.eval_shape(
            lambda model, tokens: model(tokens, captures=(Capture("router_probs"),)), grok_1, tokens
        )
    assert (out.logits.shape, out.logits.dtype) == ((1, 512, 131072), jnp.float32)
    assert out.logits.sharding.spec == P("data", None, "model")
    assert out.captured["router_probs"].shape == (64, 1, 512, 8)


def test_grok_1_decodes_over_a_full_cache_in_the_abstract(grok_1):
    mesh = grokkit.make_mesh(1, 8)
    cache = abstract(KVCache.specs(grokkit.GROK_1, 1, 8192, jnp.dtype(jnp.bfloat16)), mesh)
    kv_bytes = sum(math.prod(a.shape) * a.dtype.itemsize for a in (cache.keys, cache.values))
    assert kv_bytes == 2 * 2**30 == 8192 * 256 * 2**10
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    with jax.set_mesh(mesh):
        out = jax.eval_shape(lambda m, t, c: m(t, cache=c), grok_1, token, cache)
    assert out.logits.shape == (1, 1, 131072)
    assert out.cache.keys.sharding.spec == P(None, "data", "model", None, None)
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), out.cache, cache)
    assert jax.tree.all(same)


def test_grok_1_takes_long_prompts_in_little_memory(grok_1):
    """The part of 8,192 tokens that is run at once, over a cache of all of them."""
    mesh, rows = grokkit.make_mesh(1, 8), P("data")
    cache = abstract(KVCache.specs(grokkit.GROK_1, 1, 8192, jnp.dtype(jnp.bfloat16)), mesh)

    def of(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, rows))

    settings = Rows(of(jnp.float32, 1), of(jnp.float32, 1), of(jnp.uint32, 1))
    tokens, lengths = of(jnp.int32, 1, generate.PREFILL_PART), of(jnp.int32, 1)
    with jax.set_mesh(mesh):
        program = generate.prefill.lower(grok_1, tokens, lengths, cache, settings, (), ())
        memory = program.compile().memory_analysis()
    weights_and_cache = sum(
        math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
        for a in jax.tree.leaves((grok_1, cache))
    )
    assert memory.argument_size_in_bytes == pytest.approx(weights_and_cache, rel=1e-3)
    assert 0 < memory.temp_size_in_bytes < 2e9


# Making and placing


def test_initialise_draws_weights_of_the_declared_size(tiny_config):
    make = jax.jit(functools.partial(initialise, tiny_config))
    model, again, other = (make(jax.random.key(seed)) for seed in (3, 3, 4))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), model, again))
    assert not (model.embedding.weight == other.embedding.weight).all()
    assert (np.asarray(model.blocks.attn_norm.scale) == 1).all()
    for w, fan_in in [
        (model.blocks.attention.query, tiny_config.d_model),
        (model.blocks.moe.out, tiny_config.d_ff),
        (model.embedding.weight, tiny_config.d_model),
    ]:
        assert np.std(float64(w)) == pytest.approx(fan_in**-0.5, rel=0.05)


def test_place_keeps_the_values_and_lays_them_out_as_declared(odd_config):
    model = random_model(odd_config, 1)
    mesh = grokkit.make_mesh(1, 4)
    placed = place(model, mesh)
    specs = named_leaves(param_specs(odd_config))
    before, after = named_leaves(model), named_leaves(placed)
    assert set(specs) == set(after)
    for name, spec in specs.items():
        assert (after[name].shape, after[name].dtype) == (spec.shape, spec.dtype), name
        assert after[name].sharding == spec.sharding(mesh), name
        np.testing.assert_array_equal(after[name], before[name])


def test_model_is_a_pytree_of_arrays_with_its_configuration_beside(lm8):
    leaves = jax.tree.leaves(lm8.model)
    assert len(leaves) == 2 + 4 + 1 + 2 * 7
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    doubled = jax.tree.map(lambda a: a, lm8.model)
    assert doubled.config == lm8.config and doubled.dtype == jnp.float32


def test_heads_that_do_not_divide_over_the_mesh_are_refused(odd_config):
    with pytest.raises(ConfigError, match=r"4 key/value heads do not divide .* 8 'model' devices"):
        check_mesh(odd_config, grokkit.make_mesh(1, 8))


def test_sizes_that_do_not_divide_over_the_mesh_are_refused(odd_config):
    config = dataclasses.replace(odd_config, d_ff=30)
    with pytest.raises(ConfigError, match=r"axis 'd_ff' of size 30 .* 4 'model' devices"):
        check_mesh(config, grokkit.make_mesh(1, 4))


def test_mesh_with_other_axes_is_refused(odd_config):
    mesh = jax.make_mesh((1,), ("tensor",), devices=jax.devices()[:1])
    with pytest.raises(
        ConfigError, match=r"axes 'data' and 'model', found \('tensor',\).*make_mesh"
    ):
        check_mesh(odd_config, mesh)
