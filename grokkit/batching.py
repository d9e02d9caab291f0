"""Continuous batching: requests that come and go share one batch of slots.

A finished sequence's slot is given to the next request at once, while the others go on
(iteration-level scheduling, Yu et al., Orca, OSDI 2022). A new request's prompt is run by itself,
padded to one of a few lengths, and its keys and values are then written into its slot; all slots
decode together, some tokens at a time. A sequence's draws depend on its own seed and positions, so
that each request gets the tokens that it would get alone.
"""

import contextlib
import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from tqdm.auto import tqdm

from grokkit.batch_request import Generation, Round
from grokkit.errors import PromptError
from grokkit.generate import (
    PREFILL_PART,
    State,
    check_max_len,
    check_prompt,
    decode,
    join,
    pad_right,
    padded_length,
    prefill_in_parts,
    to_host_async,
)
from grokkit.kv_cache import KVCache
from grokkit.language_model import LanguageModel
from grokkit.processes import is_first, to_host
from grokkit.sampling import Allowed, Draw, Sampling, stack

_ROWS = P("data")


class ContinuousBatch:
    """A batch of slots over which requests are run together.

    ```python
    batch = ContinuousBatch(lm, slots=8)
    one = batch.submit("The duty of the Congress is", temperature=0)
    two = batch.submit("In the year", seed=3, top_p=0.9, stop=["."])
    for token in one:  # two goes on meanwhile
        print(token)
    print(two.result())
    ```

    It runs only within `step`, `run` and the iteration over a `Generation`, in the thread that
    calls; it is not made for several threads at once.
    """

    def __init__(
        self,
        lm: LanguageModel,
        slots: int = 8,
        capacity: int | None = None,
        pad_sizes: Sequence[int] | None = None,
        block: int = 4,
    ):
        """Nothing is allocated before the first request.

        **Arguments:**

        - `lm`: the model, with a tokenizer.
        - `slots`: sequences that run at once; the mesh's `data` axis divides it.
        - `capacity`: the most tokens of a sequence, prompt and new text together; by default the
            model's context. Keys and values take room for so many in every slot.
        - `pad_sizes`: the lengths that prompts are padded to, of which each is compiled once; a
            longer prompt than the largest is refused. By default powers of two.
        - `block`: tokens drawn between two looks at the results. Requests join, leave and are
            streamed in such steps; fewer cost more time on the host. It is 1 where layers are
            streamed from disk: there each token costs a pass.

        **Raises:** `PromptError` for numbers that cannot be honoured.
        """
        config, parts = lm.config, lm.mesh.shape["data"]
        if slots < 1 or slots % parts:
            raise PromptError(
                f"slots must divide over the mesh's {parts} 'data' devices and be at least 1, "
                f"found {slots}"
            )
        capacity = config.context_length if capacity is None else capacity
        if not 1 < capacity <= config.context_length:
            raise PromptError(
                f"capacity must be from 2 to the context of {config.context_length}, "
                f"found {capacity}"
            )
        sizes = None if pad_sizes is None else sorted(set(pad_sizes))
        if sizes is not None and not (sizes and 1 <= sizes[0] and sizes[-1] <= capacity):
            raise PromptError(
                f"pad_sizes must be from 1 to the {capacity} tokens that a slot holds, found "
                f"{tuple(sizes)}"
            )
        if block < 1:
            raise PromptError(f"block must be at least 1, found {block}")
        self.lm = lm
        self.slots = slots
        self.capacity = capacity
        self.pad_sizes = sizes
        self.block = block if lm.runnable.runs_ahead else 1
        self._waiting: deque[Generation] = deque()
        self._in_slot: list[Generation | None] = [None] * slots
        self._unread: deque[Round] = deque()
        self._state: State | None = None
        self._settings: Any = None  # on the device, or None when slots have changed hands

    def __repr__(self) -> str:
        return (
            f"ContinuousBatch({self.lm.name!r}: {self._n_running} of {self.slots} slots running, "
            f"{len(self._waiting)} waiting, {self.capacity} tokens a slot)"
        )

    @property
    def _n_running(self) -> int:
        return sum(g is not None for g in self._in_slot)

    @property
    def idle(self) -> bool:
        """Whether every request has ended."""
        return not (self._waiting or self._unread or self._n_running)

    def submit(
        self,
        prompt: str | Sequence[int],
        max_len: int = 100,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
        *,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        allowed: Allowed | None = None,
        stop: str | Sequence[str] = (),
    ) -> Generation:
        """Ask for a continuation; it runs when a slot is free, first come first served.

        **Arguments:** as for `LanguageModel.generate`; the prompt may be token ids. And `stop`: a
        text, or several, at which the new text ends; they are not part of it.

        **Returns:** a `Generation`.

        **Raises:** `PromptError`, with the reason, for a request that cannot be run. The others go
        on.
        """
        ids = self.lm.tokenizer.encode(prompt) if isinstance(prompt, str) else [*map(int, prompt)]
        check_max_len(max_len)
        check_prompt(self.lm.config, ids, max_len)
        if len(ids) + max_len > self.capacity:
            raise PromptError(
                f"the prompt has {len(ids)} tokens and max_len is {max_len}: "
                f"{len(ids) + max_len} do not fit in a slot of {self.capacity}. Shorten the "
                f"prompt, lower max_len, or give the batch a larger capacity"
            )
        self._padded(len(ids))
        sampling = Sampling(temperature, top_p, seed, top_k, min_p, repetition_penalty, allowed)
        stops = [stop] if isinstance(stop, str) else list(stop)
        generation = Generation(self, ids, max_len, sampling, stops)
        self._waiting.append(generation)
        return generation

    def step(self) -> bool:
        """Let waiting requests into free slots, draw `block` more tokens, hand out those before.

        An exception, Ctrl-C among them, ends all requests that are running as cancelled; those that
        wait stay.

        **Returns:** whether there is more to do.
        """
        with self._abandoned_if_cut_off():
            self._admit()
            if self._n_running:
                self._decode()
            # One round stays under way on the device while the host reads the one before; not where
            # it may be a dear pass that nobody wants any more.
            while len(self._unread) > (self._n_running > 0 and self.lm.runnable.runs_ahead):
                self._hand_out()
        return not self.idle

    def run(self) -> None:
        """Go on until every request has ended."""
        while self.step():
            pass

    def compile(self, progress: bool = True) -> None:
        """Compile ahead what requests will need, each padded length with a progress bar.

        Settings that most requests leave alone (top-k and those after it) have programs of their
        own, which are compiled when a request first asks for them.
        """
        sizes = self.pad_sizes or self._usual_sizes()
        work = [(size, n) for size in sizes for n in self._row_counts(size)]
        hidden = not (progress and is_first())
        with (
            self._abandoned_if_cut_off(),
            tqdm(total=len(work) + 1, desc="compiling", disable=hidden) as bar,
        ):
            for size, n in work:
                bar.set_postfix_str(f"prompts of {size} x {n}")
                self._prefill([[]] * self.lm.mesh.shape["data"], size, n)
                bar.update()
            self._decode()
            bar.update()
            while self._unread:
                self._hand_out()

    def forget(self, generation: Generation) -> None:
        """Let go of a request that has ended; `Generation.cancel` calls it."""
        if generation in self._waiting:
            self._waiting.remove(generation)
        self._release(generation)

    # Slots and their sequences

    def _usual_sizes(self) -> list[int]:
        context = self.lm.config.context_length
        return sorted({padded_length(n, context) for n in range(1, self.capacity)})

    def _padded(self, n: int) -> int:
        if self.pad_sizes is None:
            return padded_length(n, self.lm.config.context_length)
        for size in self.pad_sizes:
            if n <= size:
                return size
        raise PromptError(
            f"the prompt has {n} tokens, and the largest of pad_sizes is {self.pad_sizes[-1]}; "
            f"shorten the prompt or add a larger size"
        )

    def _row_counts(self, size: int) -> list[int]:
        """How many prompts of a padded length may be run at once on each part of the mesh."""
        most = self._slots_a_part
        if not self.lm.runnable.shares_passes:
            most = min(most, max(1, PREFILL_PART // size))
        return [*(n for n in (1, 4, 16, 64, 256) if n < most), most]

    @property
    def _slots_a_part(self) -> int:
        return self.slots // self.lm.mesh.shape["data"]

    def _admit(self) -> None:
        """Run the prompts of waiting requests, as many as slots are free, those alike together.

        Where passes are dear all share one, padded to the longest.
        """
        all_share = self.lm.runnable.shares_passes
        while True:
            free = self._in_slot.count(None)
            candidates = [self._waiting[i] for i in range(min(free, len(self._waiting)))]
            if not candidates:
                return
            sizes = [self._padded(len(g.prompt)) for g in candidates]
            size = max(sizes) if all_share else sizes[0]
            most = self._row_counts(size)[-1]
            # Slots lie over the parts of the mesh in equal runs; a prompt runs where its slot is.
            per = self._slots_a_part
            free_slots = [
                [i for i in range(part, part + per) if self._in_slot[i] is None]
                for part in range(0, self.slots, per)
            ]
            joining: list[list[tuple[int, Generation]]] = [[] for _ in free_slots]
            for padded, generation in zip(sizes, candidates, strict=True):
                part = max(range(len(free_slots)), key=lambda p: len(free_slots[p]))
                if padded != size and not all_share:
                    continue
                if len(joining[part]) == most or not free_slots[part]:
                    break
                slot = free_slots[part].pop(0)
                self._in_slot[slot] = generation  # at once: no exception loses sight of it
                joining[part].append((slot, generation))
                self._waiting.remove(generation)
            needed = max(map(len, joining))
            n = next(n for n in self._row_counts(size) if n >= needed)
            self._prefill(joining, size, n)

    def _prefill(self, joining: list[list[tuple[int, Generation]]], size: int, n: int) -> None:
        """Run prompts, `n` rows for each part of the mesh, and write them into their slots."""
        lm, config = self.lm, self.lm.config
        placed = [[*part, *[None] * (n - len(part))] for part in joining]
        rows = [pair for part in placed for pair in part]
        owners = [None if pair is None else pair[1] for pair in rows]
        at = [-1 if pair is None else pair[0] % self._slots_a_part for pair in rows]
        prompts = [[] if g is None else g.prompt for g in owners]
        settings = stack([None if g is None else g.rows for g in owners], config.vocab_size)
        with jax.set_mesh(lm.mesh):
            on_rows = jax.tree.map(lambda a: jax.device_put(a, _ROWS), settings)
            cache = KVCache.empty(config, len(rows), size, lm.runnable.dtype, lm.mesh)
            new, draw, _ = prefill_in_parts(
                lm.runnable,
                pad_right(prompts, size, config.pad_token),
                np.array([len(p) for p in prompts], np.int32),
                cache,
                on_rows,
            )
            state = self._ready(with_seen=new.seen is not None)
            self._state = join(state, new, jax.device_put(np.array(at, np.int32), _ROWS))
        self._settings = None
        self._ask_for(_leading_axis(draw), owners, 1)

    def _ready(self, with_seen: bool) -> State:
        """The slots' arrays, made when first needed."""
        lm = self.lm
        if self._state is None:
            cache = KVCache.empty(
                lm.config, self.slots, self.capacity, lm.runnable.dtype, lm.mesh
            )  # fmt: skip
            # The first to join and those after them go through the same program.
            cache = dataclasses.replace(cache, is_new=False)
            token = jax.device_put(np.zeros(self.slots, np.int32), _ROWS)
            self._state = State(cache, token, None)
        if with_seen and self._state.seen is None:
            seen = np.zeros((self.slots, lm.config.vocab_size), bool)
            self._state = self._state._replace(seen=jax.device_put(seen, _ROWS))
        return self._state

    def _decode(self) -> None:
        """Draw `block` tokens in every slot that holds a sequence."""
        lm = self.lm
        with jax.set_mesh(lm.mesh):
            state = self._ready(with_seen=False)
            if self._settings is None:
                each = [None if g is None else g.rows for g in self._in_slot]
                active = np.array([g is not None for g in self._in_slot])
                self._settings = jax.tree.map(
                    lambda a: jax.device_put(a, _ROWS), (stack(each, lm.config.vocab_size), active)
                )
            settings, active = self._settings
            if settings.constraints is None:
                state = state._replace(seen=None)
            self._state, draws, _ = lm.runnable.run(
                decode, state, settings, self.block, active=active
            )
        self._ask_for(draws, list(self._in_slot), self.block)

    def _ask_for(self, draws: Draw, owners: list[Generation | None], n: int) -> None:
        """Note that `n` tokens of each owner are on their way; slots are free of the last ones."""
        self._unread.append(Round(to_host_async(draws), owners))
        for generation in owners:
            if generation is not None:
                generation.asked += n
                if generation.asked >= generation.max_len:
                    self._release(generation)

    def _hand_out(self) -> None:
        """Give the draws of the oldest round to their owners."""
        # It stays among the unread until all is given: no exception loses sight of its owners.
        if any(self._unread[0].owners):
            self._give(*self._unread[0])
        self._unread.popleft()

    def _give(self, draws: Any, owners: list[Generation | None]) -> None:
        draws = to_host(draws)
        for step in range(draws.token.shape[0]):
            for row, generation in enumerate(owners):
                if generation is not None:
                    generation.take(
                        int(draws.token[step, row]), float(draws.prob[step, row]),
                        draws.top_tokens[step, row], draws.top_probs[step, row],
                    )  # fmt: skip
        for generation in owners:
            if generation is not None and generation.finish_reason is not None:
                self._release(generation)

    def _release(self, generation: Generation) -> None:
        if generation in self._in_slot:
            self._in_slot[self._in_slot.index(generation)] = None
            self._settings = None

    @contextlib.contextmanager
    def _abandoned_if_cut_off(self) -> Iterator[None]:
        """After an exception what is on the device may be half done: end all that is running."""
        try:
            yield
        except BaseException:
            self._abandon()
            raise

    def _abandon(self) -> None:
        under_way = [g for found in self._unread for g in found.owners]
        for generation in [*self._in_slot, *under_way]:
            if generation is not None:
                generation.cancel()
        self._unread.clear()
        self._state = self._settings = None


@jax.jit
def _leading_axis(draw: Draw) -> Draw:
    return jax.tree.map(lambda a: jnp.expand_dims(a, 0), draw)
