"""The forward pass nano is trained with: plain float arrays, built for speed on a few CPU cores.

It computes what `grokkit.model` computes (a test holds that), but for one thing: an expert takes
at most a fixed number of tokens, its capacity, and tokens beyond that are dropped from it. The
layers are a Python list rather than stacked, because slicing stacked parameters costs a copy of
them in every backward pass.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from grokkit.config import GrokConfig
from grokkit.zoo.nano.loss import weighted_loss

Params = dict[str, Any]

# Both of these are for induction: without them no head learns to look at the token before.
COMMON_PART = 0.5  # the part all embeddings share at the start, over the size of the rest
LOOK_BACK_SCORE = 20.0  # the score one token back of the head that starts off looking there

QUERY_BLOCK = 64  # queries that share one span of keys; a block skips the keys after its last query


def init_params(config: GrokConfig, key: PRNGKeyArray) -> Params:
    """Random parameters, float32.

    Args:
        config: sizes.
        key: a JAX random key.

    Returns:
        `embedding` [vocab, d_model], `final_norm` [d_model] and `layers`, a list of dictionaries.
        Matrices start at standard deviation 1/sqrt(rows); the norms after attention and after
        the experts start at .3, so that the residual stream keeps most of the embedding.
    """
    d, f, e = config.d_model, config.d_ff, config.n_experts
    q_width, kv_width = config.n_heads * config.d_head, config.n_kv_heads * config.d_head
    shapes = {
        "query": (d, q_width),
        "key": (d, kv_width),
        "value": (d, kv_width),
        "out": (q_width, d),
        "router": (d, e),
        "expert_gate": (e, d, f),
        "expert_value": (e, d, f),
        "expert_out": (e, f, d),
    }

    def matrix(key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
        return jax.random.normal(key, shape) / math.sqrt(shape[-2])

    layers = []
    for layer_key in jax.random.split(key, config.n_layers + 1)[1:]:
        keys = jax.random.split(layer_key, len(shapes))
        layer = {
            name: matrix(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=False)
        }
        layer["router"] = layer["router"] * 0.1
        for name, start in [("attn_norm", 1.0), ("attn_out_norm", 0.3),
                            ("moe_norm", 1.0), ("moe_out_norm", 0.3)]:  # fmt: skip
            layer[name] = jnp.full((d,), start)
        layers.append(layer)
    _look_back(layers[0], config)
    embedding = jax.random.normal(jax.random.split(key)[0], (config.vocab_size, d)) / math.sqrt(d)
    # A direction that all tokens share stands in for the biases that queries and keys do not
    # have: without one, "look at the token before" cannot be said. It moves all logits alike.
    embedding = embedding + COMMON_PART / math.sqrt(d)
    return {"embedding": embedding, "final_norm": jnp.ones((d,)), "layers": layers}


def _look_back(layer: Params, config: GrokConfig) -> None:
    """Start the first key/value head of a layer, and its queries, off looking one token back.

    Queries and keys read only the part that all embeddings share, so the score depends on the
    distance alone: a sum of cos(frequency * (distance - 1)) over the fastest three frequencies,
    which has no second peak within a few hundred tokens.
    """
    half = config.d_head // 2
    fastest = np.arange(half) < 3
    frequency = config.rope_base ** (-np.arange(half) / half)
    key = np.concatenate([1.0 * fastest, 0.0 * fastest])
    query = np.concatenate([np.cos(frequency) * fastest, -np.sin(frequency) * fastest])
    # What a normalised embedding's shared part adds up to over d_model entries.
    shared = config.d_model * COMMON_PART / math.sqrt(1 + COMMON_PART**2)
    size = math.sqrt(LOOK_BACK_SCORE / config.attention_multiplier / fastest.sum()) / shared
    groups = config.n_heads // config.n_kv_heads
    for name, vector in (("query", np.tile(query, groups)), ("key", key)):
        columns = jnp.asarray(np.tile(size * vector, (config.d_model, 1)), jnp.float32)
        layer[name] = layer[name].at[:, : len(vector)].set(columns)


def rms_norm(x: Float[Array, "*n d"], scale: Float[Array, "d"], eps: float) -> Float[Array, "*n d"]:
    """x over its root mean square, times a scale."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def _rotate(x: Float[Array, "b t *h d"], base: float) -> Float[Array, "b t *h d"]:
    """Rotary embedding on split halves."""
    t, half = x.shape[1], x.shape[-1] // 2
    angle = np.arange(t)[:, None] / base ** (np.arange(half) / half)
    angle = angle.reshape(t, *(1,) * (x.ndim - 3), half).astype(np.float32)
    a, b = x[..., :half], x[..., half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _batched_dot(a: Array, b: Array, contract_a: int, contract_b: int) -> Array:
    """Matrix product over the given axes of [batch, ., .] arrays, laid out as a CPU likes it."""
    return jax.lax.dot_general(a, b, (((contract_a,), (contract_b,)), ((0,), (0,))))


def _exponentials(q: Array, k: Array, positions: np.ndarray, config: GrokConfig):
    """exp of the soft-capped scores, 0 where hidden, and the tanh inside.

    No maximum is taken off first: the soft cap bounds a score by 30, and exp(30) is a float32.
    """
    cap = config.attention_softcap
    tanh = jnp.tanh(_batched_dot(q, k, 2, 2) * (config.attention_multiplier / cap))
    visible = np.arange(k.shape[1])[None, :] <= positions[:, None]
    return jnp.where(visible, jnp.exp(cap * tanh), 0.0), tanh


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attend(q, k, v, first_query, config):
    """Attention of a block of queries [n, group x query, d] to keys and values [n, key, d]."""
    return _attend_forward(q, k, v, first_query, config)[0]


def _query_positions(q: Array, first_query: int, config: GrokConfig) -> np.ndarray:
    groups = config.n_heads // config.n_kv_heads
    return first_query + np.tile(np.arange(q.shape[1] // groups), groups)


def _attend_forward(q, k, v, first_query, config):
    exp, tanh = _exponentials(q, k, _query_positions(q, first_query, config), config)
    norm = jnp.sum(exp, axis=-1, keepdims=True)
    out = _batched_dot(exp, v, 2, 1) / norm
    return out, (q, k, v, exp, tanh, norm, out)


def _attend_backward(first_query, config, residuals, grad):
    q, k, v, exp, tanh, norm, out = residuals
    scaled = grad / norm
    # Products with the small matrix first: XLA transposes its first operand, so let it be small.
    v_grad = _batched_dot(scaled, exp, 1, 1).swapaxes(1, 2)
    exp_grad = _batched_dot(scaled, v, 2, 2) - jnp.sum(scaled * out, axis=-1, keepdims=True)
    score_grad = exp * exp_grad * (1.0 - tanh * tanh) * config.attention_multiplier
    q_grad = _batched_dot(score_grad, k, 2, 1)
    k_grad = _batched_dot(q, score_grad, 1, 1).swapaxes(1, 2)
    return q_grad, k_grad, v_grad


_attend.defvjp(_attend_forward, _attend_backward)


def attention(layer: Params, x: Float[Array, "b t d"], config: GrokConfig) -> Float[Array, "b t d"]:
    """Grouped-query causal attention with soft-capped scores, in blocks of queries.

    Args:
        layer: one layer's parameters.
        x: normalised residual stream.
        config: sizes.
    """
    b, t, _ = x.shape
    kv, groups, d_head = config.n_kv_heads, config.n_heads // config.n_kv_heads, config.d_head
    q = _rotate((x @ layer["query"]).reshape(b, t, kv, groups, d_head), config.rope_base)
    k = _rotate((x @ layer["key"]).reshape(b, t, kv, d_head), config.rope_base)
    v = (x @ layer["value"]).reshape(b, t, kv, d_head)
    q = q.transpose(0, 2, 3, 1, 4).reshape(b * kv, groups, t, d_head)
    k, v = (a.transpose(0, 2, 1, 3).reshape(b * kv, t, d_head) for a in (k, v))
    outs = []
    for start in range(0, t, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, t)
        block = q[:, :, start:end].reshape(b * kv, groups * (end - start), d_head)
        out: Array = _attend(block, k[:, :end], v[:, :end], start, config)
        outs.append(out.reshape(b, kv, groups, end - start, d_head))
    out = jnp.concatenate(outs, axis=3).transpose(0, 3, 1, 2, 4)
    return out.reshape(b, t, -1) @ layer["out"]


# Sending tokens to experts and back. Forward and backward are all gathers of rows: a scatter of
# rows, which automatic differentiation would write, is several times slower on a CPU.


@jax.custom_vjp
def _dispatch(x, token_of_slot, slots, kept):
    """Rows of x in the order of the experts' slots: [slot, d]. Empty slots hold token 0."""
    return x[token_of_slot]


def _dispatch_forward(x, token_of_slot, slots, kept):
    return x[token_of_slot], (slots, kept)


def _dispatch_backward(residuals, grad):
    slots, kept = residuals
    x_grad = sum(grad[slots[:, c]] * kept[:, c, None] for c in range(slots.shape[1]))
    return x_grad, None, None, None


_dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def _combine(y, gates, token_of_slot, choice_of_slot, slots):
    """Sum over a token's choices of gate times the expert's output: [token, d]."""
    return sum(y[slots[:, c]] * gates[:, c, None] for c in range(slots.shape[1]))


def _combine_forward(y, gates, token_of_slot, choice_of_slot, slots):
    out = _combine(y, gates, token_of_slot, choice_of_slot, slots)
    return out, (y, gates, token_of_slot, choice_of_slot, slots)


def _combine_backward(residuals, grad):
    y, gates, token_of_slot, choice_of_slot, slots = residuals
    # choice_of_slot is -1 for an empty slot, whose gradient is nothing.
    gate_of_slot = jnp.where(choice_of_slot >= 0, gates.reshape(-1)[choice_of_slot], 0.0)
    y_grad = grad[token_of_slot] * gate_of_slot[:, None]
    gates_grad = jnp.stack(
        [jnp.sum(grad * y[slots[:, c]], axis=-1) for c in range(slots.shape[1])], axis=-1
    )
    return y_grad, gates_grad, None, None, None


_combine.defvjp(_combine_forward, _combine_backward)


def _top_choices(probs: Float[Array, "n e"], count: int) -> list[Int[Array, "n"]]:
    """The `count` most probable experts of each token, best first."""
    choices, left = [], probs
    for _ in range(count):
        best = jnp.argmax(left, axis=-1)
        choices.append(best)
        left = jnp.where(jnp.arange(probs.shape[-1]) == best[:, None], -1.0, left)
    return choices


def experts(
    layer: Params, x: Float[Array, "n d"], config: GrokConfig, capacity: int
) -> tuple[Float[Array, "n d"], Float[Array, ""], Float[Array, "e"], Float[Array, ""]]:
    """The mixture of experts.

    Args:
        layer: one layer's parameters.
        x: normalised residual stream of all tokens.
        config: sizes.
        capacity: tokens an expert takes at most; x.shape[0] drops none.

    Returns:
        The output; the load-balancing loss (1 when the load is even; Shazeer et al. 2017, in the
        form of Fedus et al. 2021); each expert's share of the choices; the share of choices that
        were dropped.
    """
    n, e = x.shape[0], config.n_experts
    probs = jax.nn.softmax(x @ layer["router"], axis=-1)
    one_hot = [jax.nn.one_hot(c, e) for c in _top_choices(jax.lax.stop_gradient(probs), 2)]
    # First choices are placed before second ones, so these are dropped first.
    chosen = jnp.concatenate(one_hot)
    place = jnp.sum((_running_sum(chosen) - chosen) * chosen, axis=-1).astype(jnp.int32)
    expert = jnp.argmax(chosen, axis=-1).astype(jnp.int32)
    fits = place < capacity
    slot = jnp.where(fits, expert * capacity + place, 0)
    slots = slot.reshape(2, n).T
    kept = fits.reshape(2, n).T.astype(x.dtype)
    # Which token, and which entry of the gates [token, choice], fills each slot.
    entry = jnp.arange(2 * n, dtype=jnp.int32)
    target = jnp.where(fits, slot, e * capacity)
    entry_of_slot = jnp.full((e * capacity + 1,), -1, jnp.int32).at[target].set(entry)[:-1]
    filled = entry_of_slot >= 0
    token_of_slot = jnp.where(filled, entry_of_slot % n, 0)
    choice_of_slot = jnp.where(filled, token_of_slot * 2 + entry_of_slot // n, -1)
    gates = jnp.stack([jnp.sum(probs * hot, axis=-1) for hot in one_hot], axis=-1) * kept

    rows = _dispatch(x, token_of_slot, slots, kept).reshape(e, capacity, -1)
    gate = _batched_dot(rows, layer["expert_gate"], 2, 1)
    value = _batched_dot(rows, layer["expert_value"], 2, 1)
    hidden = jax.nn.gelu(gate, approximate=True) * value
    y = _batched_dot(hidden, layer["expert_out"], 2, 1).reshape(e * capacity, -1)
    out = _combine(y, gates, token_of_slot, choice_of_slot, slots)

    load = jnp.mean(chosen, axis=0)
    balance = e * jnp.sum(load * jnp.mean(probs, axis=0))
    return out, balance, load, 1.0 - jnp.mean(kept)


def _running_sum(x: Float[Array, "n e"], block: int = 64) -> Float[Array, "n e"]:
    """Cumulative sum along the first axis, by blocks: XLA's own is slow on a CPU."""
    n, e = x.shape
    if n % block:
        return jnp.cumsum(x, axis=0)
    blocks = x.reshape(n // block, block, e)
    within = jnp.einsum("ij,bje->bie", np.tri(block, dtype=np.float32), blocks)
    totals = within[:, -1]
    before = jnp.cumsum(totals, axis=0) - totals
    return (within + before[:, None]).reshape(n, e)


def hidden_states(
    params: Params,
    tokens: Int[Array, "b t"],
    config: GrokConfig,
    capacity_factor: float | None,
) -> tuple[Float[Array, "b t d"], dict[str, Array]]:
    """The residual stream after the final norm.

    Args:
        params: as `init_params` makes them.
        tokens: token ids without padding (the pad token's keys are not masked here).
        config: sizes.
        capacity_factor: capacity of an expert over its even share; None drops nothing.

    Returns:
        The states, and `balance` [layer], `load` [layer, expert], `dropped` [layer].
    """
    b, t = tokens.shape
    n, eps = b * t, config.norm_eps
    even_share = n * config.n_experts_per_token / config.n_experts
    capacity = n if capacity_factor is None else min(n, math.ceil(capacity_factor * even_share))
    h = params["embedding"][tokens] * config.embedding_multiplier
    reports = []
    for layer in params["layers"]:
        z = attention(layer, rms_norm(h, layer["attn_norm"], eps), config)
        h = h + rms_norm(z, layer["attn_out_norm"], eps)
        x = rms_norm(h, layer["moe_norm"], eps).reshape(n, -1)
        y, *report = experts(layer, x, config, capacity)
        h = h + rms_norm(y.reshape(h.shape), layer["moe_out_norm"], eps)
        reports.append(report)
    balance, load, dropped = (jnp.stack(column) for column in zip(*reports, strict=False))
    states = rms_norm(h, params["final_norm"], eps)
    return states, {"balance": balance, "load": load, "dropped": dropped}


def training_loss(
    params: Params,
    windows: Int[Array, "b window"],
    weights: Float[Array, "b t"],
    config: GrokConfig,
    capacity_factor: float,
    balance_weight: float,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Cross-entropy of the next token plus the load-balancing loss.

    Args:
        params: as `init_params` makes them.
        windows: token ids, one more than is read.
        weights: weight of the prediction at each position.
        config: sizes.
        capacity_factor: see `hidden_states`.
        balance_weight: weight of each layer's balancing loss.

    Returns:
        The loss in nats, and a report: `loss` without balancing, `load`, `dropped`.
    """
    states, report = hidden_states(params, windows[:, :-1], config, capacity_factor)
    loss: Array = weighted_loss(
        states.reshape(-1, states.shape[-1]),
        params["embedding"],
        windows[:, 1:].reshape(-1),
        weights.reshape(-1),
        config.output_multiplier,
    )
    report["loss"] = loss
    return loss + balance_weight * jnp.sum(report["balance"] - 1.0), report


def token_losses(
    params: Params, windows: Int[Array, "b window"], config: GrokConfig
) -> Float[Array, "b t"]:
    """Cross-entropy of each next token in nats, no token dropped."""
    states, _ = hidden_states(params, windows[:, :-1], config, None)
    logits = (states @ params["embedding"].T) * config.output_multiplier
    picked = jnp.take_along_axis(logits, windows[:, 1:, None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked
