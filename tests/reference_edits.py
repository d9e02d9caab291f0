"""The forward pass in float64 with a function called on every activation, by definition.

`change(site, layer, value)` returns what the activation becomes; built on the parts of
`reference`. One batch of whole sequences, no pads.
"""

import numpy as np
import reference as ref


def forward(weights, config, tokens, change):
    """Logits [B, T, V] of the changed pass, and every activation as the changes left it."""
    seen = {}

    def tap(site, layer, value):
        value = change(site, layer, value)
        seen.setdefault(site, []).append(value)
        return value

    embedding = weights["language_model/in_out_embed/embeddings"]
    x = tap("embed", None, embedding[np.asarray(tokens)] * config.embedding_multiplier)
    for layer in range(config.n_layers):
        x = _layer(x, weights, layer, config, tap)
    final = ref.rms_norm(x, weights["language_model/rms_norm/scale"], config.norm_eps)
    final = tap("final_norm", None, final)
    logits = tap("logits", None, final @ embedding.T * config.output_multiplier)
    return logits, seen


def _layer(x, weights, layer, config, tap):
    prefix = f"transformer/decoder_layer_{layer}"

    def norm(x, name):
        return ref.rms_norm(x, weights[f"{prefix}/{name}/scale"], config.norm_eps)

    def put(site, value):
        return tap(site, layer, value)

    x = put("resid_pre", x)
    attended = _attention(put("attn_in", norm(x, "rms_norm")), weights, prefix, config, put)
    x = put("resid_mid", x + put("attn_out", norm(attended, "rms_norm_1")))
    mixed = _moe(put("moe_in", norm(x, "rms_norm_2")), weights, prefix, config, put)
    return put("resid_post", x + put("moe_out", norm(mixed, "rms_norm_3")))


def _attention(x, weights, prefix, config, put):
    batch, n, _ = x.shape
    w = {name: weights[f"{prefix}/multi_head_attention/{name}/w"]
         for name in ("query", "key", "value", "linear")}  # fmt: skip
    q = put("q", (x @ w["query"]).reshape(batch, n, -1, config.d_head))
    k = put("k", (x @ w["key"]).reshape(batch, n, -1, config.d_head))
    v = put("v", (x @ w["value"]).reshape(batch, n, -1, config.d_head))
    positions = np.broadcast_to(np.arange(n), (batch, n))
    group = config.n_heads // config.n_kv_heads
    q = ref.rotate(q, positions, config.rope_base)
    k = np.repeat(ref.rotate(k, positions, config.rope_base), group, axis=2)
    scores = np.einsum("bqhc,bkhc->bhqk", q, k) * config.attention_multiplier
    scores = config.attention_softcap * np.tanh(scores / config.attention_softcap)
    causal = np.tril(np.ones((n, n), bool))
    scores = put("attn_scores", np.where(causal, scores, -np.inf))
    pattern = put("pattern", ref.softmax(np.where(causal, scores, -np.inf)))
    z = put("z", np.einsum("bhqk,bkhc->bqhc", pattern, np.repeat(v, group, axis=2)))
    return put("attn_out_pre_norm", z.reshape(batch, n, -1) @ w["linear"])


def _moe(x, weights, prefix, config, put):
    logits = put("router_logits", x @ weights[f"{prefix}/router/w"])
    probs = put("router_probs", ref.softmax(logits))
    chosen = np.argsort(-probs, axis=-1, kind="stable")[..., : config.n_experts_per_token]
    chosen = put("expert_indices", chosen)
    gates = put("expert_weights", np.take_along_axis(probs, chosen, axis=-1))
    outputs = ref.expert_outputs(
        x.reshape(-1, x.shape[-1]),
        chosen.reshape(-1, chosen.shape[-1]),
        *(weights[f"{prefix}/moe/{name}/w"] for name in ("linear", "linear_v", "linear_1")),
    ).reshape(*chosen.shape, -1)
    outputs = put("expert_outputs", outputs)
    return put("moe_out_pre_norm", (outputs * gates[..., None]).sum(axis=2))
