"""Patching sweeps against a float64 forward pass patched by hand, case by case."""

import inspect

import equinox as eqx
import numpy as np
import pytest
import reference_edits
from helpers import random_model

import grokkit
from grokkit.analysis.patching import (
    Experts,
    Heads,
    LogitDifference,
    Positions,
    attribution_patch,
    patch,
)
from grokkit.errors import PromptError, SiteError
from grokkit.model import place

N = 7
RIGHT, WRONG = 17, 90
METRIC = LogitDifference(RIGHT, WRONG)


@pytest.fixture(scope="module")
def prompts(golden_arrays):
    return golden_arrays["tokens"][0, :N], golden_arrays["tokens"][1, :N]


@pytest.fixture(scope="module")
def reference_runs(golden_weights, lm8, prompts):
    """Every activation of both runs, batch axis dropped."""
    runs = []
    for tokens in prompts:
        _, seen = reference_edits.forward(
            golden_weights, lm8.config, tokens[None], lambda site, layer, value: value
        )
        runs.append({name: np.stack(values)[:, 0] for name, values in seen.items()})
    return runs


def share(run, layer, expert):
    used = run["expert_indices"][layer] == expert
    gate = np.where(used, run["expert_weights"][layer], 0)
    return (gate[..., None] * run["expert_outputs"][layer]).sum(axis=1)


def by_hand(grid, runs, at_layer, case):
    """The change that a case makes, written out."""
    clean, corrupted = runs

    def change(site, layer, value):
        if site != grid.perturbed or layer != at_layer:
            return value
        value = value.copy()
        if grid.axis == "position":
            value[:, case] = clean[site][layer, case]
        elif grid.axis == "head":
            chosen = slice(None) if grid.positions is None else grid.positions
            value[:, chosen, case] = clean[site][layer, chosen, case]
        else:
            value += share(clean, layer, case) - share(corrupted, layer, case)
        return value

    return change


GRIDS = {
    "stream": Positions("resid_pre"),
    "attention": Positions("attn_out"),
    "experts' sum": Positions("moe_out"),
    "choice": Positions("expert_indices"),
    "heads": Heads(),
    "heads at some positions": Heads("q", positions=[1, -1]),
    "experts": Experts(),
}


def _check(name, lm, golden_weights, prompts, reference_runs, rows):
    grid = GRIDS[name]
    sweep = patch(lm, *prompts, METRIC, grid, rows=rows, progress=False)
    assert sweep.values.shape == (lm.config.n_layers, grid.size(lm.config, N))
    ends = [run["logits"][0, -1, RIGHT] - run["logits"][0, -1, WRONG] for run in reference_runs]
    np.testing.assert_allclose([sweep.clean, sweep.corrupted], ends, atol=1e-4)
    rng = np.random.default_rng(0)
    cases = {(int(rng.integers(s)), int(rng.integers(t))) for _ in range(6)
             for s, t in [sweep.values.shape]}  # fmt: skip
    if name != "choice":
        layer, case, _ = sweep.top(1)[0]
        cases.add((layer, case))
    for layer, case in cases:
        change = by_hand(grid, reference_runs, layer, case)
        logits, _ = reference_edits.forward(golden_weights, lm.config, prompts[1][None], change)
        expected = logits[0, -1, RIGHT] - logits[0, -1, WRONG]
        assert sweep.values[layer, case] == pytest.approx(expected, abs=2e-4), (layer, case)


# Compiling for eight devices takes long, so that they get one grid of each kind of edit.
@pytest.mark.parametrize("name", GRIDS)
def test_every_case_is_a_patched_run(name, lm1, golden_weights, prompts, reference_runs):
    _check(name, lm1, golden_weights, prompts, reference_runs, 17)


@pytest.mark.parametrize("name", ["stream", "experts"])
def test_on_eight_devices(name, lm8, golden_weights, prompts, reference_runs):
    _check(name, lm8, golden_weights, prompts, reference_runs, None)


def test_ends_of_the_stream(lm1, prompts):
    """At the last position of the last layer the stream restores everything; earlier ones none."""
    sweep = patch(lm1, *prompts, METRIC, Positions("resid_post"), progress=False)
    np.testing.assert_allclose(sweep.recovered[-1], [0] * (N - 1) + [1], atol=1e-4)
    assert "clean" in repr(sweep) and "position" in repr(sweep)


def test_data_parallel_mesh(lm1, prompts, golden_dir):
    lm = grokkit.load(golden_dir, mesh=grokkit.make_mesh(2, 1), dtype="float32", progress=False)
    args = (*prompts, METRIC, GRIDS["heads at some positions"])
    # On one device what other tests have compiled.
    expected = patch(lm1, *args, rows=17, progress=False).values
    np.testing.assert_allclose(patch(lm, *args, progress=False).values, expected, atol=1e-4)
    expected = attribution_patch(lm1, *args, at="clean").values
    found = attribution_patch(lm, *args, at="clean").values
    np.testing.assert_allclose(found, expected, atol=1e-4)


TRACED = []


class Counting(LogitDifference):
    def __call__(self, logits):
        if logits.shape[0] > 1:  # one row is the two whole runs' own metric, not compiled
            TRACED.append(logits.shape)
        return super().__call__(logits)


def test_new_prompts_and_answers_compile_nothing(lm1, golden_arrays):
    tokens = golden_arrays["tokens"]
    for start, right in [(0, 3), (5, 60), (9, 99)]:
        a, b = tokens[0, start : start + N], tokens[1, start : start + N]
        patch(lm1, a, b, Counting(right, 4), Positions(), rows=16, progress=False)
    assert len(TRACED) == 1


