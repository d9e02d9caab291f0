"""What a user holds: a model, its tokenizer and the mesh it lies on."""

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from grokkit import capturing, scoring
from grokkit.abstract_model import Model, Output
from grokkit.activation_cache import ActivationCache
from grokkit.checkpoint import Checkpoint
from grokkit.config import GrokConfig
from grokkit.continuation import StreamedToken, collect, continuation, stream
from grokkit.edits import Edit, resolve
from grokkit.errors import GrokkitError, PromptError, TokenizerError
from grokkit.generate import check_prompts, generate_tokens, pad_right
from grokkit.inspection import (
    Bill,
    Captures,
    GenerationRecorder,
    as_cache,
    as_captures,
    bill,
)
from grokkit.model import Grok
from grokkit.processes import same_call, spans_processes
from grokkit.sampling import Allowed, Sampling
from grokkit.scoring import Score
from grokkit.sharding import release
from grokkit.stored_captures import StoredCaptures
from grokkit.taps import Capture, Change
from grokkit.tokenizer import Tokenizer

Text = str | Sequence[str]
Tokens = Text | Sequence[int] | Sequence[Sequence[int]] | Int[np.ndarray, "..."] | Int[Array, "..."]


@functools.partial(jax.jit, static_argnames=("captures",))
def _forward(
    model: Model,
    tokens: Array,
    lengths: Array,
    captures: tuple[Capture, ...],
    edits: tuple[Change, ...],
) -> Output:
    return model(tokens, lengths=lengths, captures=captures, edits=edits)


