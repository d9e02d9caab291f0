"""Which activations carry a behaviour: put one run's activations into another's and measure.

A sweep takes a clean and a corrupted prompt of equal length and a metric of the logits. Each case
runs the corrupted prompt with one piece of the clean run in place: a layer and position of a
site, a head, or an expert. Cases are the batch rows of one compiled program, which begins at the
first layer that any of them changes. Beside it, attribution patching estimates all cases from one
gradient (Nanda, "Attribution patching", 2023; Syed et al., arXiv 2310.10348).
"""

import dataclasses
from collections.abc import Callable
from contextlib import closing
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int
from tqdm.auto import tqdm

from grokkit.abstract_model import Model, Resume
from grokkit.analysis.grids import Experts, Grid, Heads, Positions, Runs
from grokkit.edits import Add, site_shape
from grokkit.errors import PromptError, SiteError
from grokkit.language_model import LanguageModel, Tokens
from grokkit.layers.block import Block, Rows
from grokkit.layers.ends import Ends, enter
from grokkit.processes import is_first, to_host
from grokkit.taps import Capture, Change

Metric = Callable[[Float[Array, "batch position vocab"]], Float[Array, " batch"]]
"""One number for each row, from the logits alone. Differentiable, for attribution patching. A
plain function is part of the compiled program; of an `eqx.Module` the arrays are inputs, so that
other values compile nothing. A metric whose attribute `last_only` is true gets the logits of the
last position alone, as one position, which saves making the others."""

_LEAVING = Capture("resid_post", layers=-1, name="leaving")
"""The stream after the last layer."""

__all__ = [
    "Experts", "Grid", "Heads", "LogitDifference", "Metric", "Positions", "Sweep",
    "attribution_patch", "patch",
]  # fmt: skip


class LogitDifference(eqx.Module):
    """The logit of one token minus that of another, at one position: the usual metric."""

    token: Int[Array, ""]
    against: Int[Array, ""] | None
    position: int = eqx.field(static=True)

    def __init__(self, token: int, against: int | None = None, position: int = -1) -> None:
        """`against` may be left out, for the logit of `token` alone."""
        self.token, self.position = jnp.asarray(token), position
        self.against = None if against is None else jnp.asarray(against)

    @property
    def last_only(self) -> bool:
        """Whether the other positions' logits are not looked at."""
        return self.position == -1

    def __call__(self, logits: Float[Array, "batch position vocab"]) -> Float[Array, " batch"]:
        """The difference for each row."""
        row = logits[:, self.position]
        value = jnp.take(row, self.token, axis=-1)
        return value if self.against is None else value - jnp.take(row, self.against, axis=-1)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The metric for every case: layer by position, head or expert."""

    values: Float[np.ndarray, "layer case"]
    """The metric with that case patched, or the estimate of it."""
    clean: float
    """The metric of the clean run."""
    corrupted: float
    """The metric of the corrupted run."""
    site: str
    """What was patched."""
    axis: str
    """Name of the second axis."""

    @property
    def effect(self) -> Float[np.ndarray, "layer case"]:
        """What patching adds to the corrupted run's metric."""
        return self.values - np.float32(self.corrupted)

    @property
    def recovered(self) -> Float[np.ndarray, "layer case"]:
        """The effect as a share of the difference between the runs: 1 restores the clean one."""
        return self.effect / np.float32(self.clean - self.corrupted)

    def top(self, n: int = 10) -> list[tuple[int, int, float]]:
        """The cases of largest absolute effect: layer, index, effect."""
        order = np.argsort(-np.abs(self.effect), axis=None, kind="stable")[:n]
        where = np.stack(np.unravel_index(order, self.values.shape), axis=-1)
        return [(int(a), int(b), float(self.effect[a, b])) for a, b in where]

    def __repr__(self) -> str:
        best = ", ".join(f"layer {a} {self.axis} {b}: {e:+.3g}" for a, b, e in self.top(3))
        return (f"Sweep of {self.site}, {self.values.shape[0]} layers x {self.values.shape[1]} "
                f"{self.axis}s; clean {self.clean:.4g}, corrupted {self.corrupted:.4g}; largest "
                f"effects: {best}")  # fmt: skip


