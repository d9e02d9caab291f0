"""Generated stand-ins for the domains' text, and a recipe small enough for a test."""

import random

import pytest

from grokkit.config import GrokConfig
from grokkit.zoo.nano import data
from grokkit.zoo.nano.domains import split
from grokkit.zoo.nano.recipe import Recipe

VOCAB = 512


def invented_documents(seed: int, count: int = 24) -> dict[str, str]:
    """Documents of invented words, a few sentences each."""
    rng = random.Random(seed)
    letters = rng.sample("abcdefghijklmnopqrstuvwxyz", 14)
    words = ["".join(rng.choices(letters, k=rng.randint(2, 8))) for _ in range(150)]
    lines = [[rng.choice(words) for _ in range(12)] for _ in range(count * 20)]
    return {
        f"document {i}": "\n".join(" ".join(line) for line in lines[20 * i : 20 * i + 20])
        + "\n1 + 1 = 2\n"
        for i in range(count)
    }


@pytest.fixture(scope="session")
def documents():
    return invented_documents(3)


@pytest.fixture(scope="session")
def splits():
    return {name: split(invented_documents(i), seed=0) for i, name in enumerate(("red", "blue"))}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, splits):
    """A run folder with prepared data."""
    run = tmp_path_factory.mktemp("run")
    data.prepare(run, splits, vocab_size=VOCAB)
    return run


@pytest.fixture(scope="session")
def corpus(prepared):
    return data.load_corpus(prepared)


@pytest.fixture(scope="session")
def config():
    return GrokConfig(
        vocab_size=VOCAB,
        d_model=32,
        n_layers=2,
        n_heads=8,
        n_kv_heads=4,
        d_head=6,
        d_ff=40,
        context_length=64,
        embedding_multiplier=32**0.5,
        attention_multiplier=6**-0.5,
    )


@pytest.fixture(scope="session")
def recipe(config):
    return Recipe(
        config=config,
        mixture={"red": 0.3, "blue": 0.3, "sums": 0.2, "copies": 0.2},
        decay_mixture={"red": 0.4, "blue": 0.4, "sums": 0.1, "copies": 0.1},
        batch=4,
        warmup=2,
        capacity_factor=2.0,
    )
