"""The numbers of nano's recipe: its mixture and its optimiser's settings."""

from dataclasses import dataclass, field

from grokkit.config import NANO, GrokConfig
from grokkit.zoo.nano.windows import COPIES, SUMS


def nano_mixture() -> dict[str, float]:
    """Share of the training windows of each kind."""
    return {
        "prose": 0.17,
        "verse": 0.15,
        "code": 0.16,
        "french": 0.12,
        "spanish": 0.12,
        SUMS: 0.07,
        COPIES: 0.21,
    }


def decay_mixture() -> dict[str, float]:
    """The same for the decay: more text and sums, fewer copies, which by then are learnt or not."""
    return {
        "prose": 0.20,
        "verse": 0.21,
        "code": 0.08,
        "french": 0.17,
        "spanish": 0.16,
        SUMS: 0.06,
        COPIES: 0.12,
    }


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes:
        config: the model's sizes.
        mixture: share of the windows of each kind, until the rate decays.
        decay_mixture: the same from then on.
        batch: windows in a step.
        optimizer: `muon` or `adamw`.
        matrix_rate: peak learning rate of attention and expert matrices.
        rate: peak learning rate of everything else.
        weight_decay: decay of the matrices, times the learning rate.
        warmup: steps until the peak rate.
        decay_share: the last share of the run, in which the rate falls linearly to nothing.
        capacity_factor: capacity of an expert over its even share of the tokens.
        balance_weight: weight of each layer's load-balancing loss.
        seed: seed of the parameters and of the batches.
    """

    config: GrokConfig = NANO
    mixture: dict[str, float] = field(default_factory=nano_mixture)
    decay_mixture: dict[str, float] = field(default_factory=decay_mixture)
    batch: int = 24
    optimizer: str = "muon"
    matrix_rate: float = 0.04
    rate: float = 5e-3
    weight_decay: float = 0.1
    warmup: int = 100
    decay_share: float = 0.62
    capacity_factor: float = 1.5
    balance_weight: float = 0.03
    seed: int = 0
