"""What a patching sweep goes over: the cases, the edit that makes each, and its estimate."""

import abc
import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from grokkit.config import GrokConfig
from grokkit.edits import Add, Edit, Replace, Where
from grokkit.edits.selection import Selector
from grokkit.errors import SiteError
from grokkit.taps import SITES, site


class Grid(abc.ABC):
    """The cases of a sweep: one for each layer and each index of one more axis."""

    axis: str
    """Name of the second axis."""
    sites: tuple[str, ...]
    """What must be captured of both runs."""
    perturbed: str
    """The site that is changed, and at which a gradient estimates the effects."""

    @abc.abstractmethod
    def size(self, config: GrokConfig, n_positions: int) -> int:
        """Cases in each layer."""

    @abc.abstractmethod
    def edit(self, runs: "Runs", layers: np.ndarray, cases: np.ndarray) -> Edit:
        """The change of each batch row: `layers` [row] and `cases` [row] say which case it is."""

    @abc.abstractmethod
    def project(
        self, gradient: Float[np.ndarray, "layer *site"], runs: "Runs"
    ) -> Float[np.ndarray, "layer case"]:
        """The estimated effects, from the gradient at the perturbed site of one sequence."""


@dataclasses.dataclass(frozen=True)
class Runs:
    """The two runs' activations, one sequence each, with the batch axis dropped."""

    config: GrokConfig
    n_positions: int
    clean: dict[str, Any]
    corrupted: dict[str, Any]

    def change(self, name: str) -> np.ndarray:
        """Clean minus corrupted, [layer, ...]."""
        clean, corrupted = np.asarray(self.clean[name]), np.asarray(self.corrupted[name])
        # Masked scores are -inf in both: no change there.
        return np.subtract(clean, corrupted, out=np.zeros_like(clean), where=clean != corrupted)


class Positions(Grid):
    """Every layer and token position of a site: residual stream, attention or expert output."""

    axis = "position"

    def __init__(self, at: str = "resid_pre") -> None:
        """**Raises:** `SiteError` for a site that is not of each layer and position."""
        found = site(at)
        if not found.in_layer or "position" not in found.axes:
            fit = [s.name for s in SITES.values() if s.in_layer and "position" in s.axes]
            raise SiteError(f"Positions: expected a site of each layer and position, found {at!r}; "
                            f"choose from {', '.join(fit)}")  # fmt: skip
        self.perturbed, self.sites = at, (at,)

    def size(self, config: GrokConfig, n_positions: int) -> int:
        return n_positions

    def edit(self, runs: Runs, layers: np.ndarray, cases: np.ndarray) -> Edit:
        value = runs.clean[self.perturbed][:, None]
        return Replace(
            self.perturbed,
            value,
            layers=_one_hot(layers, runs.config.n_layers),
            positions=_one_hot(cases, runs.n_positions),
        )

    def project(self, gradient: np.ndarray, runs: Runs) -> np.ndarray:
        product = gradient * runs.change(self.perturbed)
        return product.reshape(*product.shape[:2], -1).sum(axis=-1)


class Heads(Grid):
    """Every attention head, at all positions or at those given."""

    axis = "head"

    def __init__(self, at: str = "z", positions: Selector = None) -> None:
        """**Raises:** `SiteError` for a site without heads."""
        if "head" not in site(at).axes:
            fit = [s.name for s in SITES.values() if "head" in s.axes]
            raise SiteError(f"Heads: expected a site with heads, found {at!r}; choose from "
                            f"{', '.join(fit)}")  # fmt: skip
        self.perturbed, self.sites, self.positions = at, (at,), positions

    def size(self, config: GrokConfig, n_positions: int) -> int:
        return config.n_heads

    def edit(self, runs: Runs, layers: np.ndarray, cases: np.ndarray) -> Edit:
        return Replace(
            self.perturbed,
            runs.clean[self.perturbed][:, None],
            layers=_one_hot(layers, runs.config.n_layers),
            heads=_one_hot(cases, runs.config.n_heads),
            positions=self.positions,
        )

    def project(self, gradient: np.ndarray, runs: Runs) -> np.ndarray:
        axes = ("layer", *SITES[self.perturbed].axes[1:])
        place = axes.index("query" if "query" in axes else "position")
        product = gradient * runs.change(self.perturbed)
        product = np.moveaxis(product, (axes.index("head"), place), (1, 2))
        product = product[:, :, _chosen(self.positions, runs)]
        return product.reshape(*product.shape[:2], -1).sum(axis=-1)


class Experts(Grid):
    """Every expert: its weighted share of the layer's output, zero where it is not chosen.

    The clean run's share takes the place of the corrupted run's, before the closing norm. The
    other experts' shares stay as they are.
    """

    axis = "expert"
    sites = ("expert_indices", "expert_weights", "expert_outputs")
    perturbed = "moe_out_pre_norm"

    def __init__(self, positions: Selector = None) -> None:
        self.positions = positions

    def size(self, config: GrokConfig, n_positions: int) -> int:
        return config.n_experts

    def edit(self, runs: Runs, layers: np.ndarray, cases: np.ndarray) -> Edit:
        return Add(
            self.perturbed,
            self._change(runs, layers, cases),
            layers=_one_hot(layers, runs.config.n_layers),
            positions=self.positions,
        )

    def project(self, gradient: np.ndarray, runs: Runs) -> np.ndarray:
        n_layers, n_experts = runs.config.n_layers, runs.config.n_experts
        effects = np.empty((n_layers, n_experts), np.float32)
        for expert in range(n_experts):
            change = self._change(runs, np.arange(n_layers), np.full(n_layers, expert))
            product = (gradient * change)[:, _chosen(self.positions, runs)]
            effects[:, expert] = product.sum(axis=(1, 2))
        return effects

    @staticmethod
    def _change(runs: Runs, layers: np.ndarray, experts: np.ndarray) -> np.ndarray:
        """[row, position, d_model]: what the clean run's share of an expert has over the other's"""

        def share(run: dict[str, Any]) -> np.ndarray:
            indices, weights, outputs = (np.asarray(run[name])[layers] for name in Experts.sites)
            used = np.where(indices == experts[:, None, None], weights, 0)
            return np.einsum("rtc,rtcd->rtd", used, outputs)

        return share(runs.clean) - share(runs.corrupted)


def _one_hot(which: np.ndarray, size: int) -> Bool[np.ndarray, "row size"]:
    return which[:, None] == np.arange(size)


def _chosen(positions: Selector, runs: Runs) -> Bool[np.ndarray, " position"]:
    """The positions selected, as the edits understand them."""
    where = Where(positions=positions).resolve(runs.config, np.array([runs.n_positions]), "grid")
    if where.positions is None:
        return np.ones(runs.n_positions, bool)
    return np.atleast_2d(where.positions)[0, : runs.n_positions]
