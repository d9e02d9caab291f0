"""Training: a step, a schedule that can end at any time, and a state that survives interruption."""

import contextlib
import functools
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon
from tqdm.auto import tqdm

from grokkit.errors import GrokkitError
from grokkit.runtime import files
from grokkit.zoo.nano.data import Corpus
from grokkit.zoo.nano.recipe import Recipe
from grokkit.zoo.nano.training_model import init_params, training_loss
from grokkit.zoo.nano.windows import WindowSampler

LATEST, STABLE = "state.npz", "state-before-decay.npz"
_VECTORS = ("attn_norm", "attn_out_norm", "moe_norm", "moe_out_norm", "router")


class State(NamedTuple):
    """All that a run is: parameters, optimiser state, steps done, and the rate's decay so far."""

    params: Any
    optimizer: Any
    step: int
    decay: float  # 1 until the decay begins, then down to 0


def _is_matrix(params: Any) -> Any:
    def label(path: tuple, leaf: jax.Array) -> str:
        name = path[-1].key
        return "matrix" if path[0].key == "layers" and name not in _VECTORS else "other"

    return jax.tree_util.tree_map_with_path(label, params)


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """The optimiser at a learning rate of 1: the step multiplies its update by the schedule.

    Muon (Jordan et al. 2024) on the attention and expert matrices, Adam on everything else; or
    AdamW on everything.
    """
    adam = functools.partial(optax.scale_by_adam, b1=0.9, b2=0.95)
    if recipe.optimizer == "muon":

        def dimensions(params: Any) -> Any:
            return jax.tree.map(
                lambda x: MuonDimensionNumbers(reduction_axis=x.ndim - 2, output_axis=x.ndim - 1),
                params,
            )

        matrix = scale_by_muon(weight_dimension_numbers=dimensions)
    elif recipe.optimizer == "adamw":
        matrix = adam()
    else:
        raise GrokkitError(f"optimizer must be muon or adamw, found {recipe.optimizer!r}")
    matrix = optax.chain(
        matrix, optax.add_decayed_weights(recipe.weight_decay), optax.scale(-recipe.matrix_rate)
    )
    other = optax.chain(adam(), optax.scale(-recipe.rate))
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.partition({"matrix": matrix, "other": other}, _is_matrix),
    )


def initial_state(recipe: Recipe) -> State:
    """A run's state before its first step."""
    params = init_params(recipe.config, jax.random.key(recipe.seed))
    return State(params, make_optimizer(recipe).init(params), 0, 1.0)


def make_step(recipe: Recipe) -> Callable:
    """The compiled step: (params, optimiser state, windows, weights, rate) to new ones, report."""
    optimizer = make_optimizer(recipe)
    loss = functools.partial(
        training_loss,
        config=recipe.config,
        capacity_factor=recipe.capacity_factor,
        balance_weight=recipe.balance_weight,
    )

    def step(params, optimizer_state, windows, weights, rate):
        gradients, report = jax.grad(loss, has_aux=True)(params, windows, weights)
        report["grad_norm"] = optax.tree.norm(gradients)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        updates = jax.tree.map(lambda u: u * rate, updates)
        return optax.apply_updates(params, updates), optimizer_state, report

    return jax.jit(step, donate_argnums=(0, 1))


def save_state(path: Path, state: State) -> None:
    """Write a state: arrays only, nothing pickled."""
    leaves = jax.tree.leaves((state.params, state.optimizer))
    arrays: dict[str, Any] = {f"{i:05d}": np.asarray(leaf) for i, leaf in enumerate(leaves)}
    with files.replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, step=state.step, decay=state.decay, **arrays)


def load_state(path: Path, recipe: Recipe) -> State:
    """Read a state.

    Raises:
        GrokkitError: the file does not hold the arrays this recipe calls for.
    """
    like = jax.eval_shape(lambda: initial_state(recipe)[:2])
    expected, structure = jax.tree.flatten(like)
    with np.load(path, allow_pickle=False) as arrays:
        names = sorted(name for name in arrays.files if name.isdigit())
        leaves = [arrays[name] for name in names]
        step, decay = int(arrays["step"]), float(arrays["decay"])
    if [leaf.shape for leaf in leaves] != [leaf.shape for leaf in expected]:
        raise GrokkitError(
            f"{path}: this state belongs to another recipe (expected {len(expected)} arrays of "
            f"the recipe's shapes, found {len(leaves)}); give another --run folder"
        )
    params, optimizer = jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in leaves])
    return State(params, optimizer, step, decay)


