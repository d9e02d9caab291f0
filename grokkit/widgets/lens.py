"""What the model would say if it stopped at each depth, for every token of a text."""

import dataclasses
from collections.abc import Generator, Sequence
from typing import Any

import ipywidgets
import numpy as np
from jaxtyping import Float, Int

from grokkit.analysis.lens import LensReading, TunedLens, logit_lens
from grokkit.errors import PromptError
from grokkit.language_model import LanguageModel
from grokkit.widgets.explorer import Data, TextExplorer, button, one_row, rounded, text_area

SITES = ("embed", "resid_post")
TOP = 5


@dataclasses.dataclass(frozen=True)
class Request:
    """A text, and the token to follow beside the next and the predicted ones: by id or as text."""

    text: str
    follow: int | None
    follow_text: str


class LensExplorer(TextExplorer):
    """The logit lens: the most probable next token at every depth and position.

    Pointing at a cell shows its five best tokens. A click draws how probable three tokens become
    from depth to depth at that position: the one clicked, the one that the text goes on with and
    the one that is read in the end. Any other token can be written into a field.

    ```python
    explorer = LensExplorer(lm, "The capital of France is", follow=" Paris")
    explorer  # shows it
    explorer.to_html("lens.html")
    ```
    """

    kind = "lens"
    title = "Lens explorer"

    def __init__(
        self,
        lm: LanguageModel,
        text: str = "The capital of France is Paris, and two plus two is four.",
        follow: str = "",
        tuned: TunedLens | None = None,
        max_tokens: int = 128,
    ) -> None:
        """Start with a text; the view appears before the first results do.

        **Arguments:**

        - `lm`: any model with a tokenizer.
        - `follow`: a token to follow; its text must be one token.
        - `tuned`: read through this lens instead of the plain logit lens.
        - `max_tokens`: the longest text shown.
        """
        self.tuned = tuned
        self._text = text_area("text", text)
        self._follow = ipywidgets.Text(
            follow, description="follow", continuous_update=False, placeholder="a token, e.g. ␣the",
            style={"description_width": "7em"},
        ).add_class("gk-input-follow")  # fmt: skip
        run = button("Run", self.refresh, "Read the stream of this text")
        super().__init__(
            lm,
            [self._text, ipywidgets.HBox([self._follow, run])],
            {"token": None, "follow": None},
            max_tokens,
        )
        self._text.observe(lambda _: self.refresh(), "value")
        self._follow.observe(lambda _: self._on_follow(), "value")
        self.view.observe(lambda _: self._on_state(), "state")
        self.refresh()

    def follow(self, token: str) -> None:
        """Follow the token that this text spells; ␣ may stand for a space."""
        self._follow.value = token

    def _on_follow(self) -> None:
        self._select(follow=None)  # what is written counts again, not what was clicked
        self._on_state()

    def _on_state(self) -> None:
        if self._request() != self._asked:
            self.refresh()

    def _request(self) -> Request:
        clicked = self.view.state.get("follow")
        written = self._follow.value.replace("␣", " ")
        return Request(self._text.value, clicked, "" if clicked is not None else written)

    def _compute(self, request: Request) -> Generator[Data, None, None]:
        lm = self.lm
        ids, tokens = one_row(lm, request.text, self.max_tokens)
        follow = request.follow
        if request.follow_text:
            follow = one_token(lm, request.follow_text)
        n = len(tokens)
        sites = SITES if self.tuned is None else (self.tuned.site,)
        top = min(TOP, lm.config.vocab_size)
        lines = np.zeros((*ids.shape, 3), np.int32)
        # Which tokens to follow is known after a first reading; the second compiles nothing.
        reading = logit_lens(lm, ids, sites, top=top, tuned=self.tuned, follow=lines)
        lines[:, :n] = followed_tokens(ids[0, :n], reading.top_tokens[-1, 0, :n, 0], follow)
        reading = logit_lens(lm, ids, sites, top=top, tuned=self.tuned, follow=lines)
        names = name_tokens(lm, reading.top_tokens[:, 0, :n], lines[0, :n])
        yield lens_data(tokens, names, reading, lines[0, :n], follow)


def one_token(lm: LanguageModel, text: str) -> int:
    """The one token that a text is. **Raises:** `PromptError` if it is several, or none.

    SentencePiece puts a space before a text's first word: `" Paris"` and `"Paris"` are both tried,
    the text as it is written first.
    """
    behind = lm.tokenizer.encode("\n")
    after = lm.tokenizer.encode("\n" + text)
    if after[: len(behind)] == behind and len(after) == len(behind) + 1:
        return after[-1]
    alone = lm.tokenizer.encode(text.removeprefix(" "))
    if len(alone) == 1:
        return alone[0]
    raise PromptError(f"{text!r} is {len(alone)} tokens, "
                      f"{' '.join(map(repr, lm.to_str_tokens(alone)))}; name one")  # fmt: skip


def name_tokens(lm: LanguageModel, *ids: Int[np.ndarray, "..."]) -> dict[str, str]:
    """What tokens show, by id; a JSON object's keys are text."""
    unique = np.unique(np.concatenate([i.reshape(-1) for i in ids])).tolist()
    return dict(zip(map(str, unique), lm.to_str_tokens(unique), strict=True))


def followed_tokens(
    ids: Int[np.ndarray, " position"], last: Int[np.ndarray, " position"], follow: int | None
) -> Int[np.ndarray, "position 3"]:
    """For each position: the text's next token, the one read last, and the one to follow.

    At the end of the text, and without a token to follow, the one read last stands in.
    """
    following = np.append(ids[1:], last[-1:])
    third = last if follow is None else np.full_like(last, follow)
    return np.stack([following, last, third], axis=-1)


def lens_data(
    tokens: Sequence[str],
    names: dict[str, str],
    reading: LensReading,
    lines: Int[np.ndarray, "position 3"],
    follow: int | None,
) -> Data:
    """What the view draws of one text's reading; pads after the text's end are left out."""
    n = len(tokens)
    return {
        "tokens": list(tokens),
        "depths": ["embed" if layer is None else f"layer {layer}" for _, layer in reading.depths],
        "names": names,
        "top": reading.top_tokens[:, 0, :n].tolist(),
        "probs": probabilities(reading.top_log_probs[:, 0, :n]),
        "kl": rounded(reading.kl[:, 0, :n], 3),
        "lines": lines.tolist(),
        "line_probs": probabilities(reading.followed_log_probs[:, 0, :n], 7),
        "follow": follow,
    }


def probabilities(log_probs: Float[np.ndarray, "*axes"], digits: int = 4) -> list[Any]:
    """As the view shows them."""
    return rounded(np.exp(np.asarray(log_probs, np.float64)), digits)
