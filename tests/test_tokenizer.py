import os
import pickle
import random

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

import grokkit
from grokkit.errors import TokenizerError
from grokkit.tokenizer import Tokenizer
from grokkit.zoo import shipped

PAD, BOS, EOS, UNK = 0, 1, 2, 3

TEXTS = [
    "The answer was four.",
    " leading space",
    "  two  spaces  ",
    "line\n\n  indented\ttab\r\n",
    "naïve façade 日本語 🤷🏽‍♀️",
    "nul \x00 and \x7f",
    "[EOS] <0x41> ▁",
    " ",
    "\n",
    "",
]


@pytest.fixture(scope="session")
def tokenizer(tiny_tokenizer_file):
    return Tokenizer.from_file(tiny_tokenizer_file)


@pytest.fixture(scope="session")
def official(official_tokenizer_file):
    return Tokenizer.from_file(official_tokenizer_file, expected_vocab_size=131072)


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """The byte pieces that spell `data`, found by their names in the vocabulary."""
    return [tokenizer._pieces.index(f"<0x{byte:02X}>") for byte in data]


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = tokenizer.stream_decoder()
    return [decoder.push(token) for token in ids] + [decoder.finish()]


def test_the_official_ids(official):
    text = "The answer to life the universe and everything is of course"
    ids = [422, 3033, 356, 1180, 333, 9072, 360, 2175, 391, 359, 1805]
    assert official.encode(text) == ids
    assert official.decode(ids) == text
    assert official.str_tokens(ids)[:3] == [" The", " answer", " to"]
    assert official.str_tokens([PAD, BOS, EOS, UNK, 4]) == [
        "[PAD]",
        "[BOS]",
        "[EOS]",
        "[UNK]",
        "\n",
    ]


@pytest.mark.parametrize("text", [text for text in TEXTS if "▁" not in text])
def test_official_round_trip(official, text):
    ids = official.encode(text)
    assert official.decode(ids) == text
    assert "".join(streamed(official, ids)) == text


@pytest.mark.parametrize("text", [text for text in TEXTS if "▁" not in text])
def test_round_trip_of_the_shipped_tokenizer(text):
    nano = Tokenizer.from_file(shipped("nano") / "tokenizer.model", grokkit.NANO.vocab_size)
    ids = nano.encode(text)
    assert nano.decode(ids) == text
    assert "".join(streamed(nano, ids)) == text


@pytest.mark.parametrize("text", [text for text in TEXTS if "▁" not in text])
def test_decode_undoes_encode(tokenizer, text):
    ids = tokenizer.encode(text)
    assert BOS not in ids and EOS not in ids
    assert tokenizer.decode(ids) == text


def test_ids_may_be_arrays(tokenizer):
    ids = tokenizer.encode("the answer")
    for array in (np.array(ids), np.array(ids, np.uint16), jnp.array(ids), tuple(ids)):
        assert tokenizer.decode(array) == "the answer"
        assert tokenizer.str_tokens(array) == tokenizer.str_tokens(ids)


def test_str_tokens_join_to_the_text(tokenizer):
    text = "The answer was\n  not the question\t#"
    pieces = tokenizer.str_tokens(tokenizer.encode(text))
    assert "".join(pieces) == " " + text
    assert any(piece.startswith(" ") and len(piece) > 1 for piece in pieces)


def test_str_tokens_of_bytes_and_control_tokens(tokenizer):
    ids = byte_ids(tokenizer, b"\nA") + byte_ids(tokenizer, "é".encode()) + [EOS, UNK]
    assert tokenizer.str_tokens(ids) == ["\n", "A", "<0xC3>", "<0xA9>", "[EOS]", "[UNK]"]


@pytest.mark.parametrize(
    ("ids", "found"),
    [
        ([5, 100000], "found 100000 at position 1"),
        ([-1], "found -1 at position 0"),
        (np.array([[5, 6]]), r"shape \(1, 2\)"),
        (np.array([0.5]), "dtype float64"),
        (np.array([True]), "dtype bool"),
        (np.array(5), r"shape \(\)"),
    ],
)
def test_ids_that_are_none(tokenizer, ids, found):
    for method in (tokenizer.decode, tokenizer.str_tokens, tokenizer.stream_decoder):
        with pytest.raises(TokenizerError, match=found):
            method(ids)


def test_half_a_surrogate_pair_is_no_text(tokenizer):
    with pytest.raises(TokenizerError, match=r"'\\ud800' at character 3"):
        tokenizer.encode("abc\ud800")