@pytest.mark.parametrize(
    ("name", "at", "devices"),
    [
        ("stream", "corrupted", "lm8"),
        ("heads at some positions", "clean", "lm1"),
        ("experts", "corrupted", "lm1"),
    ],
)
def test_estimate_is_the_first_order(
    name, at, devices, request, golden_weights, prompts, reference_runs
):
    """Against a difference quotient along the change, in the float64 reference."""
    lm = request.getfixturevalue(devices)
    grid, (clean, corrupted) = GRIDS[name], reference_runs
    estimate = attribution_patch(lm, *prompts, METRIC, grid, at=at)
    base = prompts[0] if at == "clean" else prompts[1]

    def metric(layer, case, step):
        def change(site, where, value):
            if site != grid.perturbed or where != layer:
                return value
            value = value.copy()
            if grid.axis == "position":
                value[:, case] += step * (clean[site] - corrupted[site])[layer, case]
            elif grid.axis == "head":
                some = grid.positions
                value[:, some, case] += step * (clean[site] - corrupted[site])[layer, some, case]
            else:
                value += step * (share(clean, layer, case) - share(corrupted, layer, case))
            return value

        logits, _ = reference_edits.forward(golden_weights, lm.config, base[None], change)
        return logits[0, -1, RIGHT] - logits[0, -1, WRONG]

    for layer, case, effect in estimate.top(3):
        slope = (metric(layer, case, 1e-6) - metric(layer, case, -1e-6)) / 2e-6
        assert effect == pytest.approx(slope, rel=5e-3, abs=1e-3)


@pytest.mark.slow
def test_estimates_resemble_patching(tiny_config):
    """Where attention and experts add little to the stream, a sweep of what they add is linear.

    Heads and experts write through the norm that closes their layer, which brings any change to
    full size: there the estimate only leans the right way.
    """
    mesh = grokkit.make_mesh(1, 1)
    model = random_model(tiny_config, 1)
    blocks = model.blocks
    quiet = eqx.tree_at(
        lambda b: (b.attn_out_norm.scale, b.moe_out_norm.scale),
        blocks,
        (blocks.attn_out_norm.scale * 0.003, blocks.moe_out_norm.scale * 0.003),
    )
    model = eqx.tree_at(lambda m: m.blocks, model, quiet)
    lm = grokkit.LanguageModel(place(model, mesh), mesh, None, "quiet")
    a, b = np.random.default_rng(0).integers(3, 200, (2, 6))
    for grid, least in ((Positions("attn_out"), 0.999), (Heads(), 0.5), (Experts(), 0.5)):
        exact = patch(lm, a, b, METRIC, grid, progress=False).effect
        estimate = attribution_patch(lm, a, b, METRIC, grid).effect
        assert np.corrcoef(exact.ravel(), estimate.ravel())[0, 1] > least


def test_any_function_of_the_logits(lm1, prompts):
    def log_odds(logits):
        return logits[:, -2, 5] - logits[:, -1].max(axis=-1)

    sweep = patch(lm1, *prompts, log_odds, Positions("resid_pre"), progress=False)
    logits = np.asarray(lm1(prompts[0][None]).logits)[0]
    assert sweep.clean == pytest.approx(logits[-2, 5] - logits[-1].max(), abs=1e-4)
    # At layer 0 the last two positions hold all that differs there; patched one at a time.
    edit = grokkit.Replace("resid_pre", _stream(lm1, prompts[0]), layers=[0], positions=[3])
    once = np.asarray(lm1(prompts[1][None], edits=[edit]).logits)[0]
    assert sweep.values[0, 3] == pytest.approx(once[-2, 5] - once[-1].max(), abs=1e-4)


def _stream(lm, tokens):
    return np.asarray(lm.run_with_cache(tokens[None], "resid_pre")[1]["resid_pre"])


def test_texts(tiny_lm):
    sweep = patch(tiny_lm, "Two and two", "Two and two", METRIC, Heads(), progress=False)
    assert sweep.values.shape == (2, 8)
    np.testing.assert_allclose(sweep.effect, 0, atol=1e-5)


def test_errors(lm1, prompts):
    a, b = prompts
    with pytest.raises(SiteError, match="expected a site of each layer and position, found 'pat"):
        Positions("pattern")
    with pytest.raises(SiteError, match="expected a site with heads, found 'k'; choose from q"):
        Heads("k")
    with pytest.raises(PromptError, match="equally many tokens, found 7 and 6"):
        patch(lm1, a, b[:6], METRIC, Heads())
    with pytest.raises(PromptError, match="clean: expected one prompt"):
        patch(lm1, np.stack([a, b]), b, METRIC, Heads())
    with pytest.raises(PromptError, match="metric: expected one number for each row"):
        patch(lm1, a, b, lambda logits: logits[:, -1], Heads())
    with pytest.raises(SiteError, match="positions: there is no 700"):
        patch(lm1, a, b, METRIC, Heads(positions=[700]), progress=False)
    with pytest.raises(PromptError, match="rows: expected at least 1"):
        patch(lm1, a, b, METRIC, Heads(), rows=0)
    with pytest.raises(SiteError, match="'expert_indices' holds integers"):
        attribution_patch(lm1, a, b, METRIC, Positions("expert_indices"))
    with pytest.raises(SiteError, match="at: expected 'corrupted' or 'clean'"):
        # Past the type checker, which would find it first.
        inspect.unwrap(attribution_patch)(lm1, a, b, METRIC, Heads(), at="both")
    with pytest.raises(SiteError, match="no activation site"):
        Heads("zz")
