"""Values that change an activation: patching, steering, scaling, ablation, forced routing.

An edit is a pytree. Its arrays are inputs of the compiled forward pass, so that new values of the
same shape compile nothing. Edits are applied in the order given, each to what those before it
left.
"""

from grokkit.edits.routing import (
    ForbidExperts,
    ForceExperts,
    RequireExperts,
    RouterTemperature,
    SwapExperts,
)
from grokkit.edits.selection import Where
from grokkit.edits.values import Add, Apply, Edit, Replace, Scale, resolve, site_shape

__all__ = [
    "Add",
    "Apply",
    "Edit",
    "ForbidExperts",
    "ForceExperts",
    "Replace",
    "RequireExperts",
    "RouterTemperature",
    "Scale",
    "SwapExperts",
    "Where",
    "resolve",
    "site_shape",
]
