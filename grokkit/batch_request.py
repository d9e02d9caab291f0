"""One request to a `ContinuousBatch`: its text as it comes, and how it ends."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from grokkit.continuation import StreamedToken
from grokkit.language_model import LanguageModel
from grokkit.sampling import Draw, Sampling
from grokkit.stop_strings import StopStrings


@runtime_checkable
class Batch(Protocol):
    """What a request needs of the batch that it is in."""

    lm: LanguageModel

    def step(self) -> bool:
        """Go on a little."""
        ...

    def forget(self, generation: "Generation") -> None:
        """Let go of a request that has ended."""
        ...


class Generation:
    """One request to a `ContinuousBatch`: its text as far as it has come.

    Iterating over it gives its `StreamedToken`s as they come, and lets the batch run meanwhile.
    """

    finish_reason: str | None = None
    """Why it ended: `"end"` of text, a `"stop"` string, `"length"`, `"cancelled"`; `None` before."""

    def __init__(
        self,
        batch: Batch,
        prompt: list[int],
        max_len: int,
        sampling: Sampling,
        stop: Sequence[str],
    ):
        """Made by `ContinuousBatch.submit`."""
        self.prompt = prompt
        self.max_len = max_len
        self.tokens: list[StreamedToken] = []
        """What was drawn so far and is certain to belong to the text."""
        self.rows = sampling.rows(1, batch.lm.config.vocab_size)
        """How its tokens are drawn; for the batch, as are `asked` and `take`."""
        self.asked = 0
        """Tokens that the device was told to draw."""
        self._batch = batch
        self._decoder = batch.lm.tokenizer.stream_decoder(prompt)
        self._stop = StopStrings(stop)
        self._drawn = 0  # tokens that came back

    @property
    def text(self) -> str:
        """The new text so far, without the prompt and without the stop string."""
        return "".join(token.text for token in self.tokens)

    def cancel(self) -> None:
        """End it here; its slot goes to the next request. Nothing happens if it has ended.

        Tokens that may be the beginning of a stop string are left out.
        """
        if self.finish_reason is None:
            self.finish_reason = "cancelled"
            self._batch.forget(self)

    def result(self) -> str:
        """Run the batch until this has ended. **Returns:** its text."""
        for _ in self:
            pass
        return self.text

    def __iter__(self) -> Iterator[StreamedToken]:
        given = 0
        while given < len(self.tokens) or self.finish_reason is None:
            if given == len(self.tokens):
                self._batch.step()
            else:
                yield self.tokens[given]
                given += 1

    def __repr__(self) -> str:
        state = self.finish_reason or ("running" if self.asked else "waiting")
        return f"Generation({state}: {len(self.tokens)} of {self.max_len} tokens, {self.text!r})"

    def take(self, token: int, prob: float, top_tokens: np.ndarray, top_probs: np.ndarray) -> None:
        """The next token, unless it comes after the end."""
        if self.finish_reason is not None:
            return
        lm = self._batch.lm
        self._drawn += 1
        if token == lm.config.eos_token:
            self._finish("end")
            return
        alternatives = tuple(zip(
            top_tokens.tolist(), lm.to_str_tokens(top_tokens), top_probs.tolist(), strict=True
        ))  # fmt: skip
        streamed = StreamedToken(token, self._decoder.push(token), prob, alternatives)
        certain, stopped = self._stop.push(streamed)
        self.tokens += certain
        if stopped:
            self.finish_reason = "stop"
        elif self._drawn == self.max_len:
            self._finish("length")

    def _finish(self, reason: str) -> None:
        self.tokens += self._stop.finish()
        self.finish_reason = reason


class Round(NamedTuple):
    """Draws on their way from the device, and whose they are."""

    draws: Draw
    owners: list[Generation | None]
    """Of each row, when the draws were asked for."""
