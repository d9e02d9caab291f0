"""A model large enough to measure, and its programs: `mid`, 1.3 billion parameters of 8 bits.

Weights are random: speed does not depend on them, as long as the routing is not all to one expert.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import grokkit
from grokkit.kv_cache import KVCache
from grokkit.model import Grok, param_specs
from grokkit.quant import QuantizedArray, dequantize, index
from grokkit.sharding import ParamSpec, is_spec

MID = grokkit.GrokConfig(
    vocab_size=8192, d_model=1536, n_layers=4, n_heads=16, n_kv_heads=8, d_head=96, d_ff=8192,
    context_length=512, attention_multiplier=96**-0.5, embedding_multiplier=1536**0.5,
)  # fmt: skip
PROMPT = 256


def entries_a_token(config: grokkit.GrokConfig) -> int:
    """Entries of the 8-bit matrices that a token meets; each is a byte."""
    heads = (config.n_heads + config.n_kv_heads) * config.d_head
    experts = 3 * config.n_experts_per_token * config.d_ff
    return config.n_layers * config.d_model * (2 * heads + experts)


def random_model(config: grokkit.GrokConfig, mesh: Any, dtype: str) -> Grok:
    """The same weights on any mesh."""
    random = np.random.default_rng(0)

    def leaf(spec: ParamSpec) -> jax.Array:
        if spec.dtype == jnp.int8:
            values = random.integers(-127, 128, spec.shape, np.int8)
        elif spec.dtype == jnp.bfloat16:
            # int8 values have a standard deviation of 73; the matrix's is to be k ** -0.5.
            values = (random.uniform(0.5, 1.5, spec.shape) / 73 / 40).astype(jnp.bfloat16)
        elif spec.init_scale is None:
            values = np.ones(spec.shape, np.float32)
        else:
            values = random.normal(0, spec.init_scale, spec.shape).astype(np.float32)
        return jax.device_put(values, spec.sharding(mesh))

    return jax.tree.map(leaf, param_specs(config, dtype), is_leaf=is_spec)


def prompt(config: grokkit.GrokConfig, length: int = PROMPT, batch: int = 1) -> np.ndarray:
    """Random tokens, none of them a special one."""
    return np.random.default_rng(1).integers(3, config.vocab_size, (batch, length), np.int32)


@functools.partial(jax.jit, donate_argnames="cache")
def prefill(model: Grok, tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
    """The most probable next token, and the cache with the prompt in it."""
    out = model(tokens, cache=cache, last_only=True)
    return jnp.argmax(out.logits[:, -1], axis=-1).astype(jnp.int32)[:, None], out.cache


@functools.partial(jax.jit, donate_argnames="cache")
def decode(model: Grok, tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
    """The bare step: one token in, the most probable next one out."""
    out = model(tokens, cache=cache)
    return jnp.argmax(out.logits[:, -1], axis=-1).astype(jnp.int32)[:, None], out.cache


def use_the_plain_form() -> None:
    """Multiply as the original does from here on: matrices dequantised whole, and every expert
    run on every token."""

    def plain_matmul(x: Any, w: Any, dtype: Any) -> jax.Array:
        return x.astype(dtype) @ dequantize(w.read(), dtype)

    def every_expert(x: Any, chosen: Any, gate: Any, value: Any, out: Any, dtype: Any) -> jax.Array:
        def one(_: None, expert: jax.Array) -> tuple[None, jax.Array]:
            hidden = jax.nn.gelu(plain_matmul(x, index(gate, expert), dtype), approximate=True)
            hidden = hidden * plain_matmul(x, index(value, expert), dtype)
            return None, plain_matmul(hidden, index(out, expert), dtype)

        outputs = jax.lax.scan(one, None, jnp.arange(gate.shape[0]))[1]
        picked = jnp.take_along_axis(outputs, chosen.T[:, :, None], axis=0)
        return jnp.moveaxis(picked, 0, 1).astype(jnp.float32)

    import grokkit.layers.linear
    import grokkit.layers.moe

    grokkit.layers.linear.matmul = plain_matmul
    grokkit.layers.moe.expert_outputs = every_expert


def export(path: str) -> None:
    """Write mid's weights for another program: arrays by llama.cpp's names, without a pickle."""
    model = random_model(MID, grokkit.make_mesh(1, 1), "float32")
    attention, moe = model.blocks.attention, model.blocks.moe
    names = {
        "attn_q": attention.query, "attn_k": attention.key, "attn_v": attention.value,
        "attn_output": attention.out, "ffn_gate_exps": moe.gate, "ffn_up_exps": moe.value,
        "ffn_down_exps": moe.out, "ffn_gate_inp": moe.router,
        "attn_norm": model.blocks.attn_norm.scale,
        "attn_output_norm": model.blocks.attn_out_norm.scale,
        "ffn_norm": model.blocks.moe_norm.scale,
        "layer_output_norm": model.blocks.moe_out_norm.scale,
    }  # fmt: skip
    arrays = {"token_embd": model.embedding.weight, "output_norm": model.final_norm.scale}
    for name, leaf in names.items():
        if isinstance(leaf, QuantizedArray):
            arrays |= {f"{name}.weight": leaf.weight}
            arrays |= {f"{name}.scales": leaf.scales.astype(jnp.float32)}
        else:
            arrays[name] = jnp.swapaxes(leaf, -1, -2) if name == "ffn_gate_inp" else leaf
    np.savez(path, **{name: np.asarray(a) for name, a in arrays.items()})
