"""What to hold an observed number against: bootstrap intervals, permutation nulls, matched controls.

Tokens of one text are not independent, so the units that are resampled or relabelled should be
whole sequences or documents. The exception is the control matched on token identity, which asks
what remains of a number when each token keeps its id and changes its context.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import rankdata

from grokkit.errors import GrokkitError

Statistic = Callable[[Int[np.ndarray, " unit"]], np.ndarray | float]
"""From indices of units (a sample of them, or an order) to a number or an array of numbers."""


@dataclasses.dataclass(frozen=True)
class Resampled:
    """A statistic, and its values over resamples."""

    observed: Float[np.ndarray, "*shape"]
    samples: Float[np.ndarray, "sample *shape"]

    def interval(
        self, level: float = 0.95
    ) -> tuple[Float[np.ndarray, "*shape"], Float[np.ndarray, "*shape"]]:
        """The central `level` of the samples: lower and upper end (the percentile interval).

        **Raises:** `GrokkitError` unless 0 < level < 1.
        """
        if not 0 < level < 1:
            raise GrokkitError(f"level must lie between 0 and 1, found {level}")
        ends = [(1 - level) / 2, (1 + level) / 2]
        low, high = np.quantile(self.samples, ends, axis=0)
        return np.asarray(low), np.asarray(high)


@dataclasses.dataclass(frozen=True)
class Null(Resampled):
    """A statistic, and what it is when the relation in question has been shuffled away."""

    @property
    def p_value(self) -> Float[np.ndarray, "*shape"]:
        """Share of null values at least as large as the observed one, which counts as one too.

        Counting it keeps the test valid with few samples: Phipson and Smyth, 2010,
        "Permutation p-values should never be zero".
        """
        at_least = (self.samples >= self.observed).sum(axis=0)
        return np.asarray((1 + at_least) / (1 + len(self.samples)))

    @property
    def mean(self) -> Float[np.ndarray, "*shape"]:
        """Mean over the null."""
        return np.asarray(self.samples.mean(axis=0))

    @property
    def z(self) -> Float[np.ndarray, "*shape"]:
        """Distance of the observed value from the null's mean, in its standard deviations.

        NaN where the null does not vary.
        """
        spread = self.samples.std(axis=0)
        return np.asarray((self.observed - self.mean) / np.where(spread > 0, spread, np.nan))


def bootstrap(
    statistic: Statistic,
    n_units: int,
    rng: np.random.Generator,
    strata: Int[np.ndarray, " unit"] | None = None,
    samples: int = 1000,
) -> Resampled:
    """Draw units with replacement, as many as there are, again and again (Efron, 1979).

    **Arguments:**

    - `statistic`: called with the indices of the units drawn.
    - `n_units`: number of sequences or documents.
    - `rng`: source of the draws.
    - `strata`: label of each unit; each label is then drawn as often as it occurs, as when every
        domain was sampled for itself.
    - `samples`: number of resamples.

    **Returns:** the statistic of all units, and of the resamples.

    **Raises:** `GrokkitError` for fewer than two units, no samples or labels of another length.
    """
    groups = _groups(strata, n_units)
    _check(n_units, samples)
    members = [np.flatnonzero(groups == g) for g in np.unique(groups)]

    def draw() -> np.ndarray:
        return np.concatenate([rng.choice(m, len(m)) for m in members])

    observed = _value(statistic(np.arange(n_units)))
    return Resampled(observed, np.stack([_value(statistic(draw())) for _ in range(samples)]))


def permutation_null(
    statistic: Statistic,
    n_units: int,
    rng: np.random.Generator,
    groups: Int[np.ndarray, " unit"] | None = None,
    samples: int = 999,
) -> Null:
    """Shuffle units, and with `groups` only those of one group among themselves.

    With token ids as groups this is the control matched on token identity: routing is handed
    round among the occurrences of the same token, so what token identity alone explains remains
    in the null, and an observed value beyond it is due to context.

    **Arguments:**

    - `statistic`: called with an order of the units.
    - `n_units`: number of units.
    - `rng`: source of the orders.
    - `groups`: group of each unit, non-negative.
    - `samples`: number of orders.

    **Returns:** the statistic of the order as it is, and of shuffled ones.

    **Raises:** `GrokkitError` for fewer than two units, no samples or groups of another length.
    """
    groups = _groups(groups, n_units)
    _check(n_units, samples)
    observed = _value(statistic(np.arange(n_units)))
    shuffled = [_value(statistic(shuffle_within(groups, rng))) for _ in range(samples)]
    return Null(observed, np.stack(shuffled))


def shuffle_within(
    groups: Int[np.ndarray, " unit"], rng: np.random.Generator
) -> Int[np.ndarray, " unit"]:
    """A random order in which every unit is replaced by one of its own group."""
    places = np.argsort(groups, kind="stable")
    order = np.empty(len(groups), np.int64)
    order[places] = np.lexsort((rng.random(len(groups)), groups))
    return order


def spearman(
    x: Float[np.ndarray, "*lead n"], y: Float[np.ndarray, "*lead n"]
) -> Float[np.ndarray, "*lead"]:
    """Spearman's rank correlation over the last axis; ties share their mean rank.

    NaN where either is constant.

    **Raises:** `GrokkitError` for fewer than two points, or NaN among them.
    """
    n_nan = int(np.isnan(x).sum() + np.isnan(y).sum())
    if x.shape[-1] < 2 or n_nan:
        raise GrokkitError(f"spearman: expected at least two points and no NaN, found "
                           f"{x.shape[-1]} points and {n_nan} NaN")  # fmt: skip
    middle = (x.shape[-1] + 1) / 2
    a, b = (rankdata(v, axis=-1) - middle for v in (x, y))
    scale = np.sqrt((a**2).sum(axis=-1) * (b**2).sum(axis=-1))
    return np.asarray((a * b).sum(axis=-1) / np.where(scale > 0, scale, np.nan))


def _value(x: np.ndarray | float) -> np.ndarray:
    return np.asarray(x, np.float64)


def _groups(groups: np.ndarray | None, n_units: int) -> np.ndarray:
    if groups is None:
        return np.zeros(n_units, np.int64)
    if groups.shape != (n_units,):
        raise GrokkitError(f"expected one label for each of {n_units} units, found shape "
                           f"{groups.shape}")  # fmt: skip
    return groups


def _check(n_units: int, samples: int) -> None:
    if n_units < 2:
        raise GrokkitError(f"expected at least two units to resample, found {n_units}")
    if samples < 1:
        raise GrokkitError(f"expected at least one resample, found {samples}")
