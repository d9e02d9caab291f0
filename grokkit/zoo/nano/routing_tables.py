"""Tables of what a small model's routers do on passages of several domains."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from grokkit.analysis import routing, similarity
from grokkit.analysis.causal_routing import (
    ForcedChoices,
    Removal,
    chosen_set,
    next_token_losses,
    set_probability,
)
from grokkit.analysis.specialisation import (
    domain_distance,
    domain_specialisation,
    vocabulary_specialisation,
)
from grokkit.analysis.statistics import Null, Resampled, bootstrap, permutation_null, spearman
from grokkit.errors import GrokkitError
from grokkit.language_model import LanguageModel
from grokkit.quant import dequantize

MIN_COUNT = 10
"""Occurrences that a token id needs to enter vocabulary specialisation."""


@dataclasses.dataclass
class Data:
    """Passages of equal length, and where the model sent their tokens."""

    lm: LanguageModel
    names: list[str]
    ids: Int[np.ndarray, "batch position"]
    domains: Int[np.ndarray, " batch"]
    experts: Int[np.ndarray, "layer batch position choice"]
    probs: Float[np.ndarray, "layer batch position expert"]
    samples: int

    @property
    def rng(self) -> np.random.Generator:
        """A fresh generator, so that no table depends on those before it."""
        return np.random.default_rng(0)

    @property
    def n_experts(self) -> int:
        """Experts in a layer."""
        return self.lm.config.n_experts

    @property
    def flat(self) -> Int[np.ndarray, "layer token choice"]:
        """Choices of all tokens on one axis."""
        return routing.flatten_tokens(self.experts)

    @property
    def pairs(self) -> Int[np.ndarray, "pair 2"]:
        """Neighbouring tokens."""
        return routing.neighbours(np.ones(self.ids.shape, bool))

    def bootstrap(self, statistic: Callable[[np.ndarray], np.ndarray]) -> Resampled:
        """Resample passages, each domain by itself."""
        return bootstrap(statistic, len(self.ids), self.rng, self.domains, self.samples)


def prepare(lm: LanguageModel, passages: dict[str, list[str]], length: int, samples: int) -> Data:
    """Cut passages to a length and run the model over them.

    **Arguments:**

    - `lm`: the model.
    - `passages`: domain to texts.
    - `length`: tokens of each passage.
    - `samples`: resamples behind every interval and null.

    **Raises:** `GrokkitError` for a text that is too short.
    """
    rows, domains = [], []
    for label, (name, texts) in enumerate(passages.items()):
        for text in texts:
            ids = lm.tokenizer.encode(text)
            if len(ids) < length:
                raise GrokkitError(f"{name}: a passage has {len(ids)} tokens, expected {length}")
            rows.append(ids[:length])
            domains.append(label)
    ids = np.array(rows, np.int32)
    experts, probs = [], []
    for part in np.array_split(ids, max(len(ids) // 16, 1)):
        _, cache = lm.run_with_cache(part, ["expert_indices", "router_probs"])
        experts.append(np.asarray(cache["expert_indices"]))
        probs.append(np.asarray(cache["router_probs"], np.float64))
    return Data(lm, list(passages), ids, np.array(domains), np.concatenate(experts, 1),
                np.concatenate(probs, 1), samples)  # fmt: skip


# Tables


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _with_interval(r: Resampled, digits: int = 3) -> list[str]:
    low, high = r.interval()
    return [f"{v:.{digits}f} [{a:.{digits}f}, {b:.{digits}f}]"
            for v, a, b in zip(r.observed, low, high, strict=True)]  # fmt: skip


def _range(r: Resampled, digits: int = 3) -> list[str]:
    low, high = r.interval()
    return [f"{a:.{digits}f} to {b:.{digits}f}" for a, b in zip(low, high, strict=True)]


def _by_layer(head: list[str], columns: list[list[str]]) -> str:
    rows = [[str(i), *cells] for i, cells in enumerate(zip(*columns, strict=True))]
    return _table(["layer", *head], rows)


def sample_table(data: Data) -> str:
    """What was read, and the model's loss on it."""
    loss = next_token_losses(data.lm, data.ids)
    rows = [
        [name, str((data.domains == d).sum()), str(loss[data.domains == d].size),
         f"{loss[data.domains == d].mean():.3f}"]
        for d, name in enumerate(data.names)
    ]  # fmt: skip
    return _table(["domain", "passages", "predicted tokens", "loss (nats a token)"], rows)


