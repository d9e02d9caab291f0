"""What every explorer does: compute in the background, be busy, fail in place, save a page."""

import abc
import html
import inspect
import os
import traceback
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import ipywidgets
import numpy as np
import traitlets
from jaxtyping import Int

from grokkit.errors import GrokkitError, PromptError
from grokkit.generate import bucket, pad_right
from grokkit.language_model import LanguageModel
from grokkit.runtime import compiling, files
from grokkit.widgets.latest import Latest
from grokkit.widgets.view import View, page

Data = dict[str, Any]
MAX_PAGE_BYTES = 64 << 20


class _AbstractBox(type(ipywidgets.VBox), abc.ABCMeta):
    """So that a widget can have abstract methods."""


class Explorer(ipywidgets.VBox, metaclass=_AbstractBox):
    """Controls above, then what is going on, then the view.

    A subclass says what its controls ask for (`_request`) and computes it (`_compute`, in a
    background thread).
    """

    busy = traitlets.Bool(False, help="Whether a computation is under way.")
    error = traitlets.Unicode("", help="What was wrong with the latest request; empty if nothing.")
    kind: str
    title: str

    def __init_subclass__(cls, **options: Any) -> None:
        """Let `help` and completion show an explorer's own arguments, not a widget's."""
        super().__init_subclass__(**options)
        own = list(inspect.signature(cls.__init__).parameters.values())[1:]
        cls.__signature__ = inspect.Signature(own)

    def __init__(
        self,
        lm: LanguageModel,
        controls: Sequence[ipywidgets.Widget],
        state: Data,
        max_tokens: int,
    ) -> None:
        if max_tokens < 1:
            raise PromptError(f"max_tokens must be at least 1, found {max_tokens}")
        self.lm, self.max_tokens = lm, max_tokens
        self.view = View(kind=self.kind, state=state)
        self._status = ipywidgets.HTML()
        self._status.add_class("grokkit-status")
        self._compiling = ""  # what to say of a compilation under way
        self._latest = Latest(self._compute_announced, self._deliver, self._fail, self._change)
        self._asked: Any = None
        self.traceback = ""
        super().__init__([*controls, self._status, self.view])
        self.add_class("grokkit-explorer").add_class(f"grokkit-{self.kind}")

    def __repr__(self) -> str:
        shown = {"error": self.error} if self.error else self.view.state
        parts = "".join(f", {name}={value!r}" for name, value in shown.items())
        return f"{type(self).__name__}({self.lm.name!r}{', busy' if self.busy else ''}{parts})"

    @property
    def data(self) -> Data:
        """What the view shows: the latest results, as plain lists and numbers."""
        return self.view.data

    def refresh(self) -> None:
        """Compute what the controls ask for; results of earlier requests are dropped."""
        self._ask(self._request())

    def _ask(self, request: Any) -> None:
        if self.busy and request == self._asked:
            return  # leaving a field and pressing the button would compute the same twice
        self._asked = request
        self._latest.submit(request)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the computation to end. **Returns:** false if `timeout` seconds were too few."""
        return self._latest.wait(timeout)

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Save what is shown as one file that opens from disk, without a kernel or a network.

        Waits for a computation under way.

        **Returns:** the path written.

        **Raises:** `GrokkitError` if there is nothing to show, or more than a page can hold.
        """
        self.wait()
        if self.error or not self.data:
            raise GrokkitError(f"{type(self).__name__}: there is nothing to save: "
                               f"{self.error or 'nothing was computed'}")  # fmt: skip
        text = page(self.kind, f"{self.title}: {self.lm.name}", self._whole_data(), self.view.state)
        if len(text) > MAX_PAGE_BYTES:
            raise GrokkitError(
                f"{path}: the page would take {len(text):,} bytes, more than the "
                f"{MAX_PAGE_BYTES:,} that a browser shows well; use a shorter text"
            )
        files.write(path, text)
        return Path(path)

    def _whole_data(self) -> Data:
        """What a page needs, where the live view fetches a part at a time."""
        return self.data

    @abc.abstractmethod
    def _request(self) -> Any:
        """What the controls ask for."""

    @abc.abstractmethod
    def _compute(self, request: Any) -> Generator[Data, None, None]:
        """Data for the view, more complete each time."""

    def _select(self, **changes: Any) -> None:
        """Change what the reader has chosen, as a click does."""
        self.view.state = {**self.view.state, **changes}

    # Called by the background thread

    def _compute_announced(self, request: Any) -> Generator[Data, None, None]:
        with compiling.announced(self._say_compiling):
            yield from self._compute(request)

    def _say_compiling(self, line: str) -> None:
        self._compiling = line
        # Not to be waited for here; whoever has the lock shows what is going on.
        if self._latest.lock.acquire(blocking=False):
            try:
                self._show_status()
            finally:
                self._latest.lock.release()

    def _deliver(self, data: Data) -> None:
        self.view.data = data
        self._say("")

    def _fail(self, error: Exception) -> None:
        expected = isinstance(error, GrokkitError)
        # As text: its frames would keep the failed computation's arrays alive.
        self.traceback = "".join(traceback.format_exception(error))
        self._say(str(error) if expected else f"{type(error).__name__}: {error}")

    def _change(self, busy: bool) -> None:
        self.busy = busy
        self._show_status()

    def _say(self, error: str) -> None:
        self.error = error
        self._show_status()

    def _show_status(self) -> None:
        self.view.status = "busy" if self.busy else "failed" if self.error else "ready"
        if self.busy:
            doing = self._compiling or "computing …"
            text = f'<span class="gk-busy" role="status">{html.escape(doing)}</span>'
        elif self.error:
            text = f'<span class="gk-error" role="alert">{html.escape(self.error)}</span>'
        else:
            text = '<span class="gk-ready" role="status">ready</span>'
        self._status.value = text


