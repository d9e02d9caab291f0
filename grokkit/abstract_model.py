"""What a model is to everything above it, whether its layers are in memory or on disk."""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree

from grokkit.config import GrokConfig
from grokkit.errors import PromptError
from grokkit.kv_cache import KVCache
from grokkit.layers.block import Block, Rows
from grokkit.layers.embedding import Embedding
from grokkit.layers.ends import Ends, enter, leave
from grokkit.layers.rms_norm import RMSNorm
from grokkit.taps import Capture, Change

PREFILL_PART = 1024
"""Tokens of a long prompt that are run at once."""

Step = Callable[[Any], tuple[Any, PyTree]]
"""Takes a carry and calls a model; returns the next carry and what to keep."""
Group = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Rows of tokens [batch, position], numbers [batch, position] for a `Read`, and how many tokens of
each row are real [batch]."""
Read = Callable[[Array, Array], Array]
"""Takes logits [batch, position, vocab] and those positions' numbers; returns [batch, position]."""


class Output(eqx.Module):
    """What a forward pass returns."""

    logits: Float[Array, "batch position vocab"]
    """Next-token logits, float32."""
    cache: KVCache | None
    """Keys and values with the new tokens', if a cache was given."""
    captured: dict[str, Any]
    """What the captures kept, by their key; from layers, with a leading layer axis."""


class Resume(NamedTuple):
    """The middle of a forward pass: for cases that differ from one layer on only."""

    layer: Int[Array, ""]
    """The first layer to run; one program serves all."""
    resid_pre: Float[Array, "batch position d_model"]
    """The residual stream that enters it."""


class Model(ABC):
    """What runs tokens through a stack of layers, wherever the layers are.

    `Grok` has them in memory and is a pytree; `StreamedGrok` reads one after the other from disk.
    Run either under `jax.set_mesh(mesh)` with the mesh its arrays lie on.
    """

    shares_passes: ClassVar[bool]
    """Whether a pass costs so much that all rows at hand share one, however many and long; if not,
    a call is given `PREFILL_PART` tokens or so."""
    runs_ahead: ClassVar[bool]
    """Whether tokens are worth computing before they are asked for: the next ones while the last
    are read."""

    embedding: Embedding
    final_norm: RMSNorm
    config: GrokConfig
    dtype: Any
    """What matrix products round their operands to (see `einsum32`), float32 or bfloat16.
    Activations themselves are float32 in both."""

    @property
    def ends(self) -> Ends:
        """The parts before and after the layers."""
        return Ends(self.embedding, self.final_norm, self.config, self.dtype)

    def __call__(
        self,
        tokens: Int[Array, "batch position"],
        *,
        cache: KVCache | None = None,
        lengths: Int[Array, " batch"] | None = None,
        last_only: bool = False,
        captures: tuple[Capture, ...] = (),
        edits: tuple[Change, ...] = (),
        resume: Resume | None = None,
    ) -> Output:
        """Next-token logits of every position.

        **Arguments:**

        - `tokens`: token ids. Pad tokens are never attended to.
        - `cache`: the tokens before these; the returned cache holds both. Inside a compiled function
            its lengths are not known: see there that it has room for `tokens`, pads included.
        - `lengths`: how many of each row's tokens are real when rows are padded on the right; all
            by default. The cache's lengths grow by this much.
        - `last_only`: give the logits of each row's last real token only, as one position.
        - `captures`, `edits`: what to keep and what to change; resolved against this model.
        - `resume`: begin at a layer, without captures or cache. Edits below it are not made.

        **Returns:** an `Output`.

        **Raises:** `PromptError` if the cache is known to have no room for `tokens`.
        """
        if cache is not None:
            check_room(cache, tokens.shape[1])
        x, rows, before = enter(self.ends, tokens, cache, lengths, captures, edits)
        if resume is not None:
            assert cache is None and not captures, "resume goes with neither cache nor captures"
        x, cache, within = self._run_layers(x, rows, cache, captures, edits, resume)
        logits, after = leave(self.ends, x, rows, last_only, captures, edits)
        if cache is not None:
            length = rows.start + rows.counts
            cache = dataclasses.replace(cache, visible=rows.visible, length=length, is_new=False)
        return Output(logits, cache, within | before | after)

    @abstractmethod
    def _run_layers(
        self,
        x: Float[Array, "batch position d_model"],
        rows: Rows,
        cache: KVCache | None,
        captures: tuple[Capture, ...],
        edits: tuple[Change, ...],
        resume: Resume | None,
    ) -> tuple[Float[Array, "batch position d_model"], KVCache | None, dict[str, Any]]:
        """The stream after all layers, the cache, and what was kept; `x` may be used up."""

    @abstractmethod
    def run(self, program: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function of a model and of other arguments.

        **Arguments:**

        - `program`: made by `jax.jit` or `eqx.filter_jit`; its first argument is the model. It is
            compiled whole if the layers are in memory; otherwise it runs step by step, and what it
            calls of the model is compiled.
        """

    @abstractmethod
    def repeat(self, step: Step, carry: Any, n: int) -> tuple[Any, PyTree]:
        """`step` done `n` times, in a program.

        **Returns:** the last carry, and what was kept, stacked.
        """

    @abstractmethod
    def layers(
        self, start: int = 0, stop: int | None = None, backwards: bool = False
    ) -> Generator[Block]:
        """One layer after the other, for what runs them one by one.

        Let go of each before asking for the next, and see that nothing computed from it is still
        under way: see `LayerReader.layers`. Close the generator.

        **Arguments:**

        - `start`, `stop`: the first layer, and the one to stop before; by default all are given.
        - `backwards`: give the last of them first.
        """

    @abstractmethod
    def part(self, layer: int, choose: Callable[[Block], PyTree]) -> PyTree:
        """Some arrays of one layer, those that `choose` takes from its tree."""

    @abstractmethod
    def read_logits(self, groups: Sequence[Group], read: Read, mesh: Mesh) -> Iterator[np.ndarray]:
        """What a function makes of the logits of groups of rows, long rows in parts.

        **Arguments:**

        - `groups`, `read`: see `Group` and `Read`.
        - `mesh`: where the model lies.

        **Returns:** for each group what `read` made [batch, position].
        """

    @abstractmethod
    def shapes(self) -> Any:
        """The whole model as a pytree, of arrays or of their shapes, dtypes and layouts."""

    @abstractmethod
    def digest(self) -> str:
        """What tells the weights from other weights, or from the same ones elsewhere."""

    def pass_nbytes(self) -> int:
        """Bytes of layers that a pass reads from disk."""
        return 0

    def read_rate(self) -> float:
        """Bytes a second at which it reads them, as measured."""
        return math.inf


def check_room(cache: KVCache, n: int) -> None:
    """Refuse tokens that would be written over others: writing beyond the end moves back.

    **Raises:** `PromptError` if the cache is known to have no room for `n` more.
    """
    known = isinstance(cache.length, jax.Array) and not isinstance(cache.length, Tracer)
    held = int(cache.length.max()) if known else 0
    if held + n > cache.capacity:
        raise PromptError(
            f"cache: expected room for {n} more tokens, found {cache.capacity - held} of "
            f"{cache.capacity} places free; make a cache of a larger capacity"
        )
