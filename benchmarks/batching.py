"""Tokens a second of 1, 4 and 16 requests that share a batch.

    python benchmarks/batching.py [--new 64] [--rounds 3] [--model mid,nano]

Each number of requests has a batch of as many slots, compiled beforehand; they take turns, round
after round, so that all meet the same noise. The rate counts every new token, from the first
request's submission to the last one's end, prompts' runs included.
"""

import argparse
import io
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import sentencepiece

import grokkit

grokkit.virtual_devices(1)

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.speed import mid
from grokkit.batching import ContinuousBatch
from grokkit.language_model import LanguageModel
from grokkit.tokenizer import Tokenizer

COUNTS = (1, 4, 16)
BAR = 3.5  # times the rate of one request, with 16


def mid_model(dtype: str) -> LanguageModel:
    """mid with random weights, and a tokenizer of as many pieces (its words do not matter)."""
    words = np.random.default_rng(0).integers(0, 26, (20_000, 8))
    lines = ["".join(chr(97 + c) for c in word) for word in words]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=mid.MID.vocab_size,
        model_type="bpe", byte_fallback=True, pad_id=0, bos_id=1, eos_id=2, unk_id=3,
        minloglevel=2,
    )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    mesh = grokkit.make_mesh(1, 1)
    return LanguageModel(mid.random_model(mid.MID, mesh, dtype), mesh, Tokenizer(processor), "mid")


def nano_model(dtype: str) -> LanguageModel:
    return grokkit.load("nano", mesh=grokkit.make_mesh(1, 1), dtype=dtype, progress=False)


def rate(batch: ContinuousBatch, n: int, new: int, seed: int) -> float:
    """New tokens a second of `n` requests of 16 prompt tokens each."""
    vocab = batch.lm.config.vocab_size
    prompts = np.random.default_rng(seed).integers(3, vocab, (n, 16)).tolist()
    start = time.perf_counter()
    generations = [batch.submit(p, new, seed=i) for i, p in enumerate(prompts)]
    batch.run()
    seconds = time.perf_counter() - start
    return sum(len(g.tokens) for g in generations) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--new", type=int, default=64, help="new tokens of each request")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="mid,nano", help="mid, nano or both")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--block", type=int, default=4)
    options = parser.parse_args()
    for name in options.model.split(","):
        lm = {"mid": mid_model, "nano": nano_model}[name](options.dtype)
        batches = {
            n: ContinuousBatch(lm, n, min(lm.config.context_length, 16 + options.new), None,
                               options.block)
            for n in COUNTS
        }  # fmt: skip
        rates: dict[int, list[float]] = {n: [] for n in COUNTS}
        for n, batch in batches.items():
            rate(batch, n, min(8, options.new), seed=0)
        for i in range(options.rounds):
            for n, batch in batches.items():
                rates[n].append(rate(batch, n, options.new, seed=1 + i))
        for n in COUNTS:
            ratio = statistics.median(a / b for a, b in zip(rates[n], rates[1], strict=True))
            met = f"; bar {BAR:g}: {'met' if ratio >= BAR else 'not met'}" if n == 16 else ""
            print(f"{name} {options.dtype}: {n:2} requests {statistics.median(rates[n]):7.1f} "
                  f"tokens/s, {ratio:.2f} times one's{met}")  # fmt: skip


if __name__ == "__main__":
    main()
