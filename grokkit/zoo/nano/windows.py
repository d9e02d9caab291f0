"""Training windows: natural text, two-digit sums and repeated sequences, mixed.

A batch is a function of the seed and the step alone, so that a resumed run sees exactly what an
uninterrupted one would have seen.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import sentencepiece

from grokkit.errors import GrokkitError
from grokkit.zoo.nano.data import Corpus

# The first ids are special pieces, whitespace, digits and bytes; random sequences leave them out.
FIRST_WORD_PIECE = 300
# Weight of tokens nobody can predict: random sequences on first sight, the operands of sums. Not
# zero, or the model would have no idea of them; not one, or their noise would drown the rest.
UNPREDICTABLE_WEIGHT = 0.1

SUMS, COPIES = "sums", "copies"


def sum_pairs(seed: int = 0, held_out_share: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """All sums a + b of two-digit numbers, divided into training and held-out ones.

    A pair is held out together with its mirror image, so that 58+27 never gives 27+58 away.

    Args:
        seed: decides which.
        held_out_share: share of the unordered pairs to hold out.

    Returns:
        Two arrays [pair, 2], ordered pairs.
    """
    a, b = np.triu_indices(90)
    unordered = np.stack([a + 10, b + 10], axis=-1)
    order = np.random.default_rng([seed, 1]).permutation(len(unordered))
    cut = round(held_out_share * len(unordered))

    def both_orders(pairs: np.ndarray) -> np.ndarray:
        return np.unique(np.concatenate([pairs, pairs[:, ::-1]]), axis=0)

    return both_orders(unordered[order[cut:]]), both_orders(unordered[order[:cut]])


@dataclass
class WindowSampler:
    """Draws batches of training windows.

    Attributes:
        corpus: the domains' tokens.
        context: tokens the model reads; a window has one more.
        seed: seed of everything drawn.
    """

    corpus: Corpus
    context: int
    seed: int

    def __post_init__(self) -> None:
        processor = sentencepiece.SentencePieceProcessor(model_proto=self.corpus.tokenizer)
        self.vocab_size = processor.get_piece_size()
        self._pieces = {c: processor.piece_to_id(c) for c in "0123456789+=\n"}
        self._pieces["start"] = processor.piece_to_id("\u2581")
        missing = [c for c, piece in self._pieces.items() if piece == processor.unk_id()]
        if missing:
            raise GrokkitError(f"the tokenizer has no piece for {missing}, which sums are made of")
        self._sum_pairs = sum_pairs(self.seed)[0]

    def batch(
        self, step: int, size: int, mixture: Mapping[str, float]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The windows of one step.

        Args:
            step: number of the step.
            size: number of windows.
            mixture: share of each domain, of `sums` and of `copies`; need not sum to 1.

        Returns:
            Token ids [size, context + 1], int32, and the loss weight of each prediction
            [size, context], float32.
        """
        rng = np.random.default_rng([self.seed, 2, step])
        names = list(mixture)
        shares = np.array([mixture[name] for name in names], np.float64)
        # Systematic sampling: every batch holds each kind as nearly in proportion as can be.
        edges = np.cumsum(shares / shares.sum()) * size
        kinds = np.searchsorted(edges, rng.uniform() + np.arange(size), side="right")
        windows, weights = zip(
            *(self.window(rng, names[min(kind, len(names) - 1)]) for kind in kinds), strict=False
        )
        return np.stack(windows).astype(np.int32), np.stack(weights)

    def window(self, rng: np.random.Generator, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """One window of a kind, and the weight of each of its predictions."""
        if kind == SUMS:
            return self._sums(rng)
        if kind == COPIES:
            return self._copies(rng)
        stream = self.corpus.train[kind]
        start = rng.integers(0, len(stream) - self.context)
        return stream[start : start + self.context + 1], np.ones(self.context, np.float32)

    def _sums(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        tokens: list[int] = [self._pieces["start"]]
        weights: list[float] = []
        while len(tokens) <= self.context:
            a, b = self._sum_pairs[rng.integers(len(self._sum_pairs))]
            question, answer = f"{a}+{b}=", f"{a + b}\n"
            tokens += [self._pieces[c] for c in question + answer]
            # The operators are always the same; only the operands cannot be known.
            weights += [1.0 if c in "+=" else UNPREDICTABLE_WEIGHT for c in question]
            weights += [1.0] * len(answer)
        return np.array(tokens[: self.context + 1]), np.array(weights[: self.context], np.float32)

    def _copies(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A segment, again and again, each time the same or after a gap of unrelated tokens.

        Segments are natural phrases, random tokens of a small alphabet, or of the whole
        vocabulary. Their lengths vary, so that looking back by a fixed distance does not help.
        """
        style = rng.integers(3)
        if style == 0:
            stream = self.corpus.train[
                list(self.corpus.train)[rng.integers(len(self.corpus.train))]
            ]
            length = rng.integers(6, 61)
            start = rng.integers(0, len(stream) - length)
            segment = stream[start : start + length].astype(np.int64)
            alphabet = stream
        else:
            words = np.arange(FIRST_WORD_PIECE, self.vocab_size)
            alphabet = rng.choice(words, rng.integers(8, 65)) if style == 1 else words
            segment = rng.choice(alphabet, rng.integers(6, 65 if style == 1 else 128))
        gaps = bool(rng.uniform() < 0.5)
        return self._repeat(rng, segment, alphabet, gaps, predictable=bool(style == 0))

    def _repeat(
        self,
        rng: np.random.Generator,
        segment: np.ndarray,
        alphabet: np.ndarray,
        gaps: bool,
        predictable: bool,
    ) -> tuple[np.ndarray, np.ndarray]:
        """A segment until the window is full; full weight where it comes again, or always if it
        is predictable on first sight."""
        tokens: list[np.ndarray] = []
        weights: list[np.ndarray] = []
        filled, weight_of_segment = 0, 1.0 if predictable else UNPREDICTABLE_WEIGHT
        while filled <= self.context:
            if gaps:
                noise = rng.choice(alphabet, rng.integers(0, max(2, len(segment) // 2)))
                tokens.append(noise)
                weights.append(np.full(len(noise), UNPREDICTABLE_WEIGHT))
                filled += len(noise)
            weight = np.full(len(segment), weight_of_segment)
            if gaps:
                weight[0] = UNPREDICTABLE_WEIGHT  # nothing tells where a gap ends
            weight_of_segment = 1.0
            tokens.append(segment)
            weights.append(weight)
            filled += len(segment)
        row = np.concatenate(tokens)[: self.context + 1]
        return row, np.concatenate(weights)[1 : self.context + 1].astype(np.float32)


def repeated_sequences(
    seed: int, count: int, length: int, vocab_size: int, first: int = FIRST_WORD_PIECE
) -> np.ndarray:
    """Random sequences, each written twice, for measuring copying: [count, 2 * length]."""
    rng = np.random.default_rng([seed, 3])
    half = rng.integers(first, vocab_size, (count, length))
    return np.concatenate([half, half], axis=1)
