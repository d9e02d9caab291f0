"""SentencePiece behind four methods, and a decoder for text that arrives token by token."""

import codecs
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import sentencepiece

from grokkit.errors import TokenizerError

MAX_FILE_BYTES = 1 << 28  # Grok-1's is 2 MB: more than this is some other file, not worth reading

TokenIds = Sequence[int] | np.ndarray | jax.Array


class Tokenizer:
    """Text to token ids and back.

    Like the official code it adds no [BOS] when it encodes. Token ids are those of the model's
    embedding rows; in Grok-1's 131,072 pieces 0 is [PAD], 1 [BOS], 2 [EOS] and 3 [UNK], and a
    character that no piece spells is written as its UTF-8 bytes, one byte piece each.
    """

    def __init__(self, processor: sentencepiece.SentencePieceProcessor, name: str = "tokenizer"):
        """Wrap a loaded processor; `Tokenizer.from_file` is the usual way in.

        **Arguments:**

        - `processor`: a SentencePiece processor with a model loaded.
        - `name`: what error messages call this tokenizer, usually its file.
        """
        self._processor = processor
        self._name = name
        self._pieces: list[str] = processor.id_to_piece(list(range(processor.vocab_size())))

    @classmethod
    def from_file(
        cls, path: str | os.PathLike[str], expected_vocab_size: int | None = None
    ) -> "Tokenizer":
        """Read a `tokenizer.model`.

        **Arguments:**

        - `path`: a SentencePiece model file.
        - `expected_vocab_size`: the model's vocabulary size; if given, the tokenizer must have
          exactly as many pieces.

        **Raises:** `TokenizerError` if the file is missing, is no SentencePiece model, or has
        another number of pieces than expected.
        """
        path = Path(path)
        if not path.is_file():
            found = "something that is no regular file" if path.exists() else "nothing"
            raise TokenizerError(
                f"{path}: expected a SentencePiece model, found {found} there. "
                "A tokenizer.model comes with the weights: put it at this path."
            )
        size = path.stat().st_size
        if not 0 < size <= MAX_FILE_BYTES:
            raise TokenizerError(
                f"{path}: expected a SentencePiece model of at most {MAX_FILE_BYTES:,} bytes, "
                f"found {size:,} bytes. Fetch the tokenizer.model that came with the weights again."
            )
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
            tokenizer = cls(processor, str(path))
        except (RuntimeError, UnicodeDecodeError) as error:
            raise TokenizerError(
                f"{path}: expected a SentencePiece model, found {size:,} bytes that are none "
                f"({error}). Fetch the tokenizer.model that came with the weights again."
            ) from error
        if expected_vocab_size is not None and tokenizer.vocab_size != expected_vocab_size:
            raise TokenizerError(
                f"{path}: expected {expected_vocab_size:,} pieces, as many as the model's "
                f"vocabulary, found {tokenizer.vocab_size:,}. "
                "Use the tokenizer.model that came with these weights."
            )
        return tokenizer

    def __repr__(self) -> str:
        return f"Tokenizer({self._name!r}, vocab_size={self.vocab_size})"

    @property
    def vocab_size(self) -> int:
        """The number of pieces; token ids run from 0 to one less."""
        return len(self._pieces)

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`, without a [BOS]; none for the empty string.

        **Raises:** `TokenizerError` if `text` holds half of a surrogate pair, which no UTF-8 spells.
        """
        try:
            # Given bytes, SentencePiece need not meet a string that it cannot convert.
            return self._processor.encode(text.encode())
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"text: expected Unicode text, found {text[error.start]!r} at character "
                f"{error.start}, half of a surrogate pair. Remove it, or decode the text's "
                "original bytes again."
            ) from error

    def decode(self, ids: TokenIds) -> str:
        """The text that `ids` spell.

        Control tokens such as [EOS] spell nothing, and bytes that are no UTF-8 become U+FFFD. The
        space that encoding puts before the first word is taken away again, so that
        `decode(encode(text)) == text`.

        **Arguments:**

        - `ids`: `[position]`, token ids.

        **Raises:** `TokenizerError` if an id is not in the vocabulary.
        """
        return self._processor.decode(self._checked(ids))

    def str_tokens(self, ids: TokenIds) -> list[str]:
        """What each token shows when it stands alone, for labels and tables.

        A word's piece keeps the space before it, a byte piece below 0x80 is its ASCII character,
        and a byte that is part of a longer character keeps its name, such as `<0xE2>`, as do control
        tokens, such as `[EOS]`. Of ids without those two kinds, the joined strings are
        `decode(ids)`, but for the space before the first word.

        **Arguments:**

        - `ids`: `[position]`, token ids.

        **Returns:** one string a position.

        **Raises:** `TokenizerError` if an id is not in the vocabulary.
        """
        return [self._str_token(token) for token in self._checked(ids)]

    def stream_decoder(self, prompt: TokenIds = ()) -> "StreamDecoder":
        """A decoder for the tokens that follow `prompt` one at a time."""
        decoder = StreamDecoder(self)
        for token in self._checked(prompt):
            decoder.push(token)
        return decoder

    def _str_token(self, token: int) -> str:
        byte = self._byte(token)
        if byte is not None and byte < 0x80:
            return chr(byte)
        return self._pieces[token].replace("▁", " ")

    def _byte(self, token: int) -> int | None:
        if not self._processor.is_byte(token):
            return None
        return int(self._pieces[token][1:-1], 16)  # "<0x0A>"

    def _is_control(self, token: int) -> bool:
        return self._processor.is_control(token)

    def _checked(self, ids: TokenIds) -> list[int]:
        array = np.asarray(ids)
        if array.size == 0:
            return []
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise TokenizerError(
                "ids: expected a sequence of integers, found an array of shape "
                f"{array.shape} and dtype {array.dtype}. Pass one row of token ids at a time."
            )
        outside = (array < 0) | (array >= self.vocab_size)
        if outside.any():
            position = int(outside.argmax())
            raise TokenizerError(
                f"ids: expected token ids from 0 to {self.vocab_size - 1}, found "
                f"{array[position]} at position {position}. {self._name} has no such piece: were "
                "these ids made by another tokenizer?"
            )
        return array.tolist()


class StreamDecoder:
    """Turns tokens into text as they come.

    The pieces that `push` returns, joined and followed by what `finish` returns, are
    `tokenizer.decode` of all the tokens. A character spelled by several byte pieces arrives whole,
    with the last of them; until then `push` returns the empty string.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        # Decoding depends on what came before in one way: the first word loses its space. So a
        # text that has begun is decoded behind one token that is known to spell something.
        self._context: list[int] = []
        self._n_before = 0  # characters that the context spells
        self._pending: list[int] = []  # byte pieces that may still become one character
        self._pending_bytes = b""

    def push(self, token: int) -> str:
        """Take the next token.

        **Returns:** the text that is certain by now and was not returned before; may be empty.

        **Raises:** `TokenizerError` if `token` is not in the vocabulary.
        """
        (token,) = self._tokenizer._checked([token])
        byte = self._tokenizer._byte(token)
        if byte is None:
            text = self.finish()
            return text if self._tokenizer._is_control(token) else text + self._decode([token])
        self._pending.append(token)
        self._pending_bytes += bytes([byte])
        return self._release(len(self._pending) - _unfinished(self._pending_bytes))

    def finish(self) -> str:
        """Say that nothing, or nothing that completes a character, follows.

        **Returns:** U+FFFD for each byte still waiting for the rest of its character.
        """
        return self._release(len(self._pending))

    def _release(self, count: int) -> str:
        text = self._decode(self._pending[:count]) if count else ""
        self._pending, self._pending_bytes = self._pending[count:], self._pending_bytes[count:]
        return text

    def _decode(self, tokens: list[int]) -> str:
        processor = self._tokenizer._processor
        text = processor.decode(self._context + tokens)[self._n_before :]
        if not self._context:
            self._context = [processor.unk_id()]
            self._n_before = len(processor.decode(self._context))
        return text


def _unfinished(data: bytes) -> int:
    """How many bytes at the end of `data` begin a character's UTF-8 without completing it."""
    for count in range(min(3, len(data)), 0, -1):
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            if decoder.decode(data[-count:]) == "":
                return count
        except UnicodeDecodeError:
            pass
    return 0
