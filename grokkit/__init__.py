"""grokkit: Grok-1 as an Equinox pytree, to sample from, look inside and change."""

from grokkit.config import GROK_1, NANO, GrokConfig
from grokkit.errors import GrokkitError
from grokkit.language_model import LanguageModel, load
from grokkit.sharding import make_mesh, virtual_devices
from grokkit.taps import SITES, Capture

__version__ = "0.1.0"

__all__ = [
    "GROK_1",
    "NANO",
    "SITES",
    "Capture",
    "GrokConfig",
    "GrokkitError",
    "LanguageModel",
    "load",
    "make_mesh",
    "virtual_devices",
]
