"""The command `grokkit plan`."""

import argparse
import math
from pathlib import Path
from typing import Any

import jax

from grokkit.checkpoint import open_checkpoint
from grokkit.cli_arguments import n_bytes
from grokkit.config import GROK_1, NANO, GrokConfig
from grokkit.errors import ConfigError
from grokkit.planning import MACHINES, plan
from grokkit.sharding import virtual_devices

_PRESETS = {"grok-1": GROK_1, "nano": NANO}


def add(commands: Any, mesh_shape: Any) -> None:
    """Add the command to a parser; `mesh_shape` reads `"1,8"`."""
    command = commands.add_parser(
        "plan", help="say what running a model takes, before it is downloaded",
        description="Compile a model's programs without weights and print bytes a device, the "
        "exchanges between devices and the bytes read that a token costs, and which meshes fit on "
        "8 x 80 GB, 8 x 40 GB and 4 x 141 GB. It takes seconds and needs no accelerator.",
    )  # fmt: skip
    command.set_defaults(run=_run)
    command.add_argument(
        "--config", default="grok-1", metavar="NAME",
        help="grok-1, nano, or a config.json (default: %(default)s)",
    )  # fmt: skip
    command.add_argument(
        "--checkpoint", default=None, metavar="DIR",
        help="the sizes, and how the matrices are stored, of a checkpoint instead",
    )  # fmt: skip
    command.add_argument(
        "--mesh", type=mesh_shape, default="1,8", metavar="DATA,MODEL",
        help="devices along the batch, and devices that share each layer's weights (default: "
        "%(default)s)",
    )  # fmt: skip
    command.add_argument(
        "--context", type=int, default=None, metavar="N",
        help="tokens of each sequence, prompt and continuation (default: the model's longest)",
    )  # fmt: skip
    command.add_argument(
        "--batch", type=int, default=1, metavar="N", help="sequences at once (default: 1)"
    )
    command.add_argument(
        "--capture", action="extend", type=_sites, default=[], metavar="SITE,SITE,...",
        help="activations to keep of a prompt that fills the context, as generate_with_cache "
        "does; may be given several times",
    )  # fmt: skip
    command.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="bfloat16",
        help="what products round to and the cache holds (default: %(default)s)",
    )  # fmt: skip
    command.add_argument(
        "--device-memory", type=n_bytes, default="80GB", metavar="BYTES",
        help="what a device has, as in 80GB or 40GiB (default: %(default)s)",
    )  # fmt: skip


def _sites(text: str) -> list[str]:
    """`"pattern,resid_post"` as names."""
    return [name.strip() for name in text.split(",")]


def _config(name: str) -> GrokConfig:
    """A preset, or what a file says."""
    if name in _PRESETS:
        return _PRESETS[name]
    if not Path(name).is_file():
        raise ConfigError(
            f"--config: expected {', '.join(_PRESETS)} or a config.json, found no file {name!r}; "
            f"--checkpoint DIR takes the sizes of a checkpoint"
        )
    return GrokConfig.from_json(name)


def _run(options: argparse.Namespace) -> None:
    # Before JAX starts: no accelerator is asked for, nor are there ever too few devices.
    jax.config.update("jax_platforms", "cpu")
    virtual_devices(max(math.prod(options.mesh), *(n for n, _ in MACHINES)))
    if options.checkpoint is not None:
        config = open_checkpoint(options.checkpoint)
    else:
        config = _config(options.config)
    print(plan(
        config, options.mesh, options.context, options.batch, tuple(options.capture),
        options.dtype, options.device_memory,
    ))  # fmt: skip
