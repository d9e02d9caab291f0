"""Many prompts at once, with a progress bar, and a file that an interrupt does not spoil."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from grokkit.batch_request import Generation
from grokkit.batching import ContinuousBatch
from grokkit.checkpoint import Checkpoint, fingerprint, open_checkpoint
from grokkit.errors import PromptError, TokenizerError
from grokkit.file_lock import locked
from grokkit.generate import bucket
from grokkit.language_model import LanguageModel
from grokkit.loading import default_dtype, load
from grokkit.processes import agree, by_first, is_first, share, spans_processes
from grokkit.runtime import files
from grokkit.sampling import Allowed, Sampling
from grokkit.tokenizer import Tokenizer
from grokkit.zoo import shipped

BLOCK = 8


@dataclasses.dataclass(frozen=True)
class Completion:
    """What became of one prompt."""

    index: int
    """Its place among the prompts, from 0."""
    prompt: str
    text: str
    """The new text, without the prompt; empty if it was refused."""
    finish_reason: str
    """`"end"` of text, a `"stop"` string, `"length"`, or `"refused"`."""
    n_tokens: int
    """New tokens that make up the text."""
    seed: int
    error: str | None = None
    """Why it was refused."""


def batch(
    prompts: Sequence[str],
    model: LanguageModel | str | os.PathLike[str] = "nano",
    out: str | os.PathLike[str] | None = None,
    *,
    slots: int = 8,
    max_len: int = 100,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    allowed: Allowed | None = None,
    stop: str | Sequence[str] = (),
    progress: bool = True,
) -> list[Completion]:
    """Continue every prompt, `slots` of them at a time.

    Each gets the text that `lm.generate(prompts, ...)` gives it, with `seed + i` for prompt i. One
    that cannot be run is refused with the reason, and the rest go on. Of several processes all make
    the same call; process 0 reads and writes the file, and all return the completions.

    **Arguments:**

    - `prompts`: texts.
    - `model`: a `LanguageModel`, or what `load` takes.
    - `out`: a file that gets one line of JSON for each prompt, in their order, with the fields of
        `Completion` and marks of model and settings. Until all are done they gather in `<out>.partial`;
        the same call goes on from there after any interrupt, and repeats and loses none.
    - `slots`: sequences that run at once; the mesh's `data` axis divides it.
    - `stop`: a text, or several, at which new texts end.
    - `max_len` and the others: as for `LanguageModel.generate`, one value for all.
    - `progress`: show a progress bar, in prompts.

    **Returns:** one `Completion` for each prompt, in their order.

    **Raises:** `GrokkitError` for a setting that cannot be honoured, or a file that holds something
    else or that another process writes to.
    """
    prompts = list(prompts)
    if not prompts or not all(isinstance(p, str) for p in prompts):
        raise PromptError("prompts: expected a list of texts, at least one")
    sampling = Sampling(temperature, top_p, seed, top_k, min_p, repetition_penalty, allowed)
    stops = [stop] if isinstance(stop, str) else list(stop)
    is_loaded = isinstance(model, LanguageModel)
    together = spans_processes(model.mesh) if is_loaded else jax.process_count() > 1
    made_by = agree(
        lambda: ("" if out is None else _mark_of(model),
                 batch_facts(prompts, sampling, max_len, stops, slots)),
        together,
    )  # fmt: skip
    record = None if out is None else Record(Path(out), prompts, sampling, max_len, stops, made_by)
    with contextlib.ExitStack() as until_done:

        def begin() -> list[dict[str, Any]]:
            if record is None:
                return []
            until_done.enter_context(record.alone())
            return [dataclasses.asdict(c) for c in record.read().values()]

        found = (Completion(**values) for values in share(begin, together))
        done = {completion.index: completion for completion in found}
        if len(done) < len(prompts):
            lm = model if isinstance(model, LanguageModel) else load(model, progress=progress)
            sampling.rows(1, lm.config.vocab_size)
            with tqdm(
                total=len(prompts), initial=len(done), unit="prompt", desc="continuing",
                disable=not (progress and is_first()),
            ) as bar:  # fmt: skip
                for c in _complete(lm, prompts, set(done), slots, max_len, sampling, stops):
                    if record is not None:
                        by_first(functools.partial(record.add, c), together)
                    done[c.index] = c
                    bar.update()
        if record is not None:
            by_first(functools.partial(record.close, done), together)
    return [done[i] for i in range(len(prompts))]


def batch_facts(
    prompts: list[str], sampling: Sampling, max_len: int, stop: list[str], slots: int
) -> dict[str, str]:
    """What several processes must have been asked alike."""
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]
    return {
        "prompts": f"{len(prompts)} with the digest {digest}",
        "settings": f"{_settings(sampling, max_len, stop)[:1000]}, slots {slots}",
    }


def model_mark(source: Checkpoint | str, dtype: Any) -> str:
    """Tells models apart whose texts differ.

    **Arguments:**

    - `source`: where the weights are from, or what else they are known by.
    - `dtype`: what matrix products round to.
    """
    weights = source if isinstance(source, str) else fingerprint(source)
    return hashlib.sha256(f"{weights} {jnp.dtype(dtype).name}".encode()).hexdigest()[:12]


def _mark_of(model: LanguageModel | str | os.PathLike[str]) -> str:
    if isinstance(model, LanguageModel):
        source = model.name if model.checkpoint is None else model.checkpoint
        return model_mark(source, model.runnable.dtype)
    directory = shipped(model) if isinstance(model, str) else None
    return model_mark(open_checkpoint(directory or model), default_dtype(jax.default_backend()))


def _settings(sampling: Sampling, max_len: int, stop: list[str]) -> str:
    values = {f.name: getattr(sampling, f.name) for f in dataclasses.fields(Sampling)}
    if values["allowed"] is not None:
        values["allowed"] = np.asarray(values["allowed"]).tolist()
    return json.dumps(values | {"max_len": max_len, "stop": stop}, sort_keys=True)


def _complete(
    lm: LanguageModel,
    prompts: list[str],
    done: set[int],
    slots: int,
    max_len: int,
    sampling: Sampling,
    stop: list[str],
) -> Iterator[Completion]:
    """Completions of the prompts that are not done, as they end."""
    waiting = [i for i in range(len(prompts)) if i not in done]
    options = {f.name: getattr(sampling, f.name) for f in dataclasses.fields(Sampling)}
    base = options.pop("seed")
    # Room for the longest that fits, so that no key is attended to in vain.
    context = lm.config.context_length
    lengths = [_n_tokens(lm.tokenizer, prompts[i]) + max_len for i in waiting]
    longest = max((n for n in lengths if n <= context), default=2)
    together = ContinuousBatch(
        lm, slots, min(context, bucket(max(longest, 2), steps=8)), block=BLOCK
    )
    running: dict[Generation, int] = {}
    waiting.reverse()
    while waiting or running:
        while waiting and len(running) < 2 * slots:
            i = waiting.pop()
            seed = (base + i) % 2**32
            try:
                generation = together.submit(prompts[i], max_len, seed=seed, stop=stop, **options)
            except (PromptError, TokenizerError) as error:
                yield Completion(i, prompts[i], "", "refused", 0, seed, str(error))
            else:
                running[generation] = i
        together.step()
        for generation in [g for g in running if g.finish_reason is not None]:
            i = running.pop(generation)
            reason = str(generation.finish_reason)
            yield Completion(
                i, prompts[i], generation.text, reason, len(generation.tokens), (base + i) % 2**32
            )


def _n_tokens(tokenizer: Tokenizer, prompt: str) -> int:
    try:
        return len(tokenizer.encode(prompt))
    except TokenizerError:
        return 0  # it is refused when its turn comes


class Record:
    """The file of completions, and `<file>.partial` until all are there."""

    def __init__(
        self,
        path: Path,
        prompts: list[str],
        sampling: Sampling,
        max_len: int,
        stop: list[str],
        made_by: str,
    ):
        """Nothing is read or written yet; `made_by` is the model's mark."""
        self.path = path
        self.partial = path.with_name(f"{path.name}.partial")
        self.prompts = prompts
        text = _settings(sampling, max_len, stop)
        self.marks = {
            "settings": hashlib.sha256(text.encode()).hexdigest()[:12],
            "model": made_by,
        }

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Keep others from writing to the file meanwhile.

        **Raises:** `PromptError` if one does, or if there can be no such file.
        """
        path = self.path
        if not path.absolute().parent.is_dir() or path.is_dir():
            raise PromptError(f"{path}: expected the name of a file in a directory that exists")
        return locked(
            path.with_name(f".{path.name}.lock"),
            lambda holder: PromptError(
                f"{path}: {holder} is writing to it; wait until that has ended, or give another file"
            ),
        )

    def read(self) -> dict[int, Completion]:
        """What earlier runs with the same prompts and settings have done.

        **Raises:** `PromptError` if a file holds anything else; it is left as it is.
        """
        found: dict[int, Completion] = {}
        for path in (self.path, self.partial):
            with self._usable():
                lines = self._lines(path)
            for number, line in enumerate(lines, start=1):
                completion = self._parse(line, f"{path}, line {number}")
                found[completion.index] = completion
        return found

    def _lines(self, path: Path) -> list[bytes]:
        if not path.exists():
            return []
        *whole, last = path.read_bytes().split(b"\n")
        if last and path == self.path:
            whole.append(last)  # refused unless it is a record, since this file is written whole
        elif last:
            # A line that was being written when the process ended; its prompt is run again.
            os.truncate(path, path.stat().st_size - len(last))
        return whole

    def _parse(self, line: bytes, place: str) -> Completion:
        remedy = "give another file, or remove this one"
        try:
            values: dict[str, Any] = json.loads(line)
            marks = {name: values.pop(name) for name in self.marks}
            completion = Completion(**values)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise PromptError(
                f"{place}: expected a completion written by grokkit, found {line[:60]!r}; {remedy}"
            ) from None
        i = completion.index
        if (
            not isinstance(i, int)
            or not 0 <= i < len(self.prompts)
            or (self.prompts[i] != completion.prompt)
        ):
            raise PromptError(
                f"{place}: expected a completion of one of these {len(self.prompts)} prompts, "
                f"found one of {completion.prompt[:60]!r}; {remedy}"
            )
        if marks["model"] != self.marks["model"]:
            raise PromptError(
                f"{place}: these completions were made by another model, or in another dtype; use "
                f"the same one to go on, or {remedy}"
            )
        if marks != self.marks:
            raise PromptError(
                f"{place}: these completions were made with other settings; use the same ones to "
                f"go on, or {remedy}"
            )
        return completion

    def _encode(self, completion: Completion) -> bytes:
        values = dataclasses.asdict(completion) | self.marks
        try:
            line = json.dumps(values, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can spell
            line = json.dumps(values).encode()
        return line + b"\n"

    def add(self, completion: Completion) -> None:
        """Keep one, whole, before anything else happens."""
        line = self._encode(completion)
        with self._usable(), self.partial.open("ab", buffering=0) as file:
            while line:  # of which a full disk takes a part
                line = line[file.write(line) :]

    def close(self, done: dict[int, Completion]) -> None:
        """All are there: put them into the file, in order."""
        if not self.partial.exists():
            return
        with self._usable():
            content = b"".join(self._encode(done[i]) for i in range(len(self.prompts)))
            files.write(self.path, content)
            self.partial.unlink()

    @contextlib.contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise PromptError(
                f"{self.path}: {error}; once that is mended, the same call goes on from there"
            ) from error


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """Prompts from a file: one a line; in a `.jsonl` file each line is JSON, a string or an object
    with a `"prompt"`. Empty lines are skipped.

    **Raises:** `PromptError` for a file that cannot be read so.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{path}: expected a text file of prompts in UTF-8 ({error})") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        line = line.removesuffix("\r")
        if line:
            prompts.append(
                _of_json(line, f"{path}, line {number}") if path.suffix == ".jsonl" else line
            )
    if not prompts:
        raise PromptError(f"{path}: expected prompts, one a line, found none")
    return prompts


def _of_json(line: str, place: str) -> str:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise PromptError(
            f'{place}: expected JSON, a string or an object with a "prompt", found {line[:60]!r}'
        )
    return prompt
