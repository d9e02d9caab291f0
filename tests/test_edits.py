"""Edits against a float64 forward pass with the same change written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_edits
from helpers import relative_error
from jax.sharding import PartitionSpec as P

import grokkit
from grokkit import (
    Add,
    Apply,
    Capture,
    ForbidExperts,
    ForceExperts,
    Replace,
    RequireExperts,
    RouterTemperature,
    Scale,
    SwapExperts,
)
from grokkit.edits import resolve
from grokkit.errors import SiteError
from grokkit.language_model import _forward

N = 9  # positions used of the golden tokens: enough for every selection below
STEER = np.random.default_rng(0).normal(size=64) * 20
PATTERN = np.tril(np.ones((N, N))) / np.arange(1, N + 1)[:, None]


@pytest.fixture(scope="module")
def tokens(golden_arrays):
    return golden_arrays["tokens"][:, :N]


def _set(value, index, new):
    value = value.copy()
    value[index] = new
    return value


def _forbid(probs_seen, forbidden):
    masked = probs_seen.copy()
    masked[..., forbidden] = -1
    return np.argsort(-masked, axis=-1, kind="stable")[..., :2]


def _require(chosen, required):
    """One token after the other."""
    found = chosen.copy()
    for place in np.ndindex(chosen.shape[:-1]):
        others = [e for e in chosen[place] if e not in required]
        found[place] = (required + others)[: chosen.shape[-1]]
    return found


def _by_hand(name):
    """`change(site, layer, value)` of the case called `name`."""
    probs = {}

    def change(site, layer, value):
        if site == "router_probs":
            probs[layer] = value
        for wanted, function in CASES[name][1].items():
            if wanted == site:
                return function(layer, value, probs)
        return value

    return change


def _renormalised(value):
    return value / value.sum(axis=-1, keepdims=True)


# Name -> the edits, and by site the same by hand: f(layer, value, router probabilities by layer).
CASES = {
    "zero a head": (
        [Scale("z", 0, layers=[1, -1], heads=[3])],
        {"z": lambda i, v, _: _set(v, np.s_[:, :, 3], 0) if i in (1, 11) else v},
    ),
    "steer some positions": (
        [Add("resid_mid", STEER, scale=0.5, layers=[4], positions=[2, -1])],
        {"resid_mid": lambda i, v, _: _set(v, np.s_[:, [2, N - 1]], v[:, [2, N - 1]] + STEER / 2)
         if i == 4 else v},
    ),
    "embedding of one row": (
        [Replace("embed", STEER, rows=[1], positions=slice(3, 5))],
        {"embed": lambda i, v, _: _set(v, np.s_[1, 3:5], STEER)},
    ),
    "a function of the queries": (
        [Apply("q", lambda q, gain: jnp.flip(q, -1) * gain, 1.5, layers=[0])],
        {"q": lambda i, v, _: v[..., ::-1] * 1.5 if i == 0 else v},
    ),
    "a given pattern": (
        [Replace("pattern", PATTERN, layers=[2, 3], heads=range(4, 8))],
        {"pattern": lambda i, v, _: _set(v, np.s_[:, 4:8], PATTERN) if i in (2, 3) else v},
    ),
    "sharper scores": (
        [Scale("attn_scores", 3.0, layers=[5])],
        {"attn_scores": lambda i, v, _: v * 3 if i == 5 else v},
    ),
    "keys and values": (
        [Scale("k", -1, layers=[6]), Add("v", 0.25, layers=[6], positions=[0])],
        {"k": lambda i, v, _: -v if i == 6 else v,
         "v": lambda i, v, _: _set(v, np.s_[:, 0], v[:, 0] + 0.25) if i == 6 else v},
    ),
    "outputs before and after the closing norms": (
        [Scale("attn_out", 0.5, layers=[1]), Scale("moe_out", 0, layers=[2]),
         Add("attn_out_pre_norm", STEER, layers=[3]), Add("moe_out_pre_norm", STEER, layers=[3])],
        {"attn_out": lambda i, v, _: v / 2 if i == 1 else v,
         "moe_out": lambda i, v, _: v * 0 if i == 2 else v,
         "attn_out_pre_norm": lambda i, v, _: v + STEER if i == 3 else v,
         "moe_out_pre_norm": lambda i, v, _: v + STEER if i == 3 else v},
    ),
    "the last stages": (
        [Scale("final_norm", 2.0, positions=[1]), Add("logits", np.arange(256.0))],
        {"final_norm": lambda i, v, _: _set(v, np.s_[:, 1], v[:, 1] * 2),
         "logits": lambda i, v, _: v + np.arange(256)},
    ),
    "one expert out of one layer": (
        [Replace("expert_outputs", 0.0, layers=[7], experts=[2, 5])],
        {"expert_outputs": lambda i, v, _: v},  # see test_ablating_an_expert
    ),
    "another choice by the logits": (
        [Add("router_logits", 100.0, experts=[6], layers=[0], positions=[4])],
        {"router_logits": lambda i, v, _: _set(v, np.s_[:, 4, 6], v[:, 4, 6] + 100)
         if i == 0 else v},
    ),
    "force a pair": (
        [ForceExperts([7, 1], layers=[2], positions=[3])],
        {"expert_indices": lambda i, v, _: _set(v, np.s_[:, 3], [7, 1]) if i == 2 else v},
    ),
    "force a pair, renormalised": (
        [ForceExperts([7, 1], gates="renormalise", layers=[2])],
        {"expert_indices": lambda i, v, _: np.broadcast_to([7, 1], v.shape) if i == 2 else v,
         "expert_weights": lambda i, v, _: _renormalised(v) if i == 2 else v},
    ),
    "force a pair with given gates": (
        [ForceExperts([0, 4], gates=[0.9, 0.3], layers=[8])],
        {"expert_indices": lambda i, v, _: np.broadcast_to([0, 4], v.shape) if i == 8 else v,
         "expert_weights": lambda i, v, _: np.broadcast_to([0.9, 0.3], v.shape) if i == 8 else v},
    ),
    "forbid experts": (
        [ForbidExperts([0, 3, 4])],
        {"expert_indices": lambda i, v, probs: _forbid(probs[i], [0, 3, 4])},
    ),
    "forbid experts, renormalised": (
        [ForbidExperts(3, gates="renormalise")],
        {"expert_indices": lambda i, v, probs: _forbid(probs[i], [3]),
         "expert_weights": lambda i, v, _: _renormalised(v)},
    ),
    "require one": (
        [RequireExperts(6, layers=[3, 8])],  # with which no choice of experts is a near tie
        {"expert_indices": lambda i, v, _: _require(v, [6]) if i in (3, 8) else v},
    ),
    "require one of those that are not forbidden": (
        [ForbidExperts([0, 3, 4]), RequireExperts([5], gates="renormalise")],
        {"expert_indices": lambda i, v, probs: _require(_forbid(probs[i], [0, 3, 4]), [5]),
         "expert_weights": lambda i, v, _: _renormalised(v)},
    ),
    "require a pair": (
        [RequireExperts([7, 1], layers=[2], positions=[3])],
        {"expert_indices": lambda i, v, _: _set(v, np.s_[:, 3], [7, 1]) if i == 2 else v},
    ),
    "swap two": (
        [SwapExperts(2, 6)],
        {"expert_indices": lambda i, v, _: np.array([0, 1, 6, 3, 4, 5, 2, 7])[v]},
    ),
    "temperature": (
        [RouterTemperature(3.0, layers=[0, 5])],
        {"router_logits": lambda i, v, _: v / 3 if i in (0, 5) else v},
    ),
    "temperature, renormalised": (
        [RouterTemperature(0.5, gates="renormalise")],
        {"router_logits": lambda i, v, _: v * 2,
         "expert_weights": lambda i, v, _: _renormalised(v)},
    ),
    "in order": (
        [Scale("resid_pre", 2.0, layers=[3]), Add("resid_pre", STEER, layers=[3]),
         Scale("resid_pre", 0.5, layers=[3])],
        {"resid_pre": lambda i, v, _: (v * 2 + STEER) / 2 if i == 3 else v},
    ),
}  # fmt: skip
BY_HAND = [name for name in CASES if name != "one expert out of one layer"]


def _expected(golden_weights, config, tokens, name):
    return reference_edits.forward(golden_weights, config, tokens, _by_hand(name))[0]


@pytest.mark.parametrize("name", BY_HAND)
def test_edit_equals_the_change_by_hand(name, lm8, golden_weights, tokens):
    expected = _expected(golden_weights, lm8.config, tokens, name)
    found = lm8(tokens, edits=CASES[name][0]).logits
    assert relative_error(found, expected) < 1e-5
    clean = reference_edits.forward(golden_weights, lm8.config, tokens, lambda s, i, v: v)[0]
    assert relative_error(clean, expected) > 1e-3  # the case does change something


@pytest.mark.parametrize("name", ["a given pattern", "force a pair, renormalised"])
def test_edits_on_one_device(name, lm1, golden_weights, tokens):
    expected = _expected(golden_weights, lm1.config, tokens, name)
    assert relative_error(lm1(tokens, edits=CASES[name][0]).logits, expected) < 1e-5


def test_ablating_an_expert(lm8, golden_weights, tokens):
    chosen = {}

    def change(site, layer, value):
        if site == "expert_indices":
            chosen[layer] = value
        if site == "expert_outputs" and layer == 7:
            return np.where(np.isin(chosen[7], [2, 5])[..., None], 0, value)
        return value

    expected = reference_edits.forward(golden_weights, lm8.config, tokens, change)[0]
    found = lm8(tokens, edits=CASES["one expert out of one layer"][0]).logits
    assert relative_error(found, expected) < 1e-5
    assert relative_error(lm8(tokens).logits, expected) > 1e-3


def test_patching_from_a_cache(lm8, golden_weights, tokens):
    corrupted = tokens[:, ::-1]
    _, cache = lm8.run_with_cache(tokens, "resid_post")
    clean = reference_edits.forward(golden_weights, lm8.config, tokens, lambda s, i, v: v)[1]
    edits = [Replace("resid_post", cache["resid_post"], layers=[5], positions=[2, 3])]

    def change(site, layer, value):
        if site == "resid_post" and layer == 5:
            return _set(value, np.s_[:, 2:4], clean["resid_post"][5][:, 2:4])
        return value

    expected = reference_edits.forward(golden_weights, lm8.config, corrupted, change)[0]
    assert relative_error(lm8(corrupted, edits=edits).logits, expected) < 1e-5


def test_no_op_edits_change_nothing(lm8, tokens):
    plain, cache = lm8.run_with_cache(tokens)
    sites = ("resid_post", "pattern", "attn_scores", "z", "router_logits", "expert_outputs")
    edits = [Replace(site, cache[site]) for site in sites]
    edits += [Scale("q", 1.0), Add("embed", 0.0), ForceExperts(cache["expert_indices"])]
    found, after = lm8.run_with_cache(tokens, "expert_indices", edits=edits)
    assert relative_error(found, plain) < 1e-6
    np.testing.assert_array_equal(after["expert_indices"], cache["expert_indices"])


def test_captures_see_what_edits_left(lm8, tokens):
    _, cache = lm8.run_with_cache(tokens, "z", edits=[Scale("z", 0, heads=[3], layers=[2])])
    z = np.asarray(cache["z"])
    assert (z[2, :, :, 3] == 0).all()
    assert (z[1, :, :, 3] != 0).all()


def test_each_row_its_own_selection(lm8, tokens):
    rows = np.repeat(tokens[:1], 3, axis=0)
    layers = np.zeros((3, 12), bool)
    positions = np.zeros((3, N), bool)
    cases = [(2, 1), (4, 5), (11, N - 1)]
    for row, (layer, position) in enumerate(cases):
        layers[row, layer] = positions[row, position] = True
    together = lm8(rows, edits=[Add("resid_pre", STEER, layers=layers, positions=positions)])
    pairs = np.array([[[0, 1]], [[2, 3]], [[4, 5]]])
    forced = lm8(rows, edits=[ForceExperts(pairs, layers=layers)])
    for row, (layer, position) in enumerate(cases):
        alone = lm8(
            rows, edits=[Add("resid_pre", STEER, layers=[layer], positions=[position])]
        ).logits[row]
        assert relative_error(together.logits[row], alone) < 1e-5
        alone = lm8(rows, edits=[ForceExperts(pairs[row, 0], layers=[layer])]).logits[row]
        assert relative_error(forced.logits[row], alone) < 1e-5


def test_new_values_compile_nothing(lm8, tokens):
    def run(seed, layer, position, experts, temperature):
        vector = np.random.default_rng(seed).normal(size=64)
        lm8(tokens, edits=[
            Add("resid_post", vector, scale=float(seed), layers=[layer], positions=[position]),
            ForceExperts(experts, layers=[layer]),
            RouterTemperature(temperature),
        ])  # fmt: skip

    run(1, 2, 3, [0, 1], 2.0)
    compiled = _forward._cache_size()
    run(2, 7, -1, [5, 3], 0.5)
    run(3, 0, 0, [6, 7], 1.0)
    assert _forward._cache_size() == compiled


def test_gradient_of_an_added_vector(lm8, tokens):
    """The derivative that attribution patching uses, against a difference quotient."""
    ids, lengths = lm8.prepare(tokens)

    def logit(vector):
        edit = resolve([Add("resid_mid", vector, layers=[3])], lm8.config, lengths)
        out = lm8.model(jnp.asarray(ids), lengths=jnp.asarray(lengths), edits=edit)
        return jax.reshard(out.logits, P())[0, -1].sum()

    step = jnp.asarray(STEER, jnp.float32) / np.linalg.norm(STEER)
    with jax.set_mesh(lm8.mesh):
        value = jax.jit(logit)
        gradient = jax.jit(jax.grad(logit))(jnp.zeros(64))
        quotient = (value(step * 0.01) - value(step * -0.01)) / 0.02
    np.testing.assert_allclose(gradient @ step, quotient, rtol=0.02)


EDITS = [
    Add("resid_post", np.linspace(-2, 2, 32), layers=[0]),
    ForbidExperts([1, 2]),
    Scale("z", 0.3, heads=[5]),
]
PROMPTS = ["The quick brown fox", "Two and"]


def test_generate_with_edits_equals_full_forward_passes(tiny_lm):
    texts = tiny_lm.generate(PROMPTS, max_len=6, temperature=0.0, edits=EDITS)
    seen, drawn = [], []
    for prompt, text in zip(PROMPTS, texts, strict=True):
        pieces = list(tiny_lm.stream(prompt, max_len=6, temperature=0.0, edits=EDITS))
        assert "".join(map(str, pieces)) == text
        ids = tiny_lm.tokenizer.encode(prompt)
        for piece in pieces:
            seen.append(list(ids))
            drawn.append(piece.id)
            ids.append(piece.id)
    # Each row one pass over all that came before one token; in one batch, which compiles once.
    rows = np.zeros((len(seen), max(map(len, seen))), int)  # filled up with pads
    for row, ids in enumerate(seen):
        rows[row, : len(ids)] = ids
    logits = np.asarray(tiny_lm(rows, edits=EDITS).logits)
    assert len(drawn) >= 2 * len(PROMPTS)
    assert [logits[row, len(ids) - 1].argmax() for row, ids in enumerate(seen)] == drawn


def test_generation_captures_equal_the_full_forward(tiny_lm):
    texts, cache = tiny_lm.generate_with_cache(PROMPTS, max_len=5, temperature=0.0, edits=EDITS)
    assert len(texts) == 2
    assert set(cache) == set(grokkit.SITES)
    for row, prompt in enumerate(PROMPTS):
        pieces = list(tiny_lm.stream(prompt, max_len=5, temperature=0.0, edits=EDITS))
        ids = tiny_lm.tokenizer.encode(prompt) + [p.id for p in pieces][:-1]
        _, full = tiny_lm.run_with_cache(np.array([ids]), edits=EDITS)
        for name, entry in full.entries.items():
            batch = entry.axes.index("batch")
            expected = np.take(np.asarray(entry.value), 0, batch)
            found = np.take(np.asarray(cache[name]), row, batch)
            found = found[tuple(slice(0, n) for n in expected.shape)]
            if name == "expert_indices":
                np.testing.assert_array_equal(found, expected)
            else:
                assert relative_error(found, expected) < 1e-5, name


def test_generation_captures_take_all_positions(tiny_lm):
    with pytest.raises(SiteError, match="captures take every position"):
        tiny_lm.generate_with_cache("Two", Capture("resid_post", positions=-1), max_len=2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Replace("residual", 0), r"no activation site 'residual'; the sites are embed"),
        (lambda: Scale("z", 0, heads=[16]), r"heads: there is no 16; there are 16, 0 to 15"),
        (lambda: Scale("z", 0, layers=[12]), r"layers: there is no 12; there are 12"),
        (lambda: Scale("embed", 0, layers=[0]), r"not in a layer"),
        (lambda: Scale("resid_post", 0, heads=[1]), r"axes are batch, position, d_model"),
        (lambda: Scale("z", 0, experts=[1]), r"`experts` does not apply"),
        (lambda: Scale("z", 0, rows=[2]), r"rows: there is no 2; there are 2"),
        (lambda: Scale("z", 0, positions=[]), r"selection is empty"),
        (lambda: Scale("z", 0, layers=np.ones(3, bool)), r"shape \(12,\) or \(2, 12\)"),
        (lambda: Add("resid_post", np.ones(7)), r"shape \(7,\) does not fit"),
        (lambda: Add("resid_post", np.ones((5, 2, N, 64))), r"with 12 layers in front"),
        (lambda: ForceExperts([1, 1]), r"2 different experts"),
        (lambda: ForceExperts([1]), r"2 different experts"),
        (lambda: ForceExperts([1, 8]), r"experts go from 0 to 7"),
        (lambda: ForbidExperts(range(7)), r"each token needs 2"),
        (lambda: RequireExperts([1, 2, 3]), r"at most 2 different experts"),
        (lambda: RequireExperts([1, 1]), r"at most 2 different experts"),
        (lambda: RequireExperts(8), r"experts go from 0 to 7"),
        (lambda: SwapExperts(0, 9), r"experts go from 0 to 7"),
        (lambda: ForceExperts([0, 1], gates="sum"), r"'keep', 'renormalise' or an array"),
        (lambda: ForceExperts([0, 1], gates=np.ones(3)), r"does not fit"),
        (lambda: RouterTemperature(0.0), r"more than 0"),
        (lambda: Apply("q", lambda q: q[:, :1]), r"returned shape"),
    ],
)
def test_errors_name_what_exists(make, message, lm8, tokens):
    with pytest.raises(SiteError, match=message):
        lm8(tokens, edits=[make()])