class TextExplorer(Explorer):
    """An explorer of one text, which a field of its own holds."""

    _text: ipywidgets.Textarea

    @property
    def text(self) -> str:
        """The text; setting it computes what is shown of it."""
        return self._text.value

    @text.setter
    def text(self, text: str) -> None:
        self._text.value = text


def text_area(label: str, text: str, rows: int = 2) -> ipywidgets.Textarea:
    """A field for a prompt; what is typed counts once the field is left."""
    area = ipywidgets.Textarea(
        text, description=label, rows=rows, continuous_update=False,
        layout=ipywidgets.Layout(width="auto"), style={"description_width": "7em"},
    )  # fmt: skip
    return area.add_class(f"gk-input-{label.replace(' ', '-')}")


def button(label: str, clicked: Any, tooltip: str) -> ipywidgets.Button:
    """A button that calls `clicked()`."""
    width = ipywidgets.Layout(width="7em")
    made = ipywidgets.Button(description=label, tooltip=tooltip, layout=width)
    made.on_click(lambda _: clicked())
    return made.add_class(f"gk-button-{label.replace(' ', '-')}")


def one_row(
    lm: LanguageModel, text: str, max_tokens: int
) -> tuple[Int[np.ndarray, "row position"], list[str]]:
    """A text as rows that the mesh can divide, padded to one of few lengths, and its tokens.

    What follows a token cannot change what the model makes of it, so pads on the right, which
    spare compilations, change nothing before them.

    **Raises:** `PromptError` for an empty text or one of more than `max_tokens`.
    """
    ids = lm.tokenizer.encode(text)
    if not ids:
        raise PromptError("the text is empty; write something")
    if len(ids) > max_tokens:
        raise PromptError(f"the text has {len(ids)} tokens, and this explorer shows at most "
                          f"{max_tokens}; shorten it, or make one with max_tokens={len(ids)}")  # fmt: skip
    return same_rows(lm, [ids]), lm.to_str_tokens(ids)


def same_rows(lm: LanguageModel, rows: Sequence[Sequence[int]]) -> Int[np.ndarray, "row position"]:
    """Rows of token ids padded to one of few lengths, repeated as often as the mesh needs."""
    length = bucket(max(map(len, rows)), lm.config.context_length)
    return np.repeat(pad_right(rows, length, lm.config.pad_token), lm.mesh.shape["data"], axis=0)


def rounded(values: Any, digits: int = 5) -> Any:
    """A number or nested lists of them as they go into JSON: short, at any precision."""
    return np.round(np.asarray(values, np.float64), digits).tolist()
