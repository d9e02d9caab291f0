"""The tables of docs/findings-routing.md, measured on nano.

`python -m grokkit.zoo.nano.routing_findings` prints them; `--write docs/findings-routing.md`
puts each between its markers on the page.
"""

import argparse
import re
from pathlib import Path

import numpy as np

from grokkit.analysis.causal_routing import Removal, forced_choices, remove_experts
from grokkit.analysis.statistics import Null, Resampled
from grokkit.errors import GrokkitError
from grokkit.loading import load
from grokkit.runtime import files
from grokkit.sharding import make_mesh
from grokkit.zoo.nano import routing_tables as tables_of
from grokkit.zoo.nano.held_out import load_sample


def measure(data: tables_of.Data, per_passage: int, progress: bool = True) -> dict[str, str]:
    """All tables, by the name of their place on the page."""
    tables = {"sample": tables_of.sample_table(data), "load": tables_of.load_table(data)}
    tables["repetition"], p_repetition = tables_of.repetition_table(data)
    tables["domains"], free, matched = tables_of.domain_table(data)
    tables["structure"] = tables_of.structure_table(data)
    tables["service"], _ = tables_of.service_table(data)
    tables["similarity"] = tables_of.similarity_table(data)
    removals = {
        method: remove_experts(data.lm, data.ids, method, progress=progress)
        for method in ("forbid", "zero")
    }
    tables["removal"] = tables_of.removal_table(data, removals["forbid"])
    tables["silence"] = tables_of.removal_table(data, removals["zero"])
    tables["prediction"], lows = tables_of.prediction_table(data, removals)
    positions, rng = np.zeros(data.ids.shape, bool), data.rng
    for row in positions:
        row[rng.choice(len(row) - 1, per_passage, replace=False)] = True
    forced = forced_choices(data.lm, data.ids, positions=positions, progress=progress)
    tables["choices"], ranked = tables_of.choice_table(data, forced)
    tables["summary"] = _summary(
        data, free, matched, p_repetition[0], removals["forbid"], lows, ranked
    )
    return tables


def _summary(
    data: tables_of.Data,
    free: Null,
    matched: Null,
    p_repetition: np.ndarray,
    forbidden: Removal,
    lows: np.ndarray,
    ranked: Resampled,
) -> str:
    """What the tables say, counted."""

    def count(which: np.ndarray) -> str:
        return f"{int(which.sum())} of {data.lm.config.n_layers} layers"

    explained = matched.mean / matched.observed
    harm = forbidden.effect(data.domains)
    layer, expert, domain = np.unravel_index(harm.argmax(), harm.shape)
    domains = (
        f"Domains differ in their use of experts beyond shuffled passages in "
        f"{count(free.p_value < 0.05)} (p < .05), and beyond what token identity alone gives in "
        f"{count(matched.p_value < 0.05)}. Identity alone gives {explained.min():.0%} to "
        f"{explained.max():.0%} of the distance between them."
    )
    repetition = (
        f"A token has its predecessor's first expert more often than token identity alone gives "
        f"in {count(p_repetition < 0.05)}."
    )
    removal = (
        f"The largest harm of removing one expert of one layer, where the next best takes its "
        f"place, is {harm.max():+z.3f} nats a token: to {data.names[domain]}, of expert {expert} "
        f"in layer {layer}. The median over all cells is {np.median(harm):+z.4f}; "
        f"{(harm < 0).mean():.0%} of the cells are below zero."
    )
    use = (
        f"A domain's use of an expert predicts the harm of removing it (95 % interval above "
        f"zero) in {count(lows[0] > 0)} when the next best takes its place, and in "
        f"{count(lows[1] > 0)} when it falls silent."
    )
    choice = (
        f"The router's probabilities rank the losses of the possible pairs (95 % interval above "
        f"zero) in {count(ranked.interval()[0] > 0)}. The mean rank correlation lies between "
        f"{ranked.observed.min():+z.3f} and {ranked.observed.max():+z.3f}; a router that ranked "
        f"them perfectly would have 1, one that knew nothing 0."
    )
    sentences = [domains, repetition, removal, use, choice]
    return "\n".join(f"- {sentence}" for sentence in sentences)


def fill(page: str, tables: dict[str, str]) -> str:
    """The page with each table between its markers.

    **Raises:** `GrokkitError` if the page lacks a table's markers, or has another's.
    """
    places = re.findall(r"<!-- table: (\S+) -->", page)
    if sorted(places) != sorted(tables):
        raise GrokkitError(f"the page has places for {sorted(places)}, and the tables are "
                           f"{sorted(tables)}")  # fmt: skip
    for name, table in tables.items():
        start, end = f"<!-- table: {name} -->", "<!-- end -->"
        before, rest = page.split(start, 1)
        if end not in rest:
            raise GrokkitError(f"the page does not end the place of table {name!r} with {end}")
        page = f"{before}{start}\n{table}\n{end}{rest.split(end, 1)[1]}"
    return page


def main(arguments: list[str] | None = None) -> None:
    """Measure and print, or write the page."""
    parser = argparse.ArgumentParser(prog="python -m grokkit.zoo.nano.routing_findings")
    parser.add_argument("--model", default="nano", help="shipped model or checkpoint directory")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables on this page")
    parser.add_argument("--passages", type=int, default=12, help="passages of each domain")
    parser.add_argument("--length", type=int, default=64, help="tokens of each passage")
    parser.add_argument("--samples", type=int, default=199, help="resamples a number")
    parser.add_argument("--tokens", type=int, default=3, help="tokens a passage with forced pairs")
    options = parser.parse_args(arguments)
    page = options.write.read_text(encoding="utf-8") if options.write else None
    lm = load(options.model, mesh=make_mesh(1, 1), dtype="float32", progress=False)
    passages = {
        name: [p.text for p in found[: options.passages]] for name, found in load_sample().items()
    }
    tables = measure(
        tables_of.prepare(lm, passages, options.length, options.samples), options.tokens
    )
    if page is None:
        print("\n\n".join(f"## {name}\n\n{table}" for name, table in tables.items()))
        return
    files.write(options.write, fill(page, tables))


if __name__ == "__main__":
    main()
