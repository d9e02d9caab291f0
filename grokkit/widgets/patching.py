"""Put pieces of a clean run into a corrupted one, and see which bring the answer back."""

import dataclasses
from collections.abc import Generator, Sequence
from typing import Any

import ipywidgets
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy.special import softmax

from grokkit.analysis.grids import Experts, Grid, Heads, Positions, Runs
from grokkit.analysis.patching import LogitDifference, Sweep, attribution_patch, patch
from grokkit.errors import PromptError
from grokkit.language_model import LanguageModel
from grokkit.widgets.explorer import (
    Data,
    Explorer,
    button,
    one_row,
    rounded,
    text_area,
)
from grokkit.widgets.lens import one_token

GRIDS: dict[str, Any] = {
    "stream before each layer": lambda: Positions("resid_pre"),
    "attention output": lambda: Positions("attn_out"),
    "experts' output": lambda: Positions("moe_out"),
    "attention heads": lambda: Heads("z"),
    "experts": Experts,
}
"""What can be patched, by the name in the picker."""
METHODS = {"run every case": patch, "estimate by one gradient": attribution_patch}
TOP = 8


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that a sweep depends on."""

    clean: str
    corrupted: str
    site: str
    answer: str
    against: str
    method: str


@dataclasses.dataclass(frozen=True)
class Request:
    """A sweep, and the cell whose run to show."""

    settings: Settings
    cell: tuple[int, int] | None


@dataclasses.dataclass(frozen=True)
class Swept:
    """A sweep's results, kept to show single runs of it."""

    settings: Settings
    metric: LogitDifference
    runs: Runs
    corrupted: np.ndarray
    data: Data


class PatchingExplorer(Explorer):
    """A heat map of what each piece of the clean run restores in the corrupted one.

    The metric is the logit of the answer less that of the token against it, at the last position;
    without names for them they are what the clean and the corrupted run predict. A click on a cell
    runs that case alone and shows the next tokens that it makes most probable.

    ```python
    explorer = PatchingExplorer(lm, "27+58=", "27+51=", answer="8", against="7")
    explorer  # shows it
    explorer.wait()
    explorer.show(layer=2, case=3)
    ```
    """

    kind = "patching"
    title = "Patching explorer"

    def __init__(
        self,
        lm: LanguageModel,
        clean: str = "27+58=",
        corrupted: str = "27+51=",
        answer: str = "",
        against: str = "",
        site: str = "stream before each layer",
        method: str = "run every case",
        max_tokens: int = 64,
    ) -> None:
        """Start with two prompts of as many tokens; the sweep starts at once.

        **Arguments:**

        - `lm`: any model with a tokenizer.
        - `clean`, `corrupted`: the prompts.
        - `answer`, `against`: the tokens of the metric, as text; by default each run's prediction.
        - `site`: what to patch, one of `GRIDS`.
        - `method`: one of `METHODS`.
        - `max_tokens`: the longest prompt.

        **Raises:** `PromptError` for a site or method that does not exist.
        """
        for name, known in ((site, GRIDS), (method, METHODS)):
            if name not in known:
                raise PromptError(f"expected one of {', '.join(map(repr, known))}; found {name!r}")
        wide = {"description_width": "7em"}
        self._clean = text_area("clean", clean, rows=1)
        self._corrupted = text_area("corrupted", corrupted, rows=1)
        self._answer, self._against = (
            ipywidgets.Text(
                value, description=label, continuous_update=False, style=wide,
                placeholder=f"what the {run} run predicts",
            ).add_class(f"gk-input-{label}")
            for label, value, run in (
                ("answer", answer, "clean"), ("against", against, "corrupted")
            )
        )  # fmt: skip
        self._site = ipywidgets.Dropdown(
            options=list(GRIDS), value=site, description="patch", style=wide
        ).add_class("gk-input-site")
        self._method = ipywidgets.Dropdown(
            options=list(METHODS), value=method, description="measure", style=wide
        ).add_class("gk-input-method")
        self._inputs = [
            self._clean, self._corrupted, self._site, self._answer, self._against, self._method
        ]  # fmt: skip
        run = button("Run", self.refresh, "Run the sweep")
        rows = [
            self._clean,
            self._corrupted,
            ipywidgets.HBox([self._answer, self._against]),
            ipywidgets.HBox([self._site, self._method, run]),
        ]
        super().__init__(lm, rows, {"cell": None}, max_tokens)
        self._swept: Swept | None = None
        self._cell: list[int] | None = None
        for control in self._inputs:
            control.observe(lambda _: self._on_input(), "value")
        self.view.observe(lambda _: self._on_state(), "state")
        self.refresh()

    def show(self, layer: int, case: int) -> None:
        """Show the run of one cell, as a click on it does."""
        self._select(cell=[layer, case])

    def _on_input(self) -> None:
        self._select(cell=None)  # a cell of another sweep
        self.refresh()

    def _on_state(self) -> None:
        cell = self.view.state.get("cell")
        if cell != self._cell:
            self._cell = cell
            if cell is not None:
                self.refresh()

    def _request(self) -> Request:
        cell = self.view.state.get("cell")
        settings = Settings(*(control.value for control in self._inputs))
        return Request(settings, None if cell is None else (int(cell[0]), int(cell[1])))

    def _compute(self, request: Request) -> Generator[Data, None, None]:
        if self._swept is None or self._swept.settings != request.settings:
            swept = sweep(self.lm, request.settings, self.max_tokens)
            yield swept.data
            self._swept = swept
        if request.cell is None:
            yield self._swept.data
            return
        run = run_case(self.lm, self._swept, *request.cell)
        runs = {**self._swept.data["runs"], "{},{}".format(*request.cell): run}
        self._swept = dataclasses.replace(self._swept, data={**self._swept.data, "runs": runs})
        yield self._swept.data


