"""Which experts each token is sent to, and what happens when one is forced or forbidden."""

import dataclasses
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.special import softmax

from grokkit.edits import Edit, ForbidExperts, RequireExperts
from grokkit.errors import PromptError
from grokkit.language_model import LanguageModel
from grokkit.plots import EXPERT_COLOURS
from grokkit.widgets.explorer import (
    Data,
    TextExplorer,
    button,
    one_row,
    rounded,
    same_rows,
    text_area,
)

SITES = ("router_probs", "expert_indices", "expert_weights")


@dataclasses.dataclass(frozen=True)
class Request:
    """A text, the experts forced and forbidden, and in which layers; `None` is all of them."""

    text: str
    forced: tuple[int, ...]
    forbidden: tuple[int, ...]
    layers: tuple[int, ...] | None


class RoutingExplorer(TextExplorer):
    """Tokens coloured by their expert in a chosen layer.

    Pointing at a token shows its router's probabilities and choice in every layer. Buttons force
    or forbid experts, in all layers or in the one shown: the colours become those of the changed
    run, and the greedy continuation and its loss are set beside the unchanged model's.

    ```python
    explorer = RoutingExplorer(lm, "Two and two make four")
    explorer  # shows it
    explorer.change(forced=[3])
    explorer.to_html("routing.html")
    ```
    """

    kind = "routing"
    title = "Routing explorer"

    def __init__(
        self,
        lm: LanguageModel,
        text: str = "The capital of France is Paris, and two plus two is four.",
        layer: int = 0,
        n_new: int = 16,
        max_tokens: int = 128,
    ) -> None:
        """Start with a text; the view appears before the first results do.

        **Arguments:**

        - `lm`: any model with a tokenizer.
        - `layer`: the layer shown first.
        - `n_new`: tokens of the continuations.
        - `max_tokens`: the longest text shown.

        **Raises:** `PromptError` for a layer that does not exist.
        """
        if not 0 <= layer < lm.config.n_layers:
            raise PromptError(f"layer: there are {lm.config.n_layers}, 0 to "
                              f"{lm.config.n_layers - 1}; found {layer}")  # fmt: skip
        self.n_new = n_new
        self._text = text_area("text", text)
        run = button("Run", self.refresh, "Compute the routing of this text")
        state = {"layer": layer, "token": None, "forced": [], "forbidden": [], "everywhere": True}
        super().__init__(lm, [self._text, run], state, max_tokens)
        self._text.observe(lambda _: self.refresh(), "value")
        self.view.observe(lambda _: self._on_state(), "state")
        self.refresh()

    @property
    def layer(self) -> int:
        """The layer whose experts colour the tokens."""
        return self.view.state["layer"]

    @layer.setter
    def layer(self, layer: int) -> None:
        self._select(layer=layer)

    def change(
        self, forced: Sequence[int] = (), forbidden: Sequence[int] = (), everywhere: bool = True
    ) -> None:
        """Force and forbid experts, as the buttons do: in all layers, or only in the one shown."""
        self._select(forced=list(forced), forbidden=list(forbidden), everywhere=everywhere)

    def _on_state(self) -> None:
        if self._request() != self._asked:
            self.refresh()

    def _request(self) -> Request:
        state = self.view.state
        layers = None if state["everywhere"] else (int(state["layer"]),)
        forced, forbidden = tuple(state["forced"]), tuple(state["forbidden"])
        # Which layers does not matter while nothing is changed in them.
        return Request(self._text.value, forced, forbidden, layers if forced or forbidden else None)

    def _compute(self, request: Request) -> Generator[Data, None, None]:
        lm = self.lm
        edits = expert_edits(lm, request)
        ids, tokens = one_row(lm, request.text, self.max_tokens)
        n = len(tokens)
        _, cache = lm.run_with_cache(ids, SITES, edits=edits)
        values = (np.asarray(cache[site])[:, 0, :n] for site in SITES)
        data = routing_data(tokens, *values)
        data["change"] = _describe(request) if edits else None
        if not edits:
            yield data
            return
        yield {**data, "outcome": {"pending": True}}
        yield {**data, "outcome": compare_continuations(lm, request.text, edits, self.n_new)}


