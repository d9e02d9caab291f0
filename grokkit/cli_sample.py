"""The command `grokkit sample`."""

import argparse
import dataclasses
import os
import sys
import unicodedata
from pathlib import Path
from typing import Any

import jax

import grokkit
from grokkit import processes
from grokkit.batch_run import Record, batch_facts, model_mark, read_prompts
from grokkit.checkpoint import Checkpoint, stored_specs
from grokkit.cli_arguments import mesh_shape, open_named
from grokkit.errors import ConfigError, PromptError, TokenizerError
from grokkit.generate import check_prompts
from grokkit.loading import default_dtype, default_mesh
from grokkit.model import check_mesh, param_specs
from grokkit.runtime import compiling
from grokkit.sampling import Sampling
from grokkit.tokenizer import Tokenizer

PROMPT = "The duty of the Congress is"


def add(commands: Any) -> None:
    """Add the command to a parser."""
    command = commands.add_parser(
        "sample", help="continue a text",
        description="Load a model and continue a text; it is printed as it is made.",
    )  # fmt: skip
    command.set_defaults(run=_run)
    command.add_argument(
        "checkpoint", nargs="?", default="nano",
        help="nano, the model that ships with grokkit, or a directory that holds ckpt-0/ "
        "(default: nano)",
    )  # fmt: skip
    texts = command.add_mutually_exclusive_group()
    texts.add_argument(
        "--prompt", default=PROMPT, metavar="TEXT",
        help="the text to continue (default: %(default)s)",
    )  # fmt: skip
    texts.add_argument(
        "--prompts", default=None, metavar="FILE",
        help="a file of texts to continue together instead, one a line, or JSON strings if it ends "
        "in .jsonl; needs --out",
    )  # fmt: skip
    command.add_argument(
        "--out", default=None, metavar="FILE.jsonl",
        help="with --prompts, where the new texts go, one line of JSON each; the same command "
        "goes on after an interrupt",
    )  # fmt: skip
    command.add_argument(
        "--slots", type=int, default=8, metavar="N",
        help="with --prompts, texts that are continued at once (default: %(default)s)",
    )  # fmt: skip
    command.add_argument(
        "--max-len", type=int, default=100, metavar="N",
        help="the most tokens to add; prompt and new tokens must fit in the context (default: "
        "%(default)s)",
    )  # fmt: skip
    command.add_argument(
        "--temperature", type=float, default=0.7, metavar="T",
        help="below 1 the probable gets more probable; 0 always takes the most probable token "
        "(default: %(default)s)",
    )  # fmt: skip
    command.add_argument(
        "--top-p", type=float, default=0.95, metavar="P",
        help="draw from the fewest most probable tokens that together reach this probability; 1 "
        "draws from all (default: %(default)s)",
    )  # fmt: skip
    command.add_argument(
        "--top-k", type=int, default=0, metavar="K",
        help="draw from the K most probable tokens; 0 draws from all (default: %(default)s)",
    )  # fmt: skip
    command.add_argument(
        "--min-p", type=float, default=0.0, metavar="P",
        help="draw only tokens at least P times as probable as the most probable one (default: "
        "%(default)s)",
    )  # fmt: skip
    command.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="R",
        help="above 1, tokens that the text holds already become less probable (default: "
        "%(default)s)",
    )  # fmt: skip
    command.add_argument(
        "--allowed", type=_token_ids, default=None, metavar="ID,ID,...",
        help="ids of the tokens that may be drawn, the end of text, 2, among them if it may end "
        "(default: all)",
    )  # fmt: skip
    command.add_argument(
        "--seed", type=int, default=0, metavar="S",
        help="the same seed gives the same text; another one, another (default: %(default)s)",
    )  # fmt: skip
    command.add_argument(
        "--mesh", type=mesh_shape, default=None, metavar="DATA,MODEL",
        help="devices along the batch, of which one prompt can use 1, and devices that share each "
        "layer's weights (default: 1 and as many as there are and divide the model's shapes)",
    )  # fmt: skip
    command.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default=None,
        help="what matrix products round to (default: float32 on a CPU, bfloat16 elsewhere)",
    )  # fmt: skip
    command.add_argument(
        "--virtual-devices", type=int, default=None, metavar="N",
        help="split the CPU into N devices, to try a mesh without the hardware (default: no split)",
    )  # fmt: skip
    command.add_argument(
        "--stream", action="store_true",
        help="leave the layers on disk and read them again for each token, two in memory at most: "
        "for a model that does not fit",
    )  # fmt: skip
    command.add_argument("--no-progress", action="store_true", help="no progress bar while loading")
    command.add_argument(
        "--processes", type=_processes, default=None, metavar="N",
        help="run as one of N processes, on one machine or several, or auto under SLURM; the same "
        "command is started for each (default: alone)",
    )  # fmt: skip
    command.add_argument(
        "--process", type=int, default=None, metavar="I", help="which of them this is, from 0"
    )
    command.add_argument(
        "--coordinator", default=None, metavar="HOST:PORT", help="where process 0 is to be found"
    )


