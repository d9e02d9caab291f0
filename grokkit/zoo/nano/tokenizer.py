"""nano's SentencePiece model: the official one's conventions at a thirtieth of its size."""

import io
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from grokkit.runtime import files

VOCAB_SIZE = 4096
_SPACE = "\u2581"  # SentencePiece's visible space

# Whitespace runs are pieces of their own, as in the official tokenizer.
_WHITESPACE_RUNS = (
    ["\n" * n for n in range(1, 4)] + ["\t"] + [_SPACE * n for n in (2, 3, 4, 8, 12, 16)]
)


def _passages(documents: Iterable[str], length: int) -> Iterator[str]:
    for text in documents:
        for start in range(0, len(text), length):
            yield text[start : start + length]


def train_tokenizer(
    domains: dict[str, list[str]],
    seed: int,
    vocab_size: int = VOCAB_SIZE,
    characters: int = 1_500_000,
) -> bytes:
    """Train a byte-pair encoding on equal shares of every domain.

    Args:
        domains: domain name to training documents.
        seed: seed of the choice of passages.
        vocab_size: number of pieces.
        characters: how much text to take of each domain.

    Returns:
        The bytes of a `tokenizer.model`: ids [PAD] 0, [BOS] 1, [EOS] 2, [UNK] 3, one piece a
        digit, unknown characters spelled in bytes, and `decode(encode(text)) == text`.
    """
    import sentencepiece

    passages: list[str] = []
    for documents in domains.values():
        chunks = list(_passages(documents, 2000))
        random.Random(seed).shuffle(chunks)
        taken = 0
        for chunk in chunks:
            if taken >= characters:
                break
            passages.append(chunk)
            taken += len(chunk)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(passages),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        pad_id=0, bos_id=1, eos_id=2, unk_id=3,
        pad_piece="[PAD]", bos_piece="[BOS]", eos_piece="[EOS]", unk_piece="[UNK]",
        unk_surface="[UNK]",
        user_defined_symbols=_WHITESPACE_RUNS + [str(digit) for digit in range(10)],
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        byte_fallback=True,
        character_coverage=0.9995,
        max_sentence_length=100_000,
        num_threads=1,
        minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def write_tokenizer(model: bytes, path: Path) -> None:
    """Write a tokenizer, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, model)