def patch(
    lm: LanguageModel,
    clean: Tokens,
    corrupted: Tokens,
    metric: Metric,
    grid: Grid,
    rows: int | None = None,
    progress: bool = True,
) -> Sweep:
    """Run the corrupted prompt once for each case, with that piece of the clean run in place.

    Exchange the prompts to see what the corrupted run's pieces break instead.

    **Arguments:**

    - `clean`, `corrupted`: one prompt each, text or token ids, of as many tokens.
    - `metric`: of the logits [row, position, vocab], one number a row.
    - `grid`: `Positions(site)`, `Heads(site)` or `Experts()`.
    - `rows`: most cases that run at once; by default as many as keep the logits below 256 MiB, 48
        at most. All chunks, and other prompts of equal length, share one compiled program.
    - `progress`: show a progress bar, in cases.

    **Returns:** a `Sweep`.

    **Raises:** `PromptError` for prompts of different lengths, `SiteError` for bad positions.
    """
    runs, tokens, values = _both_runs(lm, clean, corrupted, metric, grid)
    n_layers, n_cases = lm.config.n_layers, grid.size(lm.config, runs.n_positions)
    layers, cases = np.divmod(np.arange(n_layers * n_cases), n_cases)
    rows = _rows(lm, runs.n_positions, len(cases), rows)
    ids = np.repeat(tokens, rows, axis=0)
    lengths = np.full(rows, runs.n_positions, np.int32)
    results = []
    with tqdm(
        total=len(cases), desc=f"patching {grid.perturbed}", disable=not (progress and is_first())
    ) as bar:
        for start in range(0, len(cases), rows):
            # The last chunk repeats its last case, to keep one shape.
            chunk = np.minimum(np.arange(start, start + rows), len(cases) - 1)
            edit = grid.edit(runs, layers[chunk], cases[chunk])
            edits = lm.resolve([edit], lengths.tolist())
            # Below the chunk's first layer its rows are the corrupted run.
            first = layers[start]
            stream = np.repeat(runs.corrupted["resid_pre"][first, None], rows, axis=0)
            resume = Resume(jnp.asarray(first), jnp.asarray(stream))
            with jax.set_mesh(lm.mesh):
                found = to_host(lm.runnable.run(_measure, ids, lengths, edits, metric, resume))
            kept = min(rows, len(cases) - start)
            results.append(found[:kept])
            bar.update(kept)
    sweep = np.concatenate(results).reshape(n_layers, n_cases)
    return Sweep(sweep, *values, grid.perturbed, grid.axis)


def attribution_patch(
    lm: LanguageModel,
    clean: Tokens,
    corrupted: Tokens,
    metric: Metric,
    grid: Grid,
    at: str = "corrupted",
) -> Sweep:
    """Estimate a sweep from one gradient: its product with the change of the activation.

    **Arguments:** as for `patch`, and

    - `at`: the run at which the gradient is taken. At `"corrupted"` this is the first-order
        estimate of what `patch` measures; at `"clean"`, of what it takes to go back.

    **Returns:** a `Sweep` of estimates; its `effect` is the product.

    **Raises:** `SiteError` for a site of integers, and as `patch`.
    """
    if grid.perturbed == "expert_indices":
        raise SiteError("attribution patching needs a gradient, and 'expert_indices' holds "
                        "integers; sweep it with patch")  # fmt: skip
    if at not in ("corrupted", "clean"):
        raise SiteError(f"at: expected 'corrupted' or 'clean', found {at!r}")
    runs, tokens, values = _both_runs(lm, clean, corrupted, metric, grid)
    chosen = _one_prompt(lm, clean, "clean") if at == "clean" else tokens
    ids = np.repeat(chosen, lm.mesh.shape["data"], axis=0)
    lengths = np.full(len(ids), runs.n_positions, np.int32)
    n = runs.n_positions
    edit = Add(grid.perturbed, np.zeros(site_shape(grid.perturbed, lm.config, 1, n), np.float32))
    (edit,) = lm.resolve([edit], lengths.tolist())
    with jax.set_mesh(lm.mesh):
        run = runs.clean if at == "clean" else runs.corrupted
        gradient = _gradient(lm, ids, lengths, edit, metric, run)
    clean_value, corrupted_value = values
    estimate = np.float32(corrupted_value) + grid.project(gradient[:, 0], runs)
    return Sweep(estimate, clean_value, corrupted_value, grid.perturbed, grid.axis)


@eqx.filter_jit
def _measure(
    model: Model,
    ids: Array | np.ndarray,
    lengths: Array | np.ndarray,
    edits: tuple[Any, ...],
    metric: Metric,
    resume: Resume,
) -> Float[Array, " batch"]:
    ids, lengths = jnp.asarray(ids), jnp.asarray(lengths)
    out = model(ids, lengths=lengths, edits=edits, last_only=_last_only(metric), resume=resume)
    return _of_logits(metric, out.logits)


def _last_only(metric: Metric) -> bool:
    return getattr(metric, "last_only", False)


def _of_logits(metric: Metric, logits: Array) -> Float[Array, " batch"]:
    # Whole on every device, so that a metric may index as it likes.
    return metric(jax.reshard(logits, P()))


