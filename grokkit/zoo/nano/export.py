"""From a run's float parameters to the shipped checkpoint: 8 bits, the official layout."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from grokkit.checkpoint.saving import save_params
from grokkit.config import GrokConfig
from grokkit.errors import GrokkitError
from grokkit.layers.attention import Attention
from grokkit.layers.block import Block
from grokkit.layers.embedding import Embedding
from grokkit.layers.moe import MoE
from grokkit.layers.rms_norm import RMSNorm
from grokkit.model import Grok
from grokkit.quant import quantize
from grokkit.runtime import files
from grokkit.zoo.nano.data import TOKENIZER_FILE
from grokkit.zoo.nano.recipe import Recipe
from grokkit.zoo.nano.train import LATEST, load_state
from grokkit.zoo.nano.training_model import Params

FLOATS_FILE = "exported-floats.npz"


def quantised_model(params: Params, config: GrokConfig) -> Grok:
    """The project's own model with these parameters, layers stacked and matrices in 8 bits.

    Args:
        params: as `training_model.init_params` makes them.
        config: sizes.
    """

    def stack(name: str) -> jnp.ndarray:
        return jnp.stack([layer[name] for layer in params["layers"]])

    def norm(scale: jnp.ndarray) -> RMSNorm:
        return RMSNorm(scale, config.norm_eps)

    groups = config.out_groups
    return Grok(
        embedding=Embedding(params["embedding"]),
        blocks=Block(
            attn_norm=norm(stack("attn_norm")),
            attention=Attention(
                query=quantize(stack("query")),
                key=quantize(stack("key")),
                value=quantize(stack("value")),
                out=quantize(stack("out"), groups),
                config=config,
            ),
            attn_out_norm=norm(stack("attn_out_norm")),
            moe_norm=norm(stack("moe_norm")),
            moe=MoE(
                router=stack("router"),
                gate=quantize(stack("expert_gate")),
                value=quantize(stack("expert_value")),
                out=quantize(stack("expert_out"), groups),
                config=config,
            ),
            moe_out_norm=norm(stack("moe_out_norm")),
        ),
        final_norm=norm(params["final_norm"]),
        config=config,
        dtype=jnp.dtype("float32"),
    )


def export(recipe: Recipe, run: Path, directory: Path) -> int:
    """Quantise a run's latest state and put it in place of a checkpoint directory.

    The float parameters it was made from are kept in the run's folder, so that the cost of
    quantisation can be measured. A card that described the old weights goes with them.

    Args:
        recipe: the run's recipe.
        run: the run's folder.
        directory: where to; replaced if it is there.

    Returns:
        The step of the exported state.

    Raises:
        GrokkitError: the run has no state, or its parameters are not finite.
    """
    if not (run / LATEST).exists():
        raise GrokkitError(f"{run / LATEST}: no such file; train first, or give --run")
    state = load_state(run / LATEST, recipe)
    model = quantised_model(state.params, recipe.config)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".export-") as scratch:
        fresh, old = Path(scratch) / directory.name, Path(scratch) / "old"
        save_params(model, recipe.config, fresh, run / TOKENIZER_FILE)
        if directory.exists():
            directory.rename(old)
        fresh.rename(directory)
        shutil.rmtree(old, ignore_errors=True)
    save_floats(run / FLOATS_FILE, state.params, state.step)
    return state.step


def save_floats(path: Path, params: Params, step: int) -> None:
    """Write float parameters, named."""
    named = {"embedding": params["embedding"], "final_norm": params["final_norm"]}
    for i, layer in enumerate(params["layers"]):
        named |= {f"layers/{i}/{name}": value for name, value in layer.items()}
    arrays: dict[str, Any] = {name: np.asarray(value) for name, value in named.items()}
    with files.replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, step=step, **arrays)


def load_floats(path: Path, config: GrokConfig) -> tuple[Params, int]:
    """Read what `save_floats` wrote: parameters and step.

    Raises:
        GrokkitError: the file is missing.
    """
    if not path.exists():
        raise GrokkitError(
            f"{path}: no float parameters here; they are written by `export` in the same run folder"
        )
    with np.load(path, allow_pickle=False) as arrays:
        layers = [
            {n.split("/")[2]: jnp.asarray(arrays[n]) for n in arrays.files if f"layers/{i}/" in n}
            for i in range(config.n_layers)
        ]
        params = {
            "embedding": jnp.asarray(arrays["embedding"]),
            "final_norm": jnp.asarray(arrays["final_norm"]),
            "layers": layers,
        }
        return params, int(arrays["step"])