def _token_ids(text: str) -> list[int]:
    """`"5,7,9"` as numbers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected token ids with commas between, as in 5,7,9; found {text!r}"
        ) from None


def _processes(text: str) -> int | str:
    """A number of processes, or `"auto"`."""
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1 on, or auto; found {text!r}")
    return int(text)


def _run(options: argparse.Namespace) -> None:
    if options.virtual_devices is not None:
        grokkit.virtual_devices(options.virtual_devices)
    _join_processes(options)
    mesh = processes.agree(lambda: _prepare(options), together=options.processes is not None)
    if not processes.is_first():
        compiling.stop()
    lm = grokkit.load(
        options.checkpoint, mesh, options.dtype, progress=not options.no_progress,
        stream=options.stream,
    )  # fmt: skip
    if options.prompts is not None:
        _sample_all(options, lm, read_prompts(options.prompts))
        return
    tokens = lm.stream(options.prompt, options.max_len, **vars(_sampling(options)))
    show = print if processes.is_first() else _silent
    shown = _harmless if sys.stdout.isatty() else str
    show(shown(options.prompt), end="", flush=True)
    for token in tokens:
        show(shown(token.text), end="", flush=True)
    show()


def _harmless(text: str) -> str:
    """Text with its control characters spelt out: a terminal would do what they say."""
    return "".join(
        repr(c)[1:-1] if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text
    )


def _silent(*_: Any, **__: Any) -> None:
    """What the other processes print: process 0 speaks for all."""


def _prepare(options: argparse.Namespace) -> tuple[jax.sharding.Mesh, dict[str, str]]:
    """The mesh, and what several processes must have been asked alike."""
    if (options.prompts is None) != (options.out is None):
        raise PromptError("--prompts FILE and --out FILE.jsonl go together; found one of them")
    prompts = None if options.prompts is None else read_prompts(options.prompts)
    checkpoint = open_named(options.checkpoint)
    mesh = _mesh(options, checkpoint)
    _check_request(options, checkpoint, mesh, prompts)
    request = {k: v for k, v in vars(options).items() if k not in _OF_EACH_PROCESS}
    facts = {"request": repr(sorted(request.items(), key=lambda item: item[0]))[:2000]}
    if prompts is not None:
        facts |= batch_facts(prompts, _sampling(options), options.max_len, [], options.slots)
    return mesh, facts


_OF_EACH_PROCESS = {"run", "checkpoint", "prompts", "out", "process", "no_progress"}


def _join_processes(options: argparse.Namespace) -> None:
    given = (options.coordinator, options.process)
    if options.processes is None:
        if given != (None, None):
            raise ConfigError("--coordinator and --process need --processes")
    elif options.processes == "auto":
        if given != (None, None):
            raise ConfigError("--processes auto finds coordinator and process out; leave them away")
        processes.start()
    elif None in given:
        raise ConfigError(
            f"--processes {options.processes} needs --coordinator HOST:PORT, the address of process "
            f"0, and --process, which of them this is"
        )
    else:
        processes.start(options.coordinator, options.processes, options.process)
    if options.processes is not None:
        _keep_stdout()


def _keep_stdout() -> None:
    """Leave standard output to this program: libraries below Python say there what they do."""
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = open(own, "w", encoding=sys.stdout.encoding, errors="replace")  # noqa: SIM115


def _sample_all(options: argparse.Namespace, lm: grokkit.LanguageModel, prompts: list[str]) -> None:
    found = grokkit.batch(
        prompts, lm, options.out, slots=options.slots, max_len=options.max_len,
        progress=not options.no_progress, **vars(_sampling(options)),
    )  # fmt: skip
    if not processes.is_first():
        return
    refused = [c for c in found if c.finish_reason == "refused"]
    for completion in refused:
        print(f"grokkit: prompt {completion.index}: {completion.error}", file=sys.stderr)
    print(f"{options.out}: {len(found) - len(refused)} of {len(found)} texts")


def _sampling(options: argparse.Namespace) -> Sampling:
    return Sampling(
        **{field.name: getattr(options, field.name) for field in dataclasses.fields(Sampling)}
    )


def _mesh(options: argparse.Namespace, checkpoint: Checkpoint) -> jax.sharding.Mesh:
    if options.mesh is None:
        return default_mesh(checkpoint.config, _specs(checkpoint))
    data, model = options.mesh
    if data > 1 and options.prompts is None:
        raise ConfigError(
            f"--mesh {data},{model} spreads prompts over {data} devices, and there is one prompt; "
            f"use --mesh 1,{model}"
        )
    found = len(jax.devices())
    if data * model > found:
        raise ConfigError(
            f"--mesh {data},{model} needs {data * model} devices, found {found}; on a CPU, add "
            f"--virtual-devices {data * model}"
        )
    return grokkit.make_mesh(data, model)


def _check_request(
    options: argparse.Namespace,
    checkpoint: Checkpoint,
    mesh: jax.sharding.Mesh,
    prompts: list[str] | None,
) -> None:
    """Refuse before the weights are loaded, which can take long, what would fail after."""
    check_mesh(checkpoint.config, mesh, _specs(checkpoint))
    _sampling(options).rows(1, checkpoint.config.vocab_size)
    if options.max_len < 1:
        raise PromptError(f"--max-len must be at least 1, found {options.max_len}")
    if checkpoint.tokenizer_file is None:
        raise TokenizerError(
            f"{checkpoint.directory}: expected a tokenizer.model beside ckpt-0/, found none; put "
            f"the one that came with the weights there"
        )
    tokenizer = Tokenizer.from_file(checkpoint.tokenizer_file, checkpoint.config.vocab_size)
    if prompts is not None:
        parts = mesh.shape["data"]
        if options.slots < 1 or options.slots % parts:
            raise PromptError(
                f"--slots must be at least 1 and divide over the mesh's {parts} 'data' devices, "
                f"found {options.slots}"
            )
        # One that does not fit is refused by itself; a file of something else, altogether.
        if processes.is_first():
            dtype = options.dtype or default_dtype(mesh.devices.flat[0].platform)
            record = Record(Path(options.out), prompts, _sampling(options), options.max_len, [],
                            model_mark(checkpoint, dtype))  # fmt: skip
            with record.alone():
                record.read()
        return
    check_prompts(checkpoint.config, mesh, [tokenizer.encode(options.prompt)], options.max_len)


def _specs(checkpoint: Checkpoint) -> Any:
    return stored_specs(checkpoint, param_specs(checkpoint.config))
