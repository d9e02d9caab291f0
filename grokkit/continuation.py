"""From the tokens that generation draws to texts."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import jax

from grokkit.generate import Piece
from grokkit.inspection import GenerationRecorder
from grokkit.processes import to_host
from grokkit.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class StreamedToken:
    """One token as it is generated.

    Probabilities are the model's own: softmax of the logits, before temperature and nucleus.
    """

    id: int
    text: str
    """What this token adds to the text; empty while a character is not complete."""
    prob: float
    alternatives: tuple[tuple[int, str, float], ...]
    """The most probable tokens, best first: id, text and probability."""

    def __str__(self) -> str:
        return self.text


def collect(
    rounds: Iterable[Piece],
    n: int,
    max_len: int,
    eos_token: int,
    recorder: GenerationRecorder | None = None,
) -> tuple[list[list[int]], int]:
    """The new tokens of every text, each up to its end-of-text token or `max_len` tokens.

    **Arguments:**

    - `rounds`: what `generate_tokens` yields; no further than needed.
    - `n`: how many texts; rows after them are filling.
    - `max_len`: most new tokens a text.
    - `eos_token`: ends a text and is not kept.
    - `recorder`: is given each round's captured activations.

    **Returns:** the tokens of each text, and how many new ones the longest has fed to the model.
    """
    new: list[list[int]] = [[] for _ in range(n)]
    finished = [False] * n
    for i_round, piece in enumerate(rounds):
        for step in to_host(piece.draws.token):
            for i, token in enumerate(step.tolist()):
                if finished[i] or len(new[i]) == max_len:
                    continue
                if token == eos_token:
                    finished[i] = True
                else:
                    new[i].append(token)
        if recorder is not None:
            recorder.add(piece.captured, prefill=i_round == 0)
        if all(finished):
            break
    return new, max(len(row) - (not f) for row, f in zip(new, finished, strict=True))


def continuation(tokenizer: Tokenizer, prompt: Sequence[int], new: Sequence[int]) -> str:
    """What new tokens add to a prompt's text."""
    decoder = tokenizer.stream_decoder(prompt)
    return "".join(decoder.push(token) for token in new)


def stream(
    rounds: Iterable[Piece], prompt: Sequence[int], tokenizer: Tokenizer, eos_token: int
) -> Iterator[StreamedToken]:
    """The first row's tokens as they are drawn, one a round, up to its end-of-text token."""
    decoder = tokenizer.stream_decoder(prompt)
    for piece in rounds:
        draw = jax.tree.map(lambda a: to_host(a)[0, 0], piece.draws)
        token = int(draw.token)
        if token == eos_token:
            return
        shown = tokenizer.str_tokens(draw.top_tokens)
        alternatives = zip(draw.top_tokens.tolist(), shown, draw.top_probs.tolist(), strict=True)
        yield StreamedToken(token, decoder.push(token), float(draw.prob), tuple(alternatives))
