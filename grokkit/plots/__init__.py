"""Figures: arrays in, a matplotlib figure out. Nothing here knows a model.

A notebook shows the figure that is a cell's last value. Save one with
`figure.savefig("name.png", dpi=150)`.
"""

from grokkit.plots.attention import attention_heads, attention_pattern
from grokkit.plots.causes import causal_versus_observed, patching_map
from grokkit.plots.memory import device_memory, memory_bill, weight_layout
from grokkit.plots.notebook import show_figures
from grokkit.plots.predictions import attribution_terms, logit_lens, next_token
from grokkit.plots.routing import (
    chosen_experts,
    coactivation,
    domain_specialisation,
    expert_load,
    transitions,
)
from grokkit.plots.style import EXPERT_COLOURS

__all__ = [
    "EXPERT_COLOURS",
    "attention_heads",
    "attention_pattern",
    "attribution_terms",
    "causal_versus_observed",
    "chosen_experts",
    "coactivation",
    "device_memory",
    "domain_specialisation",
    "expert_load",
    "logit_lens",
    "memory_bill",
    "next_token",
    "patching_map",
    "transitions",
    "weight_layout",
]

show_figures()