class LanguageModel:
    """A Grok-1-shaped model ready to use; `grokkit.load` makes one."""

    def __init__(
        self,
        model: Model,
        mesh: Mesh,
        tokenizer: Tokenizer | None,
        name: str = "model",
    ):
        """Put together parts that fit: see `load` for the usual way.

        **Arguments:**

        - `model`: the Equinox pytree, laid out over `mesh`, or a streamed model.
        - `mesh`: with axes `data` and `model`, as `make_mesh` makes it.
        - `tokenizer`: with as many pieces as the model's vocabulary, or `None` to work with token
            ids only.
        - `name`: what error messages and the `repr` call it.
        """
        if tokenizer is not None and tokenizer.vocab_size != model.config.vocab_size:
            raise TokenizerError(
                f"{name}: expected a tokenizer of {model.config.vocab_size} pieces, as the model's "
                f"vocabulary, found {tokenizer.vocab_size}"
            )
        self.runnable = model
        """What is called: the pytree, or a model streamed from disk."""
        self.mesh = mesh
        self.checkpoint: Checkpoint | None = None
        """Where the weights come from, if they were loaded."""
        self._tokenizer = tokenizer
        self.name = name

    @property
    def config(self) -> GrokConfig:
        """The model's sizes and constants."""
        return self.runnable.config

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. **Raises:** `TokenizerError` if the checkpoint came without one."""
        if self._tokenizer is None:
            raise TokenizerError(
                f"{self.name}: this needs text, and there is no tokenizer.model beside the "
                f"weights; put it there, or pass token ids"
            )
        return self._tokenizer

    def __repr__(self) -> str:
        c = self.config
        mesh = " x ".join(f"{axis}={size}" for axis, size in self.mesh.shape.items())
        device = self.mesh.devices.flat[0].device_kind
        return (
            f"LanguageModel({self.name!r}: {c.n_params:,} parameters, {c.n_layers} layers, "
            f"d_model {c.d_model}, {c.n_heads} heads, {c.n_experts} experts of which "
            f"{c.n_experts_per_token} a token, vocab {c.vocab_size}, context {c.context_length}; "
            f"{jnp.dtype(self.runnable.dtype).name}; mesh {mesh} of {device}"
            f"{'; layers streamed from disk' if self.runnable.pass_nbytes() else ''})"
        )

    @property
    def model(self) -> Grok:
        """The Equinox pytree, all weights in memory. **Raises:** `GrokkitError` if it is streamed."""
        if not isinstance(self.runnable, Grok):
            raise GrokkitError(
                f"{self.name}: this needs all layers in memory at once, and they are streamed from "
                f"disk; load the model without stream=True, on as many devices as it takes "
                f"(`grokkit plan` says how many)"
            )
        return self.runnable

    # Text and tokens

    def to_tokens(self, text: Text) -> Int[np.ndarray, "batch position"]:
        """Token ids of one text or several, as rows padded on the right.

        No [BOS] is added: the official code encodes without one.
        """
        texts = [text] if isinstance(text, str) else list(text)
        ids = [self.tokenizer.encode(t) for t in texts]
        if not ids or not all(ids):
            raise PromptError("expected at least one text, none empty")
        return pad_right(ids, max(map(len, ids)), self.config.pad_token)

    def to_string(self, ids: Sequence[int] | Int[np.ndarray, "..."] | Int[Array, "..."]) -> Any:
        """The text that a row of ids spells; for several rows, a list of texts."""
        rows = np.asarray(ids)
        if rows.ndim == 2:
            return [self.tokenizer.decode(row) for row in rows]
        return self.tokenizer.decode(np.atleast_1d(rows))

    def to_str_tokens(self, text: str | Sequence[int] | np.ndarray | Array) -> list[str]:
        """What each token of a text, or of one row of ids, shows."""
        ids = self.tokenizer.encode(text) if isinstance(text, str) else np.asarray(text)
        return self.tokenizer.str_tokens(np.asarray(ids).reshape(-1))

    # Running

    def __call__(self, tokens: Tokens, edits: Sequence[Edit] = ()) -> Output:
        """Next-token logits at every position.

        **Arguments:**

        - `tokens`: a text, several texts, or token ids [position] or [batch, position]. Shorter
            texts are padded on the right; their logits beyond the end mean nothing.
        - `edits`: changes to make inside.

        **Returns:** an `Output`; `out.logits` is [batch, position, vocab], float32.

        **Raises:** `PromptError` for ids that do not exist or too long a text.
        """
        ids, lengths = self.prepare(tokens)
        return self._run(ids, lengths, (), edits)

    def run_with_cache(
        self, tokens: Tokens, captures: Captures = None, edits: Sequence[Edit] = ()
    ) -> tuple[Float[Array, "batch position vocab"], ActivationCache]:
        """A forward pass that keeps activations.

        **Arguments:**

        - `tokens`: as for calling the model.
        - `captures`: names of sites (`grokkit.SITES` lists them) or `Capture`s; every site by
            default. `bill` says beforehand what they take.
        - `edits`: changes to make inside. A site is captured as the edits leave it.

        **Returns:** the logits and an `ActivationCache`.

        **Raises:** `SiteError` for a site, layer or position that does not exist.
        """
        ids, lengths = self.prepare(tokens)
        wanted = as_captures(captures, self.config, ids.shape[1])
        out = self._run(ids, lengths, wanted, edits)
        return out.logits, as_cache(wanted, out.captured, self.config)

    def capture_to(
        self,
        directory: str | os.PathLike[str],
        tokens: Tokens,
        captures: Captures = None,
        edits: Sequence[Edit] = (),
        rows: int | None = None,
        progress: bool = True,
    ) -> StoredCaptures:
        """As `run_with_cache`, written to disk layer by layer, so that little is ever in memory.

        All prompts share one pass over the layers. If it is cut off, the same call goes on at the
        layer where it stopped and gives the same files; once all is there it only opens them. Of
        several processes all make the same call: process 0 writes, and all read what is there.

        **Arguments:**

        - `directory`: a new or empty one, or one that the same call began to fill.
        - `tokens`, `captures`, `edits`: as for `run_with_cache`. Name `"logits"` among the captures
            to keep those.
        - `rows`: prompts that go through a layer at once; by default as many as have 1,024 tokens
            together. Reductions see so many. With edits it is all of them.
        - `progress`: show a progress bar, in prompts of a layer.

        **Returns:** a `StoredCaptures`: an `ActivationCache` that reads from the files what is asked
        for. `grokkit.open_captures(directory)` opens it again.

        **Raises:** `CaptureError` if the directory holds something else, or the captures of another
        request, or if another process writes there; or if the disk is too full. `SiteError` and
        `PromptError` as `run_with_cache`; `ProcessError` if several processes differ or one fails.
        """
        ids, lengths = self.prepare(tokens)
        wanted = as_captures(captures, self.config, ids.shape[1])
        resolved = self.resolve(edits, lengths.tolist())
        path = Path(directory).expanduser().absolute()
        return capturing.capture_to(
            self.runnable, self.mesh, path, ids, lengths, wanted, resolved, rows, progress
        )

    def bill(self, tokens: Tokens, captures: Captures = None) -> Bill:
        """Bytes that `run_with_cache` would keep, from shapes alone; nothing runs.

        Of a model streamed from disk it also says how long a pass reads, at the rate of the passes
        made so far; before the first, one matrix is read to measure it.
        """
        ids, lengths = self._rows(tokens)
        wanted = as_captures(captures, self.config, ids.shape[1])
        model = self.runnable
        with jax.set_mesh(self.mesh):
            out = jax.eval_shape(lambda *a: _forward(*a, wanted, ()), model.shapes(), ids, lengths)
        found = bill({c.key: out.captured[c.key] for c in wanted})
        return dataclasses.replace(
            found, pass_nbytes=model.pass_nbytes(), read_rate=model.read_rate()
        )

    def _run(
        self,
        ids: np.ndarray,
        lengths: np.ndarray,
        captures: tuple[Capture, ...],
        edits: Sequence[Edit],
    ) -> Output:
        resolved = self.resolve(edits, lengths.tolist())
        with jax.set_mesh(self.mesh):
            return release(self.runnable.run(_forward, ids, lengths, captures, resolved))

    def prepare(
        self, tokens: Tokens
    ) -> tuple[Int[np.ndarray, "batch position"], Int[np.ndarray, " batch"]]:
        """Token ids as rows and how many of each are real. Several processes must all call it.

        **Raises:** `PromptError`; `ProcessError` if other processes have other tokens.
        """
        ids, lengths = self._rows(tokens)
        same_call("a pass over tokens", ids.tolist(), spans_processes(self.mesh))
        return ids, lengths

    def _rows(self, tokens: Any) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(tokens, str) or (len(tokens) and isinstance(tokens[0], str)):
            texts = [tokens] if isinstance(tokens, str) else list(tokens)
            ids = self.to_tokens(texts)
            lengths = np.array([len(self.tokenizer.encode(t)) for t in texts], np.int32)
        else:
            try:
                ids = np.atleast_2d(np.asarray(tokens))
            except ValueError as e:
                raise PromptError(
                    "tokens: expected rows of token ids of one length, found several; pass texts, "
                    "or fill the shorter rows up with the pad token"
                ) from e
            if ids.ndim != 2 or ids.dtype.kind not in "iu" or ids.size == 0:
                raise PromptError(
                    f"tokens: expected text, or integers [batch, position], found an array of "
                    f"shape {ids.shape} and dtype {ids.dtype}"
                )
            lengths = np.full(ids.shape[0], ids.shape[1], np.int32)
        check_prompts(self.config, self.mesh, ids.tolist(), 0)
        return ids.astype(np.int32), lengths

    # Scoring

    def score(
        self, prompt: Text | Sequence[int], continuation: Text | Sequence[int]
    ) -> Score | list[Score]:
        """How probable the model holds a given continuation, token by token; see `scoring.score`."""
        same_call("score", (prompt, continuation), spans_processes(self.mesh))
        return scoring.score(
            self.runnable, self.mesh, lambda text: self.tokenizer.encode(text), prompt, continuation
        )

    def perplexity(
        self,
        text: str | Sequence[int],
        window: int | None = None,
        stride: int | None = None,
        progress: bool = True,
    ) -> float:
        """Perplexity of a text of any length, by a sliding window; see `scoring.perplexity`."""
        ids = self.tokenizer.encode(text) if isinstance(text, str) else [*map(int, text)]
        same_call("perplexity", (ids, window, stride), spans_processes(self.mesh))
        return scoring.perplexity(self.runnable, self.mesh, ids, window, stride, progress)

    # Generating

    def generate(
        self,
        prompt: Text,
        max_len: int = 100,
        temperature: float | Sequence[float] = 1.0,
        top_p: float | Sequence[float] = 1.0,
        seed: int | Sequence[int] = 0,
        edits: Sequence[Edit] = (),
        *,
        top_k: int | Sequence[int] = 0,
        min_p: float | Sequence[float] = 0.0,
        repetition_penalty: float | Sequence[float] = 1.0,
        allowed: Allowed | None = None,
    ) -> str | list[str]:
        """Continue a text, or each of several, until an end-of-text token or `max_len` tokens.

        **Arguments:**

        - `prompt`: one text or several. They may differ in length; each gets the continuation
            that it would get alone.
        - `max_len`: most new tokens, at least 1. Prompt and new tokens must fit in the context.
        - `temperature`: the logits are divided by it; 0 always takes the most probable token.
        - `top_p`: draw only from the fewest most probable tokens that together reach this.
        - `seed`: the same seed gives the same text, on any mesh. Text i uses `seed + i`, or its
            own if a sequence is given.
        - `edits`: changes to make inside, at every token.
        - `top_k`: draw only from this many most probable tokens; 0 sets no limit.
        - `min_p`: draw only tokens at least this many times as probable as the most probable one.
        - `repetition_penalty`: above 1, tokens that the text holds already become less probable.
        - `allowed`: ids of the only tokens that may be drawn, or a mask [vocab] or [batch, vocab]
            of bools or of 0 and 1.
            Leave the end-of-text token out and no text ends before `max_len`.

        `grokkit.sampling` says how the settings work together.

        **Returns:** the new text, without the prompt; a list of them for a list of prompts. A
            character that is cut off in the midst of its bytes is left out.

        **Raises:** `PromptError` for a setting or prompt that cannot be honoured.
        """
        sampling = Sampling(temperature, top_p, seed, top_k, min_p, repetition_penalty, allowed)
        texts, _ = self._generate(prompt, max_len, sampling, (), edits)
        return texts[0] if isinstance(prompt, str) else texts

    def generate_with_cache(
        self,
        prompt: Text,
        captures: Captures = None,
        max_len: int = 100,
        temperature: float | Sequence[float] = 1.0,
        top_p: float | Sequence[float] = 1.0,
        seed: int | Sequence[int] = 0,
        edits: Sequence[Edit] = (),
        *,
        top_k: int | Sequence[int] = 0,
        min_p: float | Sequence[float] = 0.0,
        repetition_penalty: float | Sequence[float] = 1.0,
        allowed: Allowed | None = None,
    ) -> tuple[list[str], ActivationCache]:
        """As `generate`, keeping activations of the prompt and of every new token on the way.

        No second pass is made; what is kept equals a full forward pass over the prompt and the
        new tokens but the last, which was never fed to the model.

        **Arguments:** as for `generate` and `run_with_cache`; captures take all positions.

        **Returns:** the new texts, one a prompt, and an `ActivationCache` on the host. Rows that
        end earlier than the longest are padded.
        """
        wanted = as_captures(captures, self.config, self.config.context_length)
        sampling = Sampling(temperature, top_p, seed, top_k, min_p, repetition_penalty, allowed)
        texts, cache = self._generate(prompt, max_len, sampling, wanted, edits)
        assert cache is not None
        return texts, cache

    def _generate(
        self,
        prompt: Text,
        max_len: int,
        sampling: Sampling,
        captures: tuple[Capture, ...],
        edits: Sequence[Edit],
    ) -> tuple[list[str], ActivationCache | None]:
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        ids = [self.tokenizer.encode(p) for p in prompts]
        lengths = [len(p) for p in ids]
        asked = prompts, max_len, sampling, [c.key for c in captures]
        same_call("generate", asked, spans_processes(self.mesh))
        recorder = GenerationRecorder(captures, self.config, lengths) if captures else None
        rounds = generate_tokens(
            self.runnable, self.mesh, ids, max_len, sampling, captures=captures,
            edits=self.resolve(edits, lengths),
        )  # fmt: skip
        new, fed = collect(rounds, len(ids), max_len, self.config.eos_token, recorder)
        texts = [continuation(self.tokenizer, p, n) for p, n in zip(ids, new, strict=True)]
        return texts, None if recorder is None else recorder.cache(fed)

    def resolve(self, edits: Sequence[Edit], lengths: Sequence[int]) -> tuple[Change, ...]:
        """Edits checked, as masks and whole on every device."""
        if not edits:
            return ()
        everywhere = NamedSharding(self.mesh, P())
        return jax.device_put(resolve(edits, self.config, lengths), everywhere)

    def stream(
        self,
        prompt: str | Sequence[int],
        max_len: int = 100,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
        edits: Sequence[Edit] = (),
        *,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        allowed: Allowed | None = None,
    ) -> Iterator[StreamedToken]:
        """Continue a text token by token; arguments as in `generate`.

        The prompt may be token ids instead: a text's own and those drawn so far, for example, with
        another token in the last one's place. Where the mesh cuts a batch, each part of it runs the
        same text.

        **Returns:** an iterator of `StreamedToken`s. Their texts, joined, are what `generate`
        returns for the same arguments.
        """
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(i) for i in prompt]
        sampling = Sampling(temperature, top_p, seed, top_k, min_p, repetition_penalty, allowed)
        same_call("stream", (ids, max_len, sampling), spans_processes(self.mesh))
        copies = [ids] * self.mesh.shape["data"]
        rounds = generate_tokens(
            self.runnable, self.mesh, copies, max_len, sampling, block=1,
            edits=self.resolve(edits, [len(ids)] * len(copies)),
        )  # fmt: skip
        return stream(rounds, ids, self.tokenizer, self.config.eos_token)