class Schedule:
    """Warm-up, a stable phase, and a linear decay whose end is a step or a time of day.

    Args:
        recipe: its `warmup` and `decay_share`.
        steps: the last step, or None.
        deadline: the end in seconds since the epoch, or None: the remaining steps are then
            estimated from the time the last ones took, anew at each step.
    """

    def __init__(self, recipe: Recipe, steps: int | None = None, deadline: float | None = None):
        if (steps is None) == (deadline is None):
            raise GrokkitError("give either a number of steps or a deadline")
        self._recipe, self._steps, self._deadline = recipe, steps, deadline
        self._seconds = 1.0

    def took(self, seconds: float) -> None:
        """Say how long a step took."""
        self._seconds += 0.02 * (seconds - self._seconds)

    def remaining(self, step: int) -> float:
        """Steps left to do, this one included."""
        if self._steps is not None:
            return float(self._steps - step)
        assert self._deadline is not None
        return (self._deadline - time.time()) / self._seconds

    def decayed(self, step: int, decay: float) -> float:
        """The decay factor of this step, from the one before."""
        remaining = self.remaining(step)
        if decay == 1.0 and remaining > self._recipe.decay_share * (step + remaining):
            return 1.0
        # Keeps the rate on a straight line to zero, wherever the end has moved to.
        return decay * max(0.0, 1.0 - 1.0 / max(remaining, 1.0))

    def warmup(self, step: int) -> float:
        """The warm-up factor of this step."""
        return min(1.0, (step + 1) / self._recipe.warmup)


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Hold Ctrl-C back until the end: a step gives its inputs away, so that half-way there is no
    state to keep."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(n, lambda number, _: waiting.append(number)) for n in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    for number in waiting:
        signal.raise_signal(number)


def train(
    recipe: Recipe,
    corpus: Corpus,
    run: Path,
    schedule: Schedule,
    *,
    start: State | None = None,
    save_every: float = 180.0,
    report_every: int = 100,
    probe: Callable[[Any], dict[str, Any]] | None = None,
) -> State:
    """Train until the schedule ends, or until interrupted; either way the state is kept.

    Args:
        recipe: what to train and how.
        corpus: what to read.
        run: folder of `state.npz`, `state-before-decay.npz` and `log.jsonl`.
        schedule: when to stop.
        start: the state to go on from; a new one when None.
        save_every: seconds between two saves.
        report_every: steps between two lines of the log.
        probe: measures the parameters for the log, or None.

    Returns:
        The last state.
    """
    run.mkdir(parents=True, exist_ok=True)
    state = initial_state(recipe) if start is None else start
    sampler = WindowSampler(corpus, recipe.config.context_length, recipe.seed)
    compiled = make_step(recipe)
    saved, losses, began = time.time(), [], time.time()
    bar = tqdm(initial=state.step, unit="step", mininterval=5.0, desc="training")
    try:
        while (remaining := schedule.remaining(state.step)) > 0:
            clock = time.time()
            decay = schedule.decayed(state.step, state.decay)
            if decay < 1.0 and state.decay == 1.0:
                save_state(run / STABLE, state)
            rate = decay * schedule.warmup(state.step)
            mixture = recipe.mixture if decay == 1.0 else recipe.decay_mixture
            windows, weights = sampler.batch(state.step, recipe.batch, mixture)
            with _interrupts_wait():
                params, optimizer, report = compiled(
                    state.params, state.optimizer, windows, weights, rate
                )
                state = State(params, optimizer, state.step + 1, decay)
                losses.append(float(report["loss"]))
            schedule.took(time.time() - clock)
            bar.update()
            if state.step % report_every == 0:
                line = {
                    "step": state.step,
                    "tokens": state.step * recipe.batch * recipe.config.context_length,
                    "minutes": round((time.time() - began) / 60, 2),
                    "remaining_steps": round(remaining),
                    "rate": round(rate, 4),
                    "loss": round(float(np.mean(losses)), 4),
                    "grad_norm": round(float(report["grad_norm"]), 3),
                    "least_load": round(float(jnp.min(report["load"])), 4),
                    "dropped": round(float(jnp.mean(report["dropped"])), 4),
                    **(probe(state.params) if probe else {}),
                }
                losses = []
                with open(run / "log.jsonl", "a", encoding="utf-8") as log:
                    log.write(json.dumps(line) + "\n")
                bar.set_postfix(loss=line["loss"])
            if time.time() - saved > save_every:
                save_state(run / LATEST, state)
                saved = time.time()
    except KeyboardInterrupt:
        bar.write("interrupted; the state is kept and the run can be resumed")
    finally:
        bar.close()
        save_state(run / LATEST, state)
    return state
