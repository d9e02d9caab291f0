"""Where each token looks: the attention pattern of every head."""

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt16

from grokkit.errors import PromptError
from grokkit.language_model import LanguageModel
from grokkit.taps import Capture
from grokkit.widgets.explorer import Data, TextExplorer, button, one_row, text_area

STEPS = 4095
"""Patterns are sent as 12-bit integers, two letters each: this many steps from 0 to 1."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


class AttentionExplorer(TextExplorer):
    """The attention patterns of a text, head by head.

    Pickers choose the layer and the head. Pointing at a token lights up the tokens that it looks
    at, as brightly as it attends to them.

    ```python
    explorer = AttentionExplorer(lm, "the cat sat on the mat and the cat", layer=2, head=3)
    explorer  # shows it
    explorer.to_html("attention.html")
    ```
    """

    kind = "attention"
    title = "Attention explorer"

    def __init__(
        self,
        lm: LanguageModel,
        text: str = "The cat sat on the mat. The dog sat on the cat.",
        layer: int = 0,
        head: int = 0,
        max_tokens: int = 128,
    ) -> None:
        """Start with a text; the view appears before the first results do.

        **Arguments:**

        - `lm`: any model with a tokenizer.
        - `layer`, `head`: what is shown first.
        - `max_tokens`: the longest text shown.

        **Raises:** `PromptError` for a layer or head that does not exist.
        """
        config = lm.config
        if not (0 <= layer < config.n_layers and 0 <= head < config.n_heads):
            raise PromptError(f"expected a layer from 0 to {config.n_layers - 1} and a head from 0 "
                              f"to {config.n_heads - 1}, found {layer} and {head}")  # fmt: skip
        self._text = text_area("text", text)
        run = button("Run", self.refresh, "Compute the attention of this text")
        state = {"layer": layer, "head": head, "token": None}
        super().__init__(lm, [self._text, run], state, max_tokens)
        self._tokens: list[str] = []
        self._patterns = np.zeros((config.n_layers, config.n_heads, 0), np.uint16)
        self._text.observe(lambda _: self.refresh(), "value")
        self.view.observe(self._on_state, "state")
        self.refresh()

    def show(self, layer: int, head: int) -> None:
        """Show this head's pattern."""
        self._select(layer=layer, head=head)

    def _request(self) -> str:
        return self._text.value

    def _compute(self, request: str) -> Generator[Any, None, None]:
        ids, tokens = one_row(self.lm, request, self.max_tokens)
        _, cache = self.lm.run_with_cache(ids, Capture("pattern", positions=slice(len(tokens))))
        pattern = np.asarray(cache["pattern"])[:, 0, :, :, : len(tokens)]
        yield tokens, pack_causal(pattern)

    def _deliver(self, data: Any) -> None:
        self._tokens, self._patterns = data
        super()._deliver(self._part([self.view.state["layer"]]))

    def _on_state(self, change: Any) -> None:
        # Of a large model all layers together would be too much to send: the one shown will do.
        layer = change["new"]["layer"]
        with self._latest.lock:
            if self._tokens and str(layer) not in self.data.get("patterns", {}):
                self.view.data = self._part([layer])

    def _whole_data(self) -> Data:
        return self._part(range(self.lm.config.n_layers))

    def _part(self, layers: Sequence[int]) -> Data:
        return attention_data(self._tokens, self._patterns, layers)


def attention_data(
    tokens: Sequence[str], packed: UInt16[np.ndarray, "layer head entry"], layers: Sequence[int]
) -> Data:
    """What the view draws: the packed patterns of some layers."""
    letters = np.frombuffer(LETTERS.encode(), np.uint8)
    pairs = {i: np.stack([packed[i] >> 6, packed[i] & 63], axis=-1) for i in layers}
    return {
        "tokens": list(tokens),
        "n_layers": packed.shape[0],
        "n_heads": packed.shape[1],
        "steps": STEPS,
        "letters": LETTERS,
        "patterns": {str(i): letters[pair].tobytes().decode() for i, pair in pairs.items()},
    }


def pack_causal(pattern: Float[np.ndarray, "*lead query key"]) -> UInt16[np.ndarray, "*lead entry"]:
    """The part on and below the diagonal, row by row, in `STEPS` steps; above it all is zero."""
    rows, columns = np.tril_indices(pattern.shape[-1])
    kept = np.clip(pattern[..., rows, columns], 0, 1)
    return np.round(kept.astype(np.float64) * STEPS).astype(np.uint16)
