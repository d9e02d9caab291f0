"""grokkit: Grok-1 as an Equinox pytree, to sample from, look inside and change."""

from grokkit.activation_cache import ActivationCache
from grokkit.batch_run import batch
from grokkit.checkpoint import convert, download
from grokkit.config import GROK_1, NANO, GrokConfig
from grokkit.edits import (
    Add,
    Apply,
    ForbidExperts,
    ForceExperts,
    Replace,
    RequireExperts,
    RouterTemperature,
    Scale,
    SwapExperts,
)
from grokkit.errors import GrokkitError
from grokkit.language_model import LanguageModel
from grokkit.loading import load
from grokkit.planning import plan
from grokkit.processes import to_host
from grokkit.sharding import make_mesh, virtual_devices
from grokkit.stored_captures import open_captures
from grokkit.taps import SITES, Capture

__version__ = "0.1.0"

__all__ = [
    "GROK_1",
    "NANO",
    "SITES",
    "ActivationCache",
    "Add",
    "Apply",
    "Capture",
    "ForbidExperts",
    "ForceExperts",
    "GrokConfig",
    "GrokkitError",
    "LanguageModel",
    "Replace",
    "RequireExperts",
    "RouterTemperature",
    "Scale",
    "SwapExperts",
    "batch",
    "convert",
    "download",
    "load",
    "make_mesh",
    "open_captures",
    "plan",
    "to_host",
    "virtual_devices",
]
