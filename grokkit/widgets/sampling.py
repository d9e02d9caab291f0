"""Write with the model token by token, and take another turn at any of them."""

import dataclasses
from collections.abc import Generator, Sequence
from typing import Any

import ipywidgets

from grokkit.continuation import StreamedToken
from grokkit.errors import PromptError
from grokkit.language_model import LanguageModel
from grokkit.widgets.explorer import Data, Explorer, button, rounded, text_area

Entry = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, how to sample, and what is kept of the tokens drawn before."""

    prompt: str
    temperature: float
    top_p: float
    seed: int
    max_len: int
    kept: tuple[Entry, ...] = ()


class SamplingPlayground(Explorer):
    """A prompt is continued; each token appears as it is drawn.

    A click on a token shows what the model found most probable in its place; a click on one of
    those continues from it instead. Probabilities are the model's own, before temperature and
    nucleus.

    ```python
    playground = SamplingPlayground(lm, "The duty of the Congress is", temperature=0.7)
    playground  # shows it
    playground.wait()
    playground.branch(2, playground.alternatives(2)[1][0])  # the second best third token
    ```
    """

    kind = "sampling"
    title = "Sampling playground"

    def __init__(
        self,
        lm: LanguageModel,
        prompt: str = "The duty of the Congress is",
        temperature: float = 0.8,
        top_p: float = 1.0,
        seed: int = 0,
        max_len: int = 40,
        max_tokens: int = 256,
    ) -> None:
        """Start with a prompt, which is continued at once.

        **Arguments:**

        - `lm`: any model with a tokenizer.
        - `temperature`, `top_p`, `seed`: as in `LanguageModel.generate`.
        - `max_len`: new tokens.
        - `max_tokens`: the longest prompt.
        """
        self._prompt = text_area("prompt", prompt)
        self._temperature = _slider("temperature", temperature, 0.0, max(2.0, temperature))
        self._top_p = _slider("top-p", top_p, 0.05, 1.0)
        self._seed = _whole("seed", seed, 0, 2**31 - 1)
        self._max_len = _whole("length", max_len, 1, lm.config.context_length)
        run = button("Continue", self.refresh, "Continue the prompt from its end")
        super().__init__(
            lm,
            [
                self._prompt,
                ipywidgets.HBox([self._temperature, self._top_p]),
                ipywidgets.HBox([self._seed, self._max_len, run]),
            ],
            {"token": None},
            max_tokens,
        )
        self._inputs = [
            self._prompt, self._temperature, self._top_p, self._seed, self._max_len
        ]  # fmt: skip
        for control in self._inputs:
            control.observe(lambda _: self.refresh(), "value")
        self.view.on_msg(lambda _, content, __: self._on_click(content))
        self.refresh()

    @property
    def prompt(self) -> str:
        """The prompt; setting it continues it."""
        return self._prompt.value

    @prompt.setter
    def prompt(self, prompt: str) -> None:
        self._prompt.value = prompt

    @property
    def token_ids(self) -> list[int]:
        """The tokens drawn so far."""
        return [entry["id"] for entry in self.data.get("drawn", [])]

    def alternatives(self, at: int) -> list[tuple[int, str, float]]:
        """The most probable tokens in the place of token `at`: id, text and probability."""
        return [tuple(each) for each in self.data["drawn"][at]["alternatives"]]

    def branch(self, at: int, token: int) -> None:
        """Continue from another token in the place of token `at`: one of its alternatives.

        **Raises:** `PromptError` if it is none of them.
        """
        drawn = self.data.get("drawn", [])
        if not 0 <= at < len(drawn):
            raise PromptError(f"there is no token {at}; {len(drawn)} were drawn")
        kept = (*drawn[:at], chosen_instead(drawn[at], token))
        self._ask(dataclasses.replace(self._request(), kept=kept))

    def _on_click(self, content: dict[str, Any]) -> None:
        try:
            self.branch(content["at"], content["id"])
        except PromptError as error:  # the page showed tokens that are gone by now
            self._fail(error)

    def _request(self) -> Request:
        prompt, temperature, top_p, seed, max_len = (control.value for control in self._inputs)
        return Request(prompt, temperature, top_p, seed, max_len)

    def _compute(self, request: Request) -> Generator[Data, None, None]:
        lm = self.lm
        ids = lm.tokenizer.encode(request.prompt)
        if len(ids) > self.max_tokens:
            raise PromptError(f"the prompt has {len(ids)} tokens, and this playground takes at "
                              f"most {self.max_tokens}; shorten it, or make one with "
                              f"max_tokens={len(ids)}")  # fmt: skip
        drawn = list(request.kept)
        data = {"prompt": request.prompt, "drawn": drawn, "ended": False, "done": False}
        left = request.max_len - len(drawn)
        stream = lm.stream(
            [*ids, *(entry["id"] for entry in drawn)], max(left, 1), request.temperature,
            request.top_p, request.seed,
        )  # fmt: skip
        yield {**data, "drawn": list(drawn)}
        for token in stream if left > 0 else ():
            drawn.append(as_entry(token, lm.to_str_tokens([token.id])[0]))
            yield {**data, "drawn": list(drawn)}
        yield {**data, "ended": len(drawn) < request.max_len, "done": True}


def as_entry(token: StreamedToken, shown: str) -> Entry:
    """A drawn token as the view shows it."""
    return {
        "id": token.id,
        "text": shown,
        "prob": rounded(token.prob),
        "alternatives": [[i, text, rounded(p)] for i, text, p in token.alternatives],
        "by_hand": False,
    }


def chosen_instead(entry: Entry, token: int) -> Entry:
    """The same place with one of its alternatives in it. **Raises:** `PromptError` for another."""
    for alternative, text, prob in entry["alternatives"]:
        if alternative == token:
            return {**entry, "id": token, "text": text, "prob": prob, "by_hand": True}
    known: Sequence[int] = [each[0] for each in entry["alternatives"]]
    raise PromptError(f"token {token} is no alternative there; they are {known}")


def _slider(label: str, value: float, low: float, high: float) -> ipywidgets.FloatSlider:
    made = ipywidgets.FloatSlider(
        value, min=low, max=high, step=0.05, description=label, continuous_update=False,
        style={"description_width": "7em"},
    )  # fmt: skip
    return made.add_class(f"gk-input-{label}")


def _whole(label: str, value: int, low: int, high: int) -> ipywidgets.BoundedIntText:
    made = ipywidgets.BoundedIntText(
        value, min=low, max=high, description=label, style={"description_width": "7em"},
        layout=ipywidgets.Layout(width="14em"),
    )  # fmt: skip
    return made.add_class(f"gk-input-{label}")
