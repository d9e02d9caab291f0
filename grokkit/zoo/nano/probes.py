"""Quick measurements of a model in training, for the log. The card's figures are `evaluate`'s."""

import functools
import lzma
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece
from jaxtyping import Array, Float, Int

from grokkit.config import GrokConfig
from grokkit.zoo.nano.data import Corpus
from grokkit.zoo.nano.training_model import (
    Params,
    _rotate,
    attention,
    experts,
    rms_norm,
    token_losses,
)  # fmt: skip
from grokkit.zoo.nano.windows import repeated_sequences, sum_pairs


def xz_bits_per_byte(text: str) -> float:
    """Bits `xz -9e` takes for each byte of a text, with its container."""
    data = text.encode()
    return 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)


def attention_patterns(
    params: Params, tokens: Int[Array, "b t"], config: GrokConfig
) -> Float[Array, "layer b head q k"]:
    """Attention weights of every layer, no token dropped."""
    b, t = tokens.shape
    h = params["embedding"][tokens] * config.embedding_multiplier
    visible = np.tri(t, dtype=bool)
    patterns = []
    for layer in params["layers"]:
        x = rms_norm(h, layer["attn_norm"], config.norm_eps)
        heads = (b, t, config.n_kv_heads, -1, config.d_head)
        q = _rotate((x @ layer["query"]).reshape(heads), config.rope_base)
        k = _rotate((x @ layer["key"]).reshape(heads), config.rope_base)[:, :, :, 0]
        scores = jnp.einsum("bqkgd,bskd->bkgqs", q, k) * config.attention_multiplier
        scores = config.attention_softcap * jnp.tanh(scores / config.attention_softcap)
        pattern = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
        patterns.append(pattern.reshape(b, config.n_heads, t, t))
        z = attention(layer, x, config)
        h = h + rms_norm(z, layer["attn_out_norm"], config.norm_eps)
        x = rms_norm(h, layer["moe_norm"], config.norm_eps).reshape(b * t, -1)
        y = experts(layer, x, config, b * t)[0].reshape(h.shape)
        h = h + rms_norm(y, layer["moe_out_norm"], config.norm_eps)
    return jnp.stack(patterns)


def head_scores(pattern: Float[np.ndarray, "layer b head q k"], period: int) -> dict[str, Any]:
    """Mean attention to the token before, and, in the second half, to the token after the
    earlier occurrence: both [layer, head]."""
    t = pattern.shape[-1]
    before = np.arange(1, t)
    second = np.arange(period, t)
    return {
        "previous": pattern[..., before, before - 1].mean(axis=(1, 3)),
        "induction": pattern[..., second, second - period + 1].mean(axis=(1, 3)),
    }


def make_probe(config: GrokConfig, corpus: Corpus, windows: int = 12) -> Callable[[Params], dict]:
    """A function from parameters to the figures of a line of the log.

    Args:
        config: the model's sizes.
        corpus: its held-out text is read.
        windows: windows of each domain.
    """
    losses = jax.jit(functools.partial(token_losses, config=config))
    patterns = jax.jit(functools.partial(attention_patterns, config=config))
    context = config.context_length
    xz = {n: xz_bits_per_byte("".join(t)) for n, t in corpus.held_out_texts.items()}
    samples, bits_per_nat = {}, {}
    for name, stream in corpus.held_out.items():
        starts = np.linspace(0, len(stream) - context - 1, windows).astype(int)
        samples[name] = np.stack([stream[s : s + context + 1] for s in starts]).astype(np.int32)
        size = sum(len(text.encode()) for text in corpus.held_out_texts[name])
        bits_per_nat[name] = len(stream) / size / math.log(2)
    length = (context - 1) // 4
    copies = repeated_sequences(1, windows, length, config.vocab_size).astype(np.int32)
    sums, answers = _sum_windows(corpus, context, windows)

    def probe(params: Params) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        for name, sample in samples.items():
            share = float(losses(params, sample).mean()) * bits_per_nat[name] / xz[name]
            figures[name] = round(share, 3)
        halves = np.asarray(losses(params, copies)).mean(axis=0)
        figures["copy_first"] = round(float(halves[: length - 1].mean()), 2)
        figures["copy_second"] = round(float(halves[length:].mean()), 2)
        scores = head_scores(np.asarray(patterns(params, copies[:4])), length)
        for name, table in scores.items():
            figures[name] = [round(float(x), 2) for x in table.max(axis=1)]
        # An answer is right when no token of it costs as much as a coin toss: then each is the
        # most probable one. A lower bound, good enough for a log.
        right = np.asarray(losses(params, sums)) < math.log(2)
        exact = [right[row, list(places)].all() for row, places in answers]
        figures["sums"] = round(float(np.mean(exact)), 3)
        return figures

    return probe


def _sum_windows(corpus: Corpus, context: int, count: int) -> tuple[np.ndarray, list]:
    """Windows of held-out sums, and where the answers are: (row, positions)."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=corpus.tokenizer)
    pairs = sum_pairs()[1]
    pairs = pairs[np.random.default_rng(0).permutation(len(pairs))]
    rows, answers, used = [], [], 0
    for row in range(count):
        tokens = [processor.piece_to_id("\u2581")]
        while len(tokens) < context - 9:
            a, b = pairs[used % len(pairs)]
            question = [processor.piece_to_id(c) for c in f"{a}+{b}="]
            answer = [processor.piece_to_id(c) for c in f"{a + b}\n"]
            # The loss at position i is that of token i + 1.
            first = len(tokens) + len(question) - 1
            answers.append((row, range(first, first + len(answer))))
            tokens += question + answer
            used += 1
        rows.append((tokens + [2] * context)[: context + 1])
    return np.array(rows, np.int32), answers