def _gradient(
    lm: LanguageModel,
    ids: np.ndarray,
    lengths: np.ndarray,
    edit: Change,
    metric: Metric,
    run: dict[str, np.ndarray],
) -> np.ndarray:
    """Derivative of the first row's metric by what is added at a site, from the last layer to the
    first.

    Each layer is run again from the stream that entered it, and the derivative by what leaves it is
    taken back to what enters it. So little is kept, and layers may come from disk.
    """
    model, layout = lm.runnable, NamedSharding(lm.mesh, P("data"))

    def on_rows(stream: Float[np.ndarray, "position d_model"]) -> Array:
        return jax.device_put(np.repeat(stream[None], len(ids), axis=0), layout)

    _, rows, _ = enter(model.ends, ids, None, lengths, (), ())
    pulled = _of_metric(model.ends, on_rows(run[_LEAVING.key][0]), rows, metric)
    found, layer = [], lm.config.n_layers
    with closing(model.layers(backwards=True)) as blocks:
        for block in blocks:
            layer -= 1
            x = on_rows(run["resid_pre"][layer])
            pulled, of_layer = _pull(block, x, pulled, rows, jnp.int32(layer), model.dtype, edit)
            found.append(to_host(of_layer))
            jax.block_until_ready(pulled)
            del block
    return np.stack(found[::-1])


@eqx.filter_jit
def _of_metric(ends: Ends, x: Array, rows: Rows, metric: Metric) -> Array:
    """Derivative of the first row's metric by the stream after the last layer."""

    def value(x: Array) -> Array:
        logits, _ = ends.leave(x, rows, _last_only(metric), (), ())
        return _of_logits(metric, logits)[0]

    return jax.grad(value)(x)


@eqx.filter_jit
def _pull(
    block: Block, x: Array, pulled: Array, rows: Rows, layer: Array, dtype: Any, edit: Any
) -> tuple[Array, Array]:
    """A derivative by what leaves a layer, as ones by what enters it and by what is added in it."""

    def leaving(x: Array, added: Array) -> Array:
        moved = eqx.tree_at(lambda e: e.value, edit, added)
        return block(x, rows, None, layer, dtype, (), (moved,))[0]

    return jax.vjp(leaving, x, edit.value)[1](pulled)


def _both_runs(
    lm: LanguageModel, clean: Tokens, corrupted: Tokens, metric: Metric, grid: Grid
) -> tuple[Runs, Int[np.ndarray, "1 position"], tuple[float, float]]:
    """Capture what the grid needs of both runs; the corrupted tokens; the metric of both."""
    ids = [_one_prompt(lm, clean, "clean"), _one_prompt(lm, corrupted, "corrupted")]
    if ids[0].shape != ids[1].shape:
        raise PromptError(
            f"clean and corrupted: expected prompts of equally many tokens, found "
            f"{ids[0].shape[1]} and {ids[1].shape[1]}; positions could not be matched"
        )
    sites = list(dict.fromkeys(("resid_pre", *grid.sites)))
    names = [*sites, _LEAVING.key]
    kept, values = [], []
    for row in ids:
        tiled = np.repeat(row, lm.mesh.shape["data"], axis=0)
        logits, cache = lm.run_with_cache(tiled, [*sites, _LEAVING])
        value = np.asarray(metric(jnp.asarray(to_host(logits[:1]))))
        if value.shape != (1,):
            raise PromptError(f"metric: expected one number for each row, shape (1,) for 1 row, "
                              f"found shape {value.shape}")  # fmt: skip
        values.append(float(value[0]))
        kept.append({name: to_host(cache[name][:, 0]) for name in names})
    n = ids[0].shape[1]
    return Runs(lm.config, n, *kept), ids[1], (values[0], values[1])


def _one_prompt(lm: LanguageModel, tokens: Tokens, what: str) -> Int[np.ndarray, "1 position"]:
    ids = lm.to_tokens(tokens) if isinstance(tokens, str) else np.atleast_2d(np.asarray(tokens))
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.dtype.kind not in "iu":
        raise PromptError(
            f"{what}: expected one prompt, a text or token ids [position], found an array of "
            f"shape {ids.shape} and dtype {ids.dtype}; sweep several prompts one after the other: "
            f"those of equal length share the compiled program"
        )
    lm.prepare(np.repeat(ids, lm.mesh.shape["data"], axis=0))
    return ids.astype(np.int32)


def _rows(lm: LanguageModel, n_positions: int, n_cases: int, rows: int | None) -> int:
    """Cases at once: chunks of about one size, and a multiple of the mesh's data axis."""
    if rows is not None and rows < 1:
        raise PromptError(f"rows: expected at least 1, found {rows}")
    if rows is None:
        rows = min(48, max(1, 2**28 // (4 * n_positions * lm.config.vocab_size)))
    chunks = -(-n_cases // rows)
    data = lm.mesh.shape["data"]
    return -(-n_cases // (chunks * data)) * data
