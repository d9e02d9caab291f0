"""What several test modules need: how far apart two arrays are, a model's weights as the
reference takes them, and a compiled forward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import reference

from grokkit.abstract_model import Output
from grokkit.config import GrokConfig
from grokkit.model import Grok, param_specs, place
from grokkit.quant import QuantizedArray
from grokkit.sharding import ParamSpec
from grokkit.taps import Capture

NAMES = {
    "moe/linear/w": lambda b: b.moe.gate,
    "moe/linear_1/w": lambda b: b.moe.out,
    "moe/linear_v/w": lambda b: b.moe.value,
    "multi_head_attention/key/w": lambda b: b.attention.key,
    "multi_head_attention/linear/w": lambda b: b.attention.out,
    "multi_head_attention/query/w": lambda b: b.attention.query,
    "multi_head_attention/value/w": lambda b: b.attention.value,
    "rms_norm/scale": lambda b: b.attn_norm.scale,
    "rms_norm_1/scale": lambda b: b.attn_out_norm.scale,
    "rms_norm_2/scale": lambda b: b.moe_norm.scale,
    "rms_norm_3/scale": lambda b: b.moe_out_norm.scale,
    "router/w": lambda b: b.moe.router,
}


def relative_error(found, expected) -> float:
    """L2 distance over the L2 norm of what was expected; infinite entries must coincide."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(found[~finite], expected[~finite])
    error = np.linalg.norm(found[finite] - expected[finite])
    return float(error / np.linalg.norm(expected[finite]))


def float64(w) -> np.ndarray:
    """A matrix as the reference takes it, dequantised if it is quantised."""
    if isinstance(w, QuantizedArray):
        weight = np.swapaxes(np.asarray(w.weight), -1, -2)  # held [n, k]; officially [k, n]
        return reference.dequantize(weight, np.asarray(w.scales))
    return np.asarray(w, np.float64)


def reference_weights(model: Grok) -> dict[str, np.ndarray]:
    """A model's weights under the original's names."""
    model = jax.tree.map(np.asarray, model)
    weights = {
        "language_model/in_out_embed/embeddings": float64(model.embedding.weight),
        "language_model/rms_norm/scale": float64(model.final_norm.scale),
    }
    for name, of in NAMES.items():
        for layer, w in enumerate(float64(of(model.blocks))):
            weights[f"transformer/decoder_layer_{layer}/{name}"] = w
    return weights


@functools.partial(jax.jit, static_argnames=("captures",))
def _forward(model, tokens, cache, lengths, captures):
    return model(tokens, cache=cache, lengths=lengths, captures=captures)


def random_model(config: GrokConfig, seed: int, mesh=None) -> Grok:
    """A float32 model with random weights, on one device or laid out over `mesh`.

    Every scale and every norm is random too, so that none can be left out unnoticed.
    """
    random = np.random.default_rng(seed)

    def leaf(spec):
        if isinstance(spec, QuantizedArray):
            weight, scales = spec.weight, spec.scales
            size = random.uniform(0.5, 1.5, scales.shape) * weight.init_scale / 73
            values = random.integers(-127, 128, spec.shape).swapaxes(-1, -2)
            return QuantizedArray(jnp.asarray(values, jnp.int8), jnp.asarray(size, jnp.bfloat16))
        if spec.init_scale is None:
            return jnp.asarray(random.normal(1, 0.3, spec.shape), spec.dtype)
        return jnp.asarray(random.normal(0, spec.init_scale, spec.shape), spec.dtype)

    def is_leaf(x):
        return isinstance(x, ParamSpec | QuantizedArray)

    model = jax.tree.map(leaf, param_specs(config, jnp.float32), is_leaf=is_leaf)
    return model if mesh is None else place(model, mesh)


def forward(model: Grok, mesh, tokens, captures=(), cache=None, lengths=None) -> Output:
    """A compiled forward pass; captures by site name or as `Capture`s."""
    captures = tuple(Capture(c) if isinstance(c, str) else c for c in captures)
    with jax.set_mesh(mesh):
        return _forward(model, np.asarray(tokens, np.int32), cache, lengths, captures)