def sweep(lm: LanguageModel, settings: Settings, max_tokens: int) -> Swept:
    """Run or estimate every case. **Raises:** `PromptError` for prompts that do not match."""
    prompts = {"clean": settings.clean, "corrupted": settings.corrupted}
    ids, tokens = {}, {}
    for name, text in prompts.items():
        try:
            rows, tokens[name] = one_row(lm, text, max_tokens)
        except PromptError as error:
            raise PromptError(f"{name}: {error}") from error
        ids[name] = rows[:, : len(tokens[name])]
    if len(tokens["clean"]) != len(tokens["corrupted"]):
        raise PromptError(
            f"the prompts must have equally many tokens, found {len(tokens['clean'])} "
            f"({' '.join(map(repr, tokens['clean']))}) and {len(tokens['corrupted'])} "
            f"({' '.join(map(repr, tokens['corrupted']))})"
        )
    grid: Grid = GRIDS[settings.site]()
    kept, last = {}, {}
    for name in prompts:
        logits, cache = lm.run_with_cache(ids[name], list(grid.sites))
        last[name] = np.asarray(logits[0, -1])
        kept[name] = {site: np.asarray(cache[site][:, 0]) for site in grid.sites}
    answer = _named(lm, settings.answer, last["clean"])
    against = _named(lm, settings.against, last["corrupted"])
    if answer == against:
        raise PromptError(
            f"answer and against are both {lm.to_str_tokens([answer])[0]!r}, so that their "
            f"difference is always 0; name two tokens, or change a prompt"
        )
    metric = LogitDifference(answer, against)
    found = METHODS[settings.method](
        lm, ids["clean"][0], ids["corrupted"][0], metric, grid,
        **({"progress": False} if settings.method == "run every case" else {}),
    )  # fmt: skip
    runs = Runs(lm.config, len(tokens["clean"]), kept["clean"], kept["corrupted"])
    shown = {name: describe_run(lm, last[name], metric) for name in prompts}
    names = [lm.to_str_tokens([token])[0] for token in (answer, against)]
    data = sweep_data(found, tokens, names, shown, settings)
    return Swept(settings, metric, runs, ids["corrupted"], data)


def sweep_data(
    found: Sweep,
    tokens: dict[str, list[str]],
    names: Sequence[str],
    runs: dict[str, Data],
    settings: Settings,
) -> Data:
    """What the view draws of a sweep."""
    return {
        "site": settings.site,
        "estimate": settings.method != "run every case",
        "axis": found.axis,
        "tokens": tokens,
        "answer": names[0],
        "against": names[1],
        "clean": rounded(found.clean),
        "corrupted": rounded(found.corrupted),
        "values": rounded(found.values),
        "runs": runs,
    }


def run_case(lm: LanguageModel, swept: Swept, layer: int, case: int) -> Data:
    """The corrupted prompt with one piece of the clean run in place.

    **Raises:** `PromptError` for a cell that the sweep does not have.
    """
    values = swept.data["values"]
    if not (0 <= layer < len(values) and 0 <= case < len(values[0])):
        raise PromptError(f"there is no cell {layer}, {case}; the sweep has {len(values)} layers "
                          f"and {len(values[0])} {swept.data['axis']}s")  # fmt: skip
    grid: Grid = GRIDS[swept.settings.site]()
    n = len(swept.corrupted)
    edit = grid.edit(swept.runs, np.full(n, layer), np.full(n, case))
    logits = np.asarray(lm(swept.corrupted, edits=[edit]).logits[0, -1])
    return describe_run(lm, logits, swept.metric)


def describe_run(
    lm: LanguageModel, logits: Float[np.ndarray, " vocab"], metric: LogitDifference
) -> Data:
    """The most probable next tokens of a run, and its metric."""
    probs = softmax(logits.astype(np.float64), axis=-1)
    best = np.argsort(-probs, kind="stable")[:TOP]
    return {
        "metric": rounded(metric(jnp.asarray(logits)[None, None])[0]),
        "top": [[int(i), text, rounded(probs[i])]
                for i, text in zip(best, lm.to_str_tokens(best), strict=True)],
    }  # fmt: skip


def _named(lm: LanguageModel, text: str, logits: Float[np.ndarray, " vocab"]) -> int:
    """The token that a field names, or the most probable one."""
    return one_token(lm, text.replace("␣", " ")) if text else int(logits.argmax())