def load_table(data: Data) -> str:
    """Balance, entropy and margin, with bootstrap intervals over passages."""

    def of_load(measure: Callable[[np.ndarray], np.ndarray]) -> Resampled:
        def statistic(i: np.ndarray) -> np.ndarray:
            return measure(routing.expert_load(routing.flatten_tokens(data.experts[:, i]),
                                               data.n_experts))  # fmt: skip

        return data.bootstrap(statistic)

    def mean_of(values: np.ndarray) -> Resampled:
        by_passage = values.reshape(*data.experts.shape[:3]).mean(axis=2)
        return data.bootstrap(lambda i: by_passage[:, i].mean(axis=1))

    k = data.lm.config.n_experts_per_token
    margin = routing.router_margin(routing.flatten_tokens(data.probs), k)
    columns = [of_load(routing.load_variation), of_load(routing.load_peak),
               of_load(routing.entropy), mean_of(routing.entropy(data.probs)),
               mean_of(margin.log_prob)]  # fmt: skip
    head = ["load: variation", "load: peak / mean", "load: entropy", "router: entropy",
            "margin (logits)"]  # fmt: skip
    return _by_layer(head, [_with_interval(c) for c in columns])


def repetition_table(data: Data) -> tuple[str, np.ndarray]:
    """Repetition by the next token, with shuffled and token-matched controls; and p-values."""
    flat, pairs, tokens = data.flat, data.pairs, data.ids.reshape(-1)

    def statistic(order: np.ndarray) -> np.ndarray:
        found = routing.repetition(flat[:, order], pairs)
        return np.stack([np.asarray(found.first), np.asarray(found.any)])

    def of_passages(i: np.ndarray) -> np.ndarray:
        chosen = routing.flatten_tokens(data.experts[:, i])
        found = routing.repetition(chosen, pairs)
        return np.stack([np.asarray(found.first), np.asarray(found.any)])

    spread = data.bootstrap(of_passages)
    free = permutation_null(statistic, len(tokens), data.rng, samples=data.samples)
    matched = permutation_null(statistic, len(tokens), data.rng, tokens, data.samples)
    columns = []
    for i in range(2):
        for r in (spread, free, matched):
            part = Resampled(r.observed[i], r.samples[:, i])
            columns.append(_with_interval(part) if r is spread else _range(part))
    names = [f"{what}: {kind}" for what in ("first choice", "any")
             for kind in ("observed", "tokens shuffled", "matched")]  # fmt: skip
    return _by_layer(names, columns), matched.p_value


def domain_table(data: Data) -> tuple[str, Null, Null]:
    """Distance between domains' use of experts against both nulls, and these."""
    n = len(data.names)
    of_token = np.repeat(data.domains, data.ids.shape[1])
    tokens = data.ids.reshape(-1)
    by_passage = routing.expert_use(data.experts, data.n_experts).mean(axis=2)

    def of_labels(order: np.ndarray) -> np.ndarray:
        label = data.domains[order]
        return domain_distance(
            np.stack([by_passage[:, label == d].mean(axis=1) for d in range(n)], axis=1)
        )

    def of_tokens(order: np.ndarray) -> np.ndarray:
        shares = domain_specialisation(data.flat[:, order], of_token, data.n_experts, n)
        return domain_distance(shares)

    free = permutation_null(of_labels, len(data.ids), data.rng, samples=data.samples)
    matched = permutation_null(of_tokens, len(tokens), data.rng, tokens, data.samples)
    columns = [[f"{v:.3f}" for v in free.observed], _range(free),
               [f"{p:.3f}" for p in free.p_value], _range(matched),
               [f"{p:.3f}" for p in matched.p_value]]  # fmt: skip
    head = ["distance", "passages shuffled", "p", "matched on the token", "p"]
    return _by_layer(head, columns), free, matched


