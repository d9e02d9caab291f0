"""Grok-1's forward pass by its definition, in float64 numpy: what the tests judge grokkit by.

Written for reading, not for speed, and apart from the code that it judges: nothing of grokkit is
imported. Weights are a dict from the original's parameter names (`transformer/decoder_layer_3/
router/w`) to dequantised arrays. A configuration is anything with `GrokConfig`'s fields.

Axes in the comments: B batch, T position, D d_model, H head, K key/value head, C d_head,
E expert, N choice, F d_ff, V vocab.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np


def softmax(x):
    """Over the last axis. A row of -inf alone, where nothing may be chosen, gives zeros."""
    largest = np.max(x, axis=-1, keepdims=True)
    exp = np.exp(x - np.where(np.isinf(largest), 0, largest))
    total = exp.sum(axis=-1, keepdims=True)
    return exp / np.where(total == 0, 1, total)


def gelu_tanh(x):
    """Hendrycks and Gimpel's tanh approximation of GELU, arXiv 1606.08415."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def rms_norm(x, scale, eps):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * scale


def dequantize(weight, scales):
    """One scale for each group of rows (along the last axis but one) and each column."""
    *lead, rows, columns = weight.shape
    groups = scales.shape[-2]
    grouped = weight.astype(np.float64).reshape(*lead, groups, rows // groups, columns)
    return (grouped * scales.astype(np.float64)[..., :, None, :]).reshape(weight.shape)


def rotate(x, positions, base):
    """Rotary embedding of [B, T, heads, C]: (first, second) halves as a complex number."""
    half = x.shape[-1] // 2
    wavelength_index = np.arange(half) * 2 / x.shape[-1]
    angle = positions[:, :, None, None] / base**wavelength_index
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def attention(x, weights, layer, config, hidden, sites):
    """[B, T, D] -> [B, T, D], before the closing norm. `hidden` [B, T]: keys that none may see."""
    batch, n, _ = x.shape

    def project(name):
        w = weights[f"{layer}/multi_head_attention/{name}/w"]
        return (x @ w).reshape(batch, n, -1, config.d_head)

    q, k, v = project("query"), project("key"), project("value")
    sites |= {"q": q, "k": k, "v": v}
    positions = np.broadcast_to(np.arange(n), (batch, n))
    q = rotate(q, positions, config.rope_base)
    k = rotate(k, positions, config.rope_base)
    scores = np.empty((batch, config.n_heads, n, n))
    for head in range(config.n_heads):
        kv_head = head // (config.n_heads // config.n_kv_heads)
        scores[:, head] = q[:, :, head] @ k[:, :, kv_head].swapaxes(1, 2)
    scores *= config.attention_multiplier
    scores = config.attention_softcap * np.tanh(scores / config.attention_softcap)
    causal = np.arange(n)[None, :] <= np.arange(n)[:, None]
    allowed = causal[None, None] & ~hidden[:, None, None, :]
    scores = np.where(allowed, scores, -np.inf)
    pattern = softmax(scores)
    z = np.empty((batch, n, config.n_heads, config.d_head))
    for head in range(config.n_heads):
        kv_head = head // (config.n_heads // config.n_kv_heads)
        z[:, :, head] = pattern[:, head] @ v[:, :, kv_head]
    out = z.reshape(batch, n, -1) @ weights[f"{layer}/multi_head_attention/linear/w"]
    sites |= {"attn_scores": scores, "pattern": pattern, "z": z, "attn_out_pre_norm": out}
    return out


def route(x, router, n_chosen):
    """[..., D] -> logits, probabilities [..., E]; the chosen experts and their weights [..., N]."""
    logits = x @ router
    probs = softmax(logits)
    indices = np.argsort(-probs, axis=-1, kind="stable")[..., :n_chosen]
    return logits, probs, indices, np.take_along_axis(probs, indices, axis=-1)


def expert(x, gate, value, out):
    return (gelu_tanh(x @ gate) * (x @ value)) @ out


def expert_outputs(x, indices, gate, value, out):
    """Each row's chosen experts' outputs: [R, D], [R, N] -> [R, N, D]."""
    result = np.empty((*indices.shape, out.shape[-1]))
    for e in range(gate.shape[0]):
        rows, choices = np.nonzero(indices == e)
        result[rows, choices] = expert(x[rows], gate[e], value[e], out[e])
    return result


def moe(x, weights, layer, config, sites):
    """[B, T, D] -> [B, T, D], before the closing norm."""
    logits, probs, indices, chosen = route(
        x, weights[f"{layer}/router/w"], config.n_experts_per_token
    )
    outputs = expert_outputs(
        x.reshape(-1, x.shape[-1]),
        indices.reshape(-1, indices.shape[-1]),
        weights[f"{layer}/moe/linear/w"],
        weights[f"{layer}/moe/linear_v/w"],
        weights[f"{layer}/moe/linear_1/w"],
    ).reshape(*indices.shape, x.shape[-1])
    y = (outputs * chosen[..., None]).sum(axis=2)
    sites |= {"router_logits": logits, "router_probs": probs, "expert_indices": indices}
    sites |= {"expert_weights": chosen, "expert_outputs": outputs, "moe_out_pre_norm": y}
    return y


def decoder_layer(x, weights, layer, config, hidden):
    """[B, T, D] -> [B, T, D], and every activation of the layer."""

    def norm(x, which):
        return rms_norm(x, weights[f"{layer}/{which}/scale"], config.norm_eps)

    sites = {"resid_pre": x, "attn_in": norm(x, "rms_norm")}
    attn_out_pre_norm = attention(sites["attn_in"], weights, layer, config, hidden, sites)
    sites["attn_out"] = norm(attn_out_pre_norm, "rms_norm_1")
    x = x + sites["attn_out"]
    sites |= {"resid_mid": x, "moe_in": norm(x, "rms_norm_2")}
    moe_out_pre_norm = moe(sites["moe_in"], weights, layer, config, sites)
    sites["moe_out"] = norm(moe_out_pre_norm, "rms_norm_3")
    x = x + sites["moe_out"]
    sites["resid_post"] = x
    return x, sites


def forward(weights, config, tokens, lengths=None) -> dict[str, np.ndarray]:
    """Every activation, by site; those of layers with a leading layer axis.

    `tokens` [B, T]; `lengths` [B]: how many of a row's tokens are real, the rest being hidden
    from all queries, as pad tokens are.
    """
    tokens = np.asarray(tokens)
    hidden = tokens == config.pad_token
    if lengths is not None:
        hidden = hidden | (np.arange(tokens.shape[1]) >= np.asarray(lengths)[:, None])
    embedding = weights["language_model/in_out_embed/embeddings"]
    x = embedding[tokens] * config.embedding_multiplier
    found: dict[str, Any] = {"embed": x}
    layers = []
    for i in range(config.n_layers):
        x, sites = decoder_layer(x, weights, f"transformer/decoder_layer_{i}", config, hidden)
        layers.append(sites)
    found |= {name: np.stack([sites[name] for sites in layers]) for name in layers[0]}
    found["final_norm"] = rms_norm(x, weights["language_model/rms_norm/scale"], config.norm_eps)
    found["logits"] = found["final_norm"] @ embedding.T * config.output_multiplier
    return found


def greedy(weights, config, prompt, n) -> tuple[list[int], list[float]]:
    """`n` tokens after `prompt`, each the argmax of a whole forward pass; and how clearly each
    won: the gap between the two best logits."""
    tokens, gaps = list(prompt), []
    for _ in range(n):
        logits = forward(weights, config, [tokens])["logits"][0, -1]
        second, first = np.argsort(logits)[-2:]
        gaps.append(float(logits[first] - logits[second]))
        tokens.append(int(first))
    return tokens[len(prompt) :], gaps


def nucleus(logits, top_p) -> np.ndarray:
    """Which tokens of one row may be drawn: the most probable, until they reach `top_p`."""
    probs = softmax(logits)
    kept, total = np.zeros(probs.shape, bool), 0.0
    for token in sorted(range(len(probs)), key=lambda t: (-probs[t], t)):
        if total >= top_p:
            break
        kept[token] = True
        total += probs[token]
    return kept


class _Quantized:
    weight: np.ndarray
    scales: np.ndarray


class _Unpickler(pickle.Unpickler):
    """Reads the project's own golden files; any other global than the format's is refused."""

    def find_class(self, module, name):
        allowed = {
            "__main__.QuantizedWeight8bit": lambda: _Quantized,
            "numpy.core.multiarray._reconstruct": lambda: np.ndarray.__reduce__(np.zeros(0))[0],
            "numpy._core.multiarray._reconstruct": lambda: np.ndarray.__reduce__(np.zeros(0))[0],
            "numpy.ndarray": lambda: np.ndarray,
            "numpy.dtype": lambda: np.dtype,
            "ml_dtypes.bfloat16": lambda: __import__("ml_dtypes").bfloat16,
        }
        return allowed[f"{module}.{name}"]()


def read_checkpoint(directory: Path, names: list[str]) -> dict[str, np.ndarray]:
    """The weights of a checkpoint directory whose files hold the parameters `names`, in order."""
    weights = {}
    for i, name in enumerate(names):
        with open(directory / f"tensor{i:05d}_000", "rb") as file:
            value = _Unpickler(file).load()
        if isinstance(value, _Quantized):
            weights[name] = dequantize(value.weight, value.scales)
        else:
            weights[name] = np.asarray(value, np.float64)
    return weights