def routing_data(
    tokens: Sequence[str],
    probs: Float[np.ndarray, "layer position expert"],
    experts: Int[np.ndarray, "layer position choice"],
    weights: Float[np.ndarray, "layer position choice"],
) -> Data:
    """What the view draws of one text's routing."""
    n_experts = probs.shape[-1]
    return {
        "tokens": list(tokens),
        "probs": rounded(probs),
        "experts": np.asarray(experts).tolist(),
        "weights": rounded(weights),
        "colours": [EXPERT_COLOURS[e % len(EXPERT_COLOURS)] for e in range(n_experts)],
    }


def expert_edits(lm: LanguageModel, request: Request) -> list[Edit]:
    """The edits that force and forbid what is asked for.

    A list of forbidden experts is filled up by repeating one, to the most that can be: another
    choice then compiles nothing.

    **Raises:** `PromptError` if an expert is both, or too many are.
    """
    n, k = lm.config.n_experts, lm.config.n_experts_per_token
    both = sorted(set(request.forced) & set(request.forbidden))
    if both:
        raise PromptError(f"expert {both[0]} is both forced and forbidden")
    if len(request.forced) > k:
        raise PromptError(f"{len(request.forced)} experts are forced, and a token uses {k}; "
                          f"release one")  # fmt: skip
    if n - len(request.forbidden) < k:
        raise PromptError(f"{len(request.forbidden)} of {n} experts are forbidden, and a token "
                          f"needs {k}; allow another")  # fmt: skip
    where: dict[str, Any] = {} if request.layers is None else {"layers": list(request.layers)}
    edits: list[Edit] = []
    if request.forbidden:
        filled = [*request.forbidden, *[request.forbidden[0]] * (n - k)][: n - k]
        edits.append(ForbidExperts(filled, **where))
    if request.forced:
        edits.append(RequireExperts(request.forced, **where))
    return edits


def compare_continuations(
    lm: LanguageModel, text: str, edits: Sequence[Edit], n_new: int
) -> dict[str, Any]:
    """Greedy continuations without and with the edits, and each one's loss under both models.

    **Returns:** `texts` [continuation], and `losses` [continuation][model] in nats a token; both
    axes are: without the edits, with them. A continuation that ends at once has loss `None`.
    """
    prompt = lm.tokenizer.encode(text)
    written = [
        [t.id for t in lm.stream(text, max_len=n_new, temperature=0.0, edits=some)]
        for some in ([], edits)
    ]
    rows = same_rows(lm, [prompt + new for new in written])
    logits = [np.asarray(lm(rows, edits=some).logits) for some in ([], edits)]
    copies = lm.mesh.shape["data"]
    losses = [
        [mean_loss(each[i * copies], prompt + new, len(prompt)) for each in logits]
        for i, new in enumerate(written)
    ]
    decoder = [lm.tokenizer.stream_decoder(prompt) for _ in written]
    texts = ["".join(map(d.push, new)) for d, new in zip(decoder, written, strict=True)]
    return {"texts": texts, "losses": losses}


def mean_loss(
    logits: Float[np.ndarray, "position vocab"], ids: Sequence[int], start: int
) -> float | None:
    """Mean negative log-probability, in nats, of the tokens from `start` on; `None` for none."""
    new = np.asarray(ids[start:])
    if not len(new):
        return None
    probs = softmax(logits[start - 1 : len(ids) - 1].astype(np.float64), axis=-1)
    return round(float(-np.log(probs[np.arange(len(new)), new]).mean()), 4)


def _describe(request: Request) -> str:
    words = [f"expert {e} forced" for e in request.forced]
    words += [f"expert {e} forbidden" for e in request.forbidden]
    where = "in every layer" if request.layers is None else f"in layer {request.layers[0]}"
    return f"{', '.join(words)} {where}"
