"""The training loop: it learns, it can be interrupted, and it goes on as if it had not been."""

import json
import math
import os
import signal
import time

import jax
import numpy as np
import pytest

from grokkit.errors import GrokkitError
from grokkit.zoo.nano import train as training
from grokkit.zoo.nano.__main__ import parser
from grokkit.zoo.nano.recipe import Recipe
from grokkit.zoo.nano.train import LATEST, STABLE, Schedule, load_state, save_state, train


@pytest.fixture(autouse=True)
def standard_promotion():
    """optax mixes dtypes that the tests' strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def whole(recipe, corpus, tmp_path_factory):
    """An uninterrupted run of 24 steps: its folder and its last state."""
    with jax.numpy_dtype_promotion("standard"):
        run = tmp_path_factory.mktemp("whole")
        state = train(recipe, corpus, run, Schedule(recipe, steps=24), report_every=4)
    return run, state


def _same(a, b):
    for x, y in zip(jax.tree.leaves(a[:2]), jax.tree.leaves(b[:2]), strict=True):
        np.testing.assert_array_equal(x, y)


def test_loss_falls_and_is_logged(whole, recipe):
    run, state = whole
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(4, 25, 4))
    assert lines[-1]["tokens"] == 24 * recipe.batch * recipe.config.context_length
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3
    assert state.step == 24


def test_rate_decays_to_nothing_and_the_state_before_is_kept(whole, recipe):
    run, state = whole
    assert state.decay == 0
    stable = load_state(run / STABLE, recipe)
    assert stable.decay == 1 and stable.step == math.ceil(24 * (1 - recipe.decay_share))


@pytest.mark.slow
def test_resumed_run_equals_uninterrupted_one(whole, recipe, corpus, tmp_path, monkeypatch):
    class Interrupted(Schedule):
        def remaining(self, step):
            if step == 13:
                raise KeyboardInterrupt
            return super().remaining(step)

    half = train(recipe, corpus, tmp_path, Interrupted(recipe, steps=24))
    assert half.step == 13
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([LATEST, STABLE])
    resumed = load_state(tmp_path / LATEST, recipe)
    assert (resumed.step, resumed.decay) == (half.step, half.decay)
    last = train(recipe, corpus, tmp_path, Schedule(recipe, steps=24), start=resumed)
    _same(last, whole[1])


def test_signal_in_the_middle_of_a_step_keeps_a_whole_state(recipe, corpus, tmp_path, monkeypatch):
    make_step = training.make_step

    def with_signal(recipe):
        step, calls = make_step(recipe), []

        def interrupted(*arguments):
            calls.append(0)
            out = step(*arguments)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.05)  # where Python would raise KeyboardInterrupt
            return out

        return interrupted

    monkeypatch.setattr(training, "make_step", with_signal)
    state = train(recipe, corpus, tmp_path, Schedule(recipe, steps=24))
    assert state.step == 3
    _same(load_state(tmp_path / LATEST, recipe), state)


def test_failed_save_leaves_the_old_state(whole, recipe, tmp_path, monkeypatch):
    save_state(tmp_path / LATEST, whole[1])
    before = (tmp_path / LATEST).read_bytes()

    def fail(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="disk full"):
        save_state(tmp_path / LATEST, whole[1])
    assert [p.name for p in tmp_path.iterdir()] == [LATEST]
    assert (tmp_path / LATEST).read_bytes() == before


def test_state_of_another_recipe_is_refused(whole):
    with pytest.raises(GrokkitError, match="belongs to another recipe"):
        load_state(whole[0] / LATEST, Recipe())


def test_adamw_is_an_alternative(recipe, corpus, tmp_path):
    import dataclasses

    adamw = dataclasses.replace(recipe, optimizer="adamw", matrix_rate=5e-3)
    state = train(adamw, corpus, tmp_path, Schedule(adamw, steps=2))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    wrong = dataclasses.replace(recipe, optimizer="sgd")
    with pytest.raises(GrokkitError, match="muon or adamw, found 'sgd'"):
        training.make_optimizer(wrong)


def test_schedule_with_a_deadline_ends_decayed():
    recipe = Recipe(decay_share=0.5)
    now = time.time()
    schedule = Schedule(recipe, deadline=now + 50)
    for _ in range(500):
        schedule.took(0.5)
    assert schedule.remaining(0) == pytest.approx(100, rel=0.02)
    assert schedule.decayed(50, 1.0) == 1.0  # 100 to go of 150: not yet
    assert schedule.decayed(150, 1.0) == pytest.approx(0.99, abs=0.001)
    assert Schedule(recipe, deadline=now - 1).remaining(0) < 0
    with pytest.raises(GrokkitError, match="either"):
        Schedule(recipe)
    with pytest.raises(GrokkitError, match="either"):
        Schedule(recipe, 10, 10.0)


def test_straight_line_to_zero():
    schedule = Schedule(Recipe(decay_share=0.5), steps=10)
    factors, decay = [], 1.0
    for step in range(10):
        decay = schedule.decayed(step, decay)
        factors.append(decay)
    np.testing.assert_allclose(factors, [1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0], atol=1e-12)


def test_command_line(capsys):
    options = parser().parse_args(["train", "--steps", "5", "--run", "x"])
    assert options.steps == 5 and options.run.name == "x"
    with pytest.raises(SystemExit):
        parser().parse_args(["train", "--until", "25:99"])
    assert "expected HH:MM" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parser().parse_args(["train"])
