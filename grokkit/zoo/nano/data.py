"""Token streams of the domains, made once and kept in the run's folder."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from grokkit.errors import GrokkitError
from grokkit.runtime import files
from grokkit.zoo.nano import domains as domains_module
from grokkit.zoo.nano.tokenizer import VOCAB_SIZE, train_tokenizer, write_tokenizer

EOS = 2
TOKENIZER_FILE = "tokenizer.model"
_TOKENS_FILE, _TEXTS_FILE = "tokens.npz", "held_out.json"


@dataclass(frozen=True)
class Corpus:
    """What a run reads.

    Attributes:
        train: domain to its training tokens, documents joined, each ended by EOS.
        held_out: domain to its held-out tokens, in the same form.
        held_out_texts: domain to its held-out documents.
        digests: domain to the SHA-256 of all its documents.
        tokenizer: the bytes of the tokenizer model.
    """

    train: dict[str, np.ndarray]
    held_out: dict[str, np.ndarray]
    held_out_texts: dict[str, list[str]]
    digests: dict[str, str]
    tokenizer: bytes


def encode_documents(processor, documents: list[str]) -> np.ndarray:
    """All documents as one row of token ids, each document ended by EOS."""
    rows = [np.array(processor.encode(text) + [EOS], np.uint16) for text in documents]
    return np.concatenate(rows)


def prepare(
    run: Path,
    splits: dict[str, domains_module.Split] | None = None,
    seed: int = 0,
    vocab_size: int = VOCAB_SIZE,
) -> None:
    """Read the domains, train the tokenizer and write both into a run's folder.

    Args:
        run: the folder of the run; Debian packages are kept in `run/downloads`.
        splits: the domains' documents; read from their packages when None.
        seed: seed of the split and of the tokenizer's sample.
        vocab_size: pieces of the tokenizer.
    """
    import sentencepiece

    run.mkdir(parents=True, exist_ok=True)
    if splits is None:
        splits = domains_module.read_all(run / "downloads", seed)
    model = train_tokenizer(
        {n: list(s.train.values()) for n, s in splits.items()}, seed, vocab_size
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    arrays, texts = {}, {}
    for name, split in splits.items():
        arrays[f"train/{name}"] = encode_documents(processor, list(split.train.values()))
        arrays[f"held_out/{name}"] = encode_documents(processor, list(split.held_out.values()))
        texts[name] = {"digest": split.digest(), "documents": split.held_out}
    with files.replacing(run / _TOKENS_FILE) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)
    files.write(run / _TEXTS_FILE, json.dumps(texts))
    write_tokenizer(model, run / TOKENIZER_FILE)  # last: its presence says that all is there


def load_corpus(run: Path) -> Corpus:
    """Read what `prepare` wrote.

    Raises:
        GrokkitError: the folder has not been prepared.
    """
    if not (run / TOKENIZER_FILE).exists():
        raise GrokkitError(
            f"{run}: no prepared data here; run `python -m grokkit.zoo.nano tokenizer --run {run}`"
        )
    texts = json.loads((run / _TEXTS_FILE).read_text(encoding="utf-8"))
    with np.load(run / _TOKENS_FILE) as arrays:
        streams = {name: arrays[name] for name in arrays.files}
    return Corpus(
        train={n: streams[f"train/{n}"] for n in texts},
        held_out={n: streams[f"held_out/{n}"] for n in texts},
        held_out_texts={n: list(texts[n]["documents"].values()) for n in texts},
        digests={n: texts[n]["digest"] for n in texts},
        tokenizer=(run / TOKENIZER_FILE).read_bytes(),
    )
