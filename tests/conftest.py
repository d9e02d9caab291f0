"""Fixtures that several test modules share."""

import io
from pathlib import Path

import matplotlib
import pytest
import sentencepiece

matplotlib.use("Agg")

REPOSITORY = Path(__file__).parents[1]
OFFICIAL_TOKENIZER = REPOSITORY.parent / "shared" / "tokenizer.model"

TINY_CORPUS = """The quick brown fox jumps over the lazy dog.
Two and two make four; four and four make eight.
    return value  # with four spaces before it
She said that the answer was not the question that he had asked.
Der Rest ist Schweigen, sagte er, und ging.
""".splitlines()


@pytest.fixture(scope="session")
def tiny_tokenizer_file(tmp_path_factory) -> Path:
    """A SentencePiece model of 320 pieces with Grok-1's special ids and byte fallback."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TINY_CORPUS * 4),
        model_writer=model,
        model_type="bpe",
        vocab_size=320,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["\n"],
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        pad_piece="[PAD]",
        bos_piece="[BOS]",
        eos_piece="[EOS]",
        unk_piece="[UNK]",
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def official_tokenizer_file() -> Path:
    """Grok-1's own tokenizer, which is not part of the project."""
    if not OFFICIAL_TOKENIZER.is_file():
        pytest.skip("the official tokenizer.model is not beside the repository")
    return OFFICIAL_TOKENIZER