def structure_table(data: Data) -> str:
    """Transitions, vocabulary and co-activation, each against its null."""
    tokens, flat = data.ids.reshape(-1), data.flat

    def information(order: np.ndarray) -> np.ndarray:
        after = flat[1:, order]
        both = [np.stack([a, b]) for a, b in zip(flat[:-1], after, strict=True)]
        return np.array([routing.transition_information(b, data.n_experts)[0] for b in both])

    def vocabulary(order: np.ndarray) -> np.ndarray:
        first = flat[:, order, :1]
        return vocabulary_specialisation(first, tokens, data.n_experts, MIN_COUNT).top()

    free = permutation_null(information, len(tokens), data.rng, samples=data.samples)
    matched = permutation_null(information, len(tokens), data.rng, tokens, data.samples)
    words = permutation_null(vocabulary, len(tokens), data.rng, samples=data.samples)

    counts = routing.pair_counts(flat, data.n_experts)
    upper = np.triu_indices(data.n_experts, 1)
    pairs = []
    for layer, count in enumerate(counts):
        ratio = _times_chance(count)[upper]
        best = int(ratio.argmax())
        i, j = int(upper[0][best]), int(upper[1][best])

        def of_passages(at: np.ndarray, layer: int = layer, i: int = i, j: int = j) -> np.ndarray:
            chosen = data.experts[layer, at].reshape(-1, data.experts.shape[-1])
            count = routing.pair_counts(chosen, data.n_experts)
            return np.asarray(_times_chance(count)[i, j])

        low, high = data.bootstrap(of_passages).interval()
        pairs.append(f"{i} and {j}: {ratio[best]:.2f} [{low:.2f}, {high:.2f}]")
    last = ["–"]
    columns = [[f"{v:.3f}" for v in free.observed] + last, _range(free) + last,
               _range(matched) + last, [f"{v:.3f}" for v in words.observed], _range(words),
               pairs]  # fmt: skip
    head = ["information on the next layer (nats)", "shuffled", "matched",
            "a token's top expert", "shuffled", "most over-represented pair, × chance"]  # fmt: skip
    return _by_layer(head, columns)


def _times_chance(counts: np.ndarray) -> np.ndarray:
    """How often each pair was chosen, in multiples of chance; 1 for a pair that cannot occur."""
    expected = routing.expected_pair_counts(counts)
    return np.divide(counts, expected, out=np.ones_like(expected), where=expected > 0)


def _grid(data: Data, values: np.ndarray, marked: np.ndarray, digits: int) -> str:
    """[layer, expert, domain] as a table with marked cells bold."""
    rows = []
    for layer in range(values.shape[0]):
        for d, name in enumerate(data.names):
            cells = [
                f"**{v:z.{digits}f}**" if m else f"{v:z.{digits}f}"
                for v, m in zip(values[layer, :, d], marked[layer, :, d], strict=True)
            ]
            rows.append([str(layer) if d == 0 else "", name, *cells])
    return _table(["layer", "domain", *map(str, range(data.n_experts))], rows)


def service_table(data: Data) -> tuple[str, np.ndarray]:
    """Share of each domain's tokens that each expert serves; beyond the null in bold.

    Also returns the shares [layer, expert, domain]. A cell is marked where it is further from
    its expert's mean over domains than 95 % of the layer's largest distances are when whole
    passages change domains.
    """
    by_passage = routing.expert_use(data.experts, data.n_experts).mean(axis=2)

    def shares(order: np.ndarray) -> np.ndarray:
        label = data.domains[order]
        return np.stack(
            [by_passage[:, label == d].mean(axis=1) for d in range(len(data.names))], axis=-1
        )

    def distance(order: np.ndarray) -> np.ndarray:
        found = shares(order)
        return np.abs(found - found.mean(axis=-1, keepdims=True))

    null = permutation_null(
        lambda order: distance(order).max(axis=(1, 2)), len(data.ids), data.rng,
        samples=data.samples,
    )  # fmt: skip
    limit = np.quantile(null.samples, 0.95, axis=0)
    observed = np.arange(len(data.ids))
    marked = distance(observed) > limit[:, None, None]
    return _grid(data, shares(observed), marked, 2), shares(observed)


def removal_table(data: Data, removal: Removal) -> str:
    """Change of each domain's loss per removed expert; interval without zero in bold."""
    spread = data.bootstrap(lambda i: removal.effect(data.domains, i))
    low, high = spread.interval()
    return _grid(data, spread.observed, (low > 0) | (high < 0), 3)


