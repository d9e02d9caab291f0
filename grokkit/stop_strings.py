"""Ending a text at a string, when the text arrives token by token."""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from grokkit.errors import PromptError

Token = TypeVar("Token")


class StopStrings:
    """Holds tokens back while their text may turn out to be the beginning of a stop string."""

    def __init__(self, stop: Sequence[Any]):
        """Look for any of `stop`. **Raises:** `PromptError` for one that is empty or no text."""
        for string in stop:
            if not (isinstance(string, str) and string):
                raise PromptError(
                    f"stop: expected strings of at least one character, found {string!r}"
                )
        self._stop = tuple(stop)
        self._held: list = []

    def push(self, token: Token) -> tuple[list[Token], bool]:
        """Take the next token: a dataclass with a `text`.

        **Returns:** the tokens that are certain by now to belong to the text, and whether a stop
        string is complete. The text then ends before its beginning; a token that is cut by it comes
        with the rest of its text, and those within it are left out.
        """
        if not self._stop:
            return [token], False
        self._held.append(token)
        text = "".join(t.text for t in self._held)
        found = [at for at in map(text.find, self._stop) if at >= 0]
        if found:
            return self._cut(min(found)), True
        return self._release(len(text) - self._open(text)), False

    def finish(self) -> list:
        """Say that nothing follows. **Returns:** the tokens held back."""
        held, self._held = self._held, []
        return held

    def _open(self, text: str) -> int:
        """The length of the longest end of `text` that begins a stop string."""
        return max(
            (n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])),
            default=0,
        )

    def _release(self, certain: int) -> list:
        """The tokens that lie within the first `certain` characters."""
        n, length = 0, 0
        while n < len(self._held) and length + len(self._held[n].text) <= certain:
            length += len(self._held[n].text)
            n += 1
        released, self._held = self._held[:n], self._held[n:]
        return released

    def _cut(self, end: int) -> list:
        """The tokens up to a place, the last of them shortened to it."""
        kept = []
        for token in self._held:
            if end > 0 or not token.text:
                kept.append(dataclasses.replace(token, text=token.text[:end]))
            if end <= len(token.text):
                break
            end -= len(token.text)
        self._held = []
        return kept
