"""Fixtures that several test modules share."""

import io
import json
from pathlib import Path

import jax
import matplotlib
import numpy as np
import pytest
import reference
import sentencepiece
from helpers import forward, random_model

import grokkit
from grokkit.abstract_model import Output
from grokkit.tokenizer import Tokenizer

matplotlib.use("Agg")

REPOSITORY = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden" / "tiny"
OFFICIAL_TOKENIZER = REPOSITORY.parent / "shared" / "tokenizer.model"

TINY_CORPUS = """The quick brown fox jumps over the lazy dog.
Two and two make four; four and four make eight.
    return value  # with four spaces before it
She said that the answer was not the question that he had asked.
Der Rest ist Schweigen, sagte er, und ging.
""".splitlines()


MOST_MAPPINGS = 20_000
"""Of memory in one process; Linux allows 65,530 unless told otherwise, and aborts at the next."""


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Let go of compiled programs, each of which maps memory for its kernels, before too many."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_text().splitlines()) > MOST_MAPPINGS:
        jax.clear_caches()


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


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """A random 12-layer checkpoint in the official layout, and what was computed from it."""
    return GOLDEN


@pytest.fixture(scope="session")
def golden_arrays() -> dict[str, np.ndarray]:
    """Tokens, what the official code computed from them in bfloat16, and the float64 truth."""
    with np.load(GOLDEN / "reference.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def golden_weights() -> dict[str, np.ndarray]:
    """The golden checkpoint's weights, read without grokkit."""
    names = json.loads((GOLDEN / "names.json").read_text())
    return reference.read_checkpoint(GOLDEN / "ckpt-0", names)


@pytest.fixture(scope="session")
def lm8() -> grokkit.LanguageModel:
    """The golden checkpoint in float32 on eight devices."""
    return grokkit.load(GOLDEN, mesh=grokkit.make_mesh(1, 8), dtype="float32", progress=False)


@pytest.fixture(scope="session")
def lm1() -> grokkit.LanguageModel:
    """The golden checkpoint in float32 on one device."""
    return grokkit.load(GOLDEN, mesh=grokkit.make_mesh(1, 1), dtype="float32", progress=False)


@pytest.fixture(scope="session")
def out8(lm8, golden_arrays) -> Output:
    """A forward pass over the golden tokens on eight devices with every site captured."""
    return forward(lm8.model, lm8.mesh, golden_arrays["tokens"], grokkit.SITES)


@pytest.fixture(scope="session")
def out1(lm1, golden_arrays) -> Output:
    """The same on one device."""
    return forward(lm1.model, lm1.mesh, golden_arrays["tokens"], grokkit.SITES)


@pytest.fixture(scope="session")
def golden_reference(lm8, golden_weights, golden_arrays) -> dict[str, np.ndarray]:
    """Every site on the golden tokens, by the definition in float64."""
    return reference.forward(golden_weights, lm8.config, golden_arrays["tokens"])


@pytest.fixture(scope="session")
def tiny_config(tiny_tokenizer_file) -> grokkit.GrokConfig:
    """Two small layers, with the tiny tokenizer's vocabulary."""
    return grokkit.GrokConfig(
        vocab_size=Tokenizer.from_file(tiny_tokenizer_file).vocab_size,
        d_model=32,
        n_layers=2,
        n_heads=8,
        n_kv_heads=8,
        d_head=4,
        d_ff=32,
        context_length=96,
        embedding_multiplier=1.0,  # small, or a random model repeats its last token
        output_multiplier=2.0,
        attention_multiplier=0.5,
    )


@pytest.fixture(scope="session")
def tiny_lm(tiny_config, tiny_tokenizer_file) -> grokkit.LanguageModel:
    """A random model that reads and writes text, on eight devices."""
    mesh = grokkit.make_mesh(1, 8)
    model = random_model(tiny_config, 0, mesh)
    return grokkit.LanguageModel(model, mesh, Tokenizer.from_file(tiny_tokenizer_file), "tiny")