def test_streaming_gives_characters_whole(tokenizer):
    ids = byte_ids(tokenizer, "a日🤷".encode())
    assert streamed(tokenizer, ids) == ["a", "", "", "日", "", "", "", "🤷", ""]


def test_streaming_gives_broken_bytes_up_once_nothing_can_complete_them(tokenizer):
    start, rest = byte_ids(tokenizer, b"\xe2\x80")
    assert streamed(tokenizer, [start, EOS, rest]) == ["", "\ufffd", "\ufffd", ""]
    assert streamed(tokenizer, [start, rest]) == ["", "", "\ufffd\ufffd"]
    (last,) = byte_ids(tokenizer, b"\x8d")
    assert streamed(tokenizer, [start, start, rest, last]) == ["", "\ufffd", "", "\u200d", ""]


def test_streaming_after_a_prompt_keeps_the_space(tokenizer):
    ids = tokenizer.encode("the answer")
    prompt = tokenizer.encode("She said")
    decoder = tokenizer.stream_decoder(prompt)
    text = "".join(decoder.push(token) for token in ids) + decoder.finish()
    assert text == " the answer" == tokenizer.decode(prompt + ids)[len("She said") :]
    assert "".join(streamed(tokenizer, ids)) == "the answer"


@hypothesis.settings(deadline=None)
@hypothesis.given(st.data())
def test_streamed_text_is_the_decoded_text(tokenizer, data):
    """Over any tokens, with byte pieces, and the bytes of UTF-8's edges among them, made common."""
    edges = byte_ids(tokenizer, b"\x20\x41\x80\x8d\x90\x9f\xa0\xc3\xe0\xe2\xed\xef\xf0\xf4\xff")
    some_byte = st.sampled_from(byte_ids(tokenizer, bytes(range(256))))
    token = st.integers(0, tokenizer.vocab_size - 1)
    ids = data.draw(st.lists(st.sampled_from(edges) | some_byte | token, max_size=30))
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@hypothesis.settings(deadline=None)
@hypothesis.given(st.text())
def test_any_text_survives(tokenizer, text):
    # SentencePiece marks a space with U+2581, which is therefore the one character it cannot keep.
    expected = text.replace("▁", " ")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == "".join(streamed(tokenizer, ids)) == expected


def test_repr_names_the_file(tokenizer, tiny_tokenizer_file):
    assert repr(tokenizer) == f"Tokenizer({str(tiny_tokenizer_file)!r}, vocab_size=320)"


def test_survives_pickling(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("the answer") == tokenizer.encode("the answer")


def test_wrong_vocabulary_size(tiny_tokenizer_file):
    with pytest.raises(TokenizerError, match=r"expected 131,072 pieces.*found 320") as caught:
        Tokenizer.from_file(tiny_tokenizer_file, expected_vocab_size=131072)
    assert str(tiny_tokenizer_file) in str(caught.value)


def test_files_that_are_no_tokenizer(tmp_path, tiny_tokenizer_file):
    empty, text, cut = tmp_path / "empty", tmp_path / "text", tmp_path / "cut"
    empty.touch()
    text.write_text("not a model")
    cut.write_bytes(tiny_tokenizer_file.read_bytes()[:-100])
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path, found in [
        (tmp_path / "missing", "found nothing there"),
        (tmp_path, "no regular file"),
        (fifo, "no regular file"),
        (empty, "found 0 bytes"),
        (text, "found 11 bytes that are none"),
        (cut, "bytes that are none"),
    ]:
        with pytest.raises(TokenizerError, match=found) as caught:
            Tokenizer.from_file(path)
        assert str(path) in str(caught.value)


def test_a_file_too_large_is_not_read(tmp_path):
    path = tmp_path / "huge"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(TokenizerError, match=r"found 1,099,511,627,776 bytes"):
        Tokenizer.from_file(path)


def test_damaged_files_raise_or_load(tmp_path, tiny_tokenizer_file):
    """Random damage gives a tokenizer or our error, never another exception."""
    original = tiny_tokenizer_file.read_bytes()
    generator = random.Random(0)
    path = tmp_path / "damaged"
    refused = 0
    for _ in range(500):
        data = bytearray(original)
        for _ in range(generator.randint(1, 8)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        path.write_bytes(data)
        try:
            tokenizer = Tokenizer.from_file(path)
            assert tokenizer.str_tokens(range(tokenizer.vocab_size))
        except TokenizerError:
            refused += 1
    assert refused > 0
