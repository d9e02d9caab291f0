"""Figures: arrays in, a matplotlib figure out. Nothing here knows a model."""

from grokkit.plots.predictions import next_token
from grokkit.plots.routing import chosen_experts
from grokkit.plots.style import EXPERT_COLOURS

__all__ = ["EXPERT_COLOURS", "chosen_experts", "next_token"]