def prediction_table(data: Data, removals: dict[str, Removal]) -> tuple[str, np.ndarray]:
    """Rank correlation of a domain's use of an expert with the harm of removing it.

    Over the cells (expert, domain) of a layer: as they are, and with the means over experts and
    over domains taken out of both, so that only who is special to whom remains. Also returns
    the lower ends of the first correlation's intervals, per method and layer.
    """
    by_passage = routing.expert_use(data.experts, data.n_experts).mean(axis=2)

    def centred(x: np.ndarray) -> np.ndarray:
        return x - x.mean(axis=1, keepdims=True) - x.mean(axis=2, keepdims=True)

    columns, lows, head = [], [], []
    for method, removal in removals.items():

        def statistic(i: np.ndarray, removal: Removal = removal) -> np.ndarray:
            label = data.domains[i]
            use = np.stack(
                [by_passage[:, i[label == d]].mean(axis=1) for d in range(len(data.names))], -1
            )
            harm = removal.effect(data.domains, i)
            n = len(use)
            return np.stack([
                spearman(use.reshape(n, -1), harm.reshape(n, -1)),
                spearman(centred(use).reshape(n, -1), centred(harm).reshape(n, -1)),
            ])  # fmt: skip

        spread = data.bootstrap(statistic)
        for i, kind in enumerate(("as they are", "centred")):
            part = Resampled(spread.observed[i], spread.samples[:, i])
            columns.append(_with_interval(part, 2))
            head.append(f"{method}: {kind}")
            if i == 0:
                lows.append(part.interval()[0])
    return _by_layer(head, columns), np.stack(lows)


def choice_table(data: Data, forced: ForcedChoices) -> tuple[str, Resampled]:
    """How good the router's choice is among all, and whether its probabilities rank them.

    Also returns the mean rank correlation per layer with its resamples.
    """
    positions = forced.loss.shape[1]
    probs = np.moveaxis(set_probability(data.probs, forced.sets), 0, 2)[:, :positions]
    chosen = np.moveaxis(chosen_set(data.experts, forced.sets), 0, 2)[:, :positions, :, None]
    measured = ~np.isnan(forced.clean)
    passage = np.nonzero(measured)[0]
    loss, probs = forced.loss[measured], probs[measured]
    own = np.take_along_axis(loss, chosen[measured], axis=-1)
    others = loss.shape[-1] - 1
    per_token = np.stack([
        spearman(probs, -loss),
        # Ties with the own loss are the own choice itself, up to rounding.
        (loss > own + 1e-4).sum(axis=-1) / others,
        ((loss < own - 1e-4).sum(axis=-1) == 0).astype(float),
        (loss.sum(axis=-1) - own[..., 0]) / others - own[..., 0],
        own[..., 0] - loss.min(axis=-1),
    ])  # fmt: skip
    members = [np.flatnonzero(passage == i) for i in range(len(data.ids))]
    sums = np.stack([per_token[:, m].sum(axis=1) for m in members])
    counts = np.array([len(m) for m in members])
    spread = data.bootstrap(lambda i: sums[i].sum(axis=0) / counts[i].sum())
    columns = [_with_interval(Resampled(spread.observed[i], spread.samples[:, i]))
               for i in range(len(per_token))]  # fmt: skip
    head = ["probability ranks the losses (Spearman)", "share of other pairs that are worse",
            "own pair is the best", "mean harm of another pair (nats)",
            "gain of the best pair (nats)"]  # fmt: skip
    return _by_layer(head, columns), Resampled(spread.observed[0], spread.samples[:, 0])


def similarity_table(data: Data) -> str:
    """Experts' and gate rows' likeness from the weights."""
    moe, router = data.lm.model.blocks.moe, np.asarray(data.lm.model.blocks.moe.router, np.float64)
    columns: list[list[str]] = [[], [], [], []]
    for layer in range(data.lm.config.n_layers):
        one = jax.tree.map(lambda a, i=layer: np.asarray(a)[i], moe.gate)
        gate = np.asarray(dequantize(jax.tree.map(jnp.asarray, one)), np.float64)
        gates = similarity.gate_similarity(router[layer])
        null = similarity.similarity_null(similarity.neuron_similarity, gate, data.rng, 5)
        neurons = similarity.neuron_similarity(gate)
        rank = spearman(similarity.off_diagonal(gates), similarity.off_diagonal(neurons))
        columns[0].append(f"{similarity.off_diagonal(gates).mean():+z.3f}")
        columns[1].append(f"{null.observed:.3f}")
        columns[2].append(f"{null.samples.min():.3f} to {null.samples.max():.3f}")
        columns[3].append(f"{rank:+z.2f}")
    head = ["gate rows: mean cosine", "neurons: mean matched cosine",
            "inputs shuffled (5 draws)", "gate rows and neurons, over pairs (Spearman)"]  # fmt: skip
    return _by_layer(head, columns)
