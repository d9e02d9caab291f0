"""Figures are judged at 8 and at 64 layers; shape errors reach the functions' own checks."""

import numpy as np
import pytest
from jaxtyping import config


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def unchecked(monkeypatch):
    """Without jaxtyping's checks, as outside the tests: the functions' own must speak."""
    monkeypatch.setattr(config, "jaxtyping_disable", True)
