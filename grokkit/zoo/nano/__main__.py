"""`python -m grokkit.zoo.nano tokenizer|train|export|evaluate|compare`."""

import argparse
import datetime
import os
import sys
from pathlib import Path

SHIPPED = Path(__file__).parent.parent / "weights" / "nano"

# glibc gives large freed blocks back to the system at once, and a training step then spends half
# of its time on page faults. These must stand before the process starts.
_ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "20000000000",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TOP_PAD_": "268435456",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def _deadline(text: str) -> float:
    """HH:MM, the next such time of day, as seconds since the epoch."""
    now = datetime.datetime.now()
    try:
        hour, minute = map(int, text.split(":"))
        end = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected HH:MM, found {text!r}") from None
    return (end if end > now else end + datetime.timedelta(days=1)).timestamp()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    main = argparse.ArgumentParser(prog="python -m grokkit.zoo.nano", description=__doc__)
    commands = main.add_subparsers(dest="command", required=True)

    def command(name: str, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.add_argument("--run", type=Path, default=Path("nano-run"), help="folder of the run")
        return sub

    command("tokenizer", "read the domains, train the tokenizer, encode the text")
    train = command("train", "train, or go on with a run that was interrupted")
    end = train.add_mutually_exclusive_group(required=True)
    end.add_argument("--until", type=_deadline, metavar="HH:MM", help="end at this time of day")
    end.add_argument("--hours", type=float, help="end after so many hours")
    end.add_argument("--steps", type=int, help="end after so many steps in all")
    train.add_argument(
        "--from-stable",
        action="store_true",
        help="go on from before the decay of the learning rate, to train an ended run for longer",
    )
    train.add_argument(
        "--rewarm",
        type=float,
        metavar="SHARE",
        help="go on with a run that has ended: from this share of the peak rate down to nothing",
    )
    for name, help in [
        ("export", "quantise the run's latest state into the shipped checkpoint"),
        ("evaluate", "measure a checkpoint, print a table and write card.json beside it"),
        ("compare", "measure what experts in 4 bits cost a checkpoint, and print a table"),
    ]:
        sub = command(name, help)
        sub.add_argument(
            "--model", type=Path, default=SHIPPED, help="checkpoint directory (the shipped one)"
        )
        if name == "compare":
            sub.set_defaults(run=None)
            sub.description = f"{help}; without --run, on the held-out passages that ship with it"
    return main


def main(arguments: list[str] | None = None) -> None:
    """Run one command."""
    options = parser().parse_args(arguments)
    # Imported late: JAX reads the environment, and --help should be quick.
    if options.command == "tokenizer":
        from grokkit.zoo.nano.data import prepare

        prepare(options.run)
    elif options.command == "train":
        _train(options)
    elif options.command == "export":
        from grokkit.zoo.nano.export import export
        from grokkit.zoo.nano.recipe import Recipe

        step = export(Recipe(), options.run, options.model)
        print(f"step {step} is now {options.model}; measure it with `evaluate`")
    elif options.command == "compare":
        from grokkit.zoo.nano.compare import compare_4_bits
        from grokkit.zoo.nano.data import load_corpus

        corpus = None if options.run is None else load_corpus(options.run)
        print(compare_4_bits(options.model, corpus))
    else:
        _evaluate(options)


def _evaluate(options: argparse.Namespace) -> None:
    import grokkit
    from grokkit.zoo.nano import evaluate
    from grokkit.zoo.nano.data import load_corpus
    from grokkit.zoo.nano.recipe import Recipe

    corpus, recipe = load_corpus(options.run), Recipe()
    lm = grokkit.load(options.model, mesh=grokkit.make_mesh(1, 1), dtype="float32")
    card = evaluate.evaluate(lm, corpus, options.run)
    step = card["quantisation"]["step"]
    card["training"] = evaluate.training_figures(options.run, lm.config, recipe.batch, step)
    card["weights_sha256"] = evaluate.weights_digest(options.model)
    print(evaluate.table(card))
    evaluate.write_card(card, options.model)


def _train(options: argparse.Namespace) -> None:
    import signal
    import time

    from grokkit.zoo.nano.data import load_corpus
    from grokkit.zoo.nano.probes import make_probe
    from grokkit.zoo.nano.recipe import Recipe
    from grokkit.zoo.nano.train import LATEST, STABLE, Schedule, load_state, train

    # A run in the background is stopped with SIGTERM; it keeps its state as on Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    recipe, corpus = Recipe(), load_corpus(options.run)
    deadline = options.until
    if options.hours is not None:
        deadline = time.time() + 3600 * options.hours
    schedule = Schedule(recipe, options.steps, deadline)
    path = options.run / (STABLE if options.from_stable else LATEST)
    start = load_state(path, recipe) if path.exists() else None
    if options.rewarm is not None:
        if start is None or not 0 < options.rewarm < 1:
            raise SystemExit("--rewarm takes a share between 0 and 1, and a run to go on with")
        start = start._replace(decay=options.rewarm)
    train(
        recipe,
        corpus,
        options.run,
        schedule,
        start=start,
        probe=make_probe(recipe.config, corpus),
    )


if __name__ == "__main__":
    if sys.platform == "linux" and any(os.environ.get(k) != v for k, v in _ALLOCATOR.items()):
        command = [sys.executable, "-m", "grokkit.zoo.nano", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **_ALLOCATOR})
    main()
