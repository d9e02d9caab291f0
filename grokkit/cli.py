"""The command line: `grokkit sample`, `inspect`, `convert` and `download`."""

import argparse
import dataclasses
import os
import signal
import socket
import sys
import threading
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

import grokkit
from grokkit import cli_checkpoints, cli_plan, processes
from grokkit.batch_run import Record, batch_facts, model_mark, read_prompts
from grokkit.checkpoint import Checkpoint, check_content, open_checkpoint, stored_specs
from grokkit.errors import ConfigError, GrokkitError, PromptError, TokenizerError
from grokkit.generate import check_prompts
from grokkit.inspect_checkpoint import checkpoint_layout
from grokkit.loading import default_dtype, default_mesh
from grokkit.model import check_mesh, param_specs
from grokkit.sampling import Sampling
from grokkit.tokenizer import Tokenizer
from grokkit.zoo import shipped

PROMPT = "The duty of the Congress is"

BAD_INPUT = 2
INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended
CLOSED_PIPE = 141  # and for one whose output nobody reads


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the commands.

    **Arguments:**

    - `arguments`: by default those of the command line; Ctrl-C then ends the process at once.

    **Returns:** the exit status: 0, 2 for bad input, 130 after Ctrl-C, 141 if the reader of the
    output has gone.
    """
    options = _parser().parse_args(arguments)
    alone = arguments is None and not cli_checkpoints.writes_files(options.run)
    return guarded("grokkit", lambda: options.run(options), is_program=alone)


def guarded(name: str, run: Callable[[], None], is_program: bool) -> int:
    """Run a command so that what is not a bug ends with a message, not a traceback.

    **Arguments:**

    - `name`: what messages begin with.
    - `run`: the command.
    - `is_program`: whether the process is there for this command alone.

    **Returns:** the exit status, as `main` does.
    """
    if is_program:
        exit_on_interrupt()
    if hasattr(sys.stdout, "reconfigure"):
        # A character that the terminal cannot show must not end the text.
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        run()
        sys.stdout.flush()
        return 0
    except GrokkitError as error:
        sys.stdout.flush()
        print(f"{name}: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more as it exits; let that have somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE


def exit_on_interrupt() -> None:
    """Let Ctrl-C end this process at once, with status 130. For commands whose files stay good
    when they are killed.

    Python would wait until the running compilation is done, loses an interrupt that arrives in
    one of JAX's callbacks, and crashes in jaxlib as it exits after one that arrives in a
    compilation. So a thread listens instead, and nothing is torn down.
    """
    listener, notifier = socket.socketpair()
    notifier.setblocking(False)

    def listen() -> None:
        while listener.recv(1) != bytes([signal.SIGINT]):
            pass
        os.write(2, b"\n")
        os._exit(INTERRUPTED)

    signal.set_wakeup_fd(notifier.detach())
    signal.signal(signal.SIGINT, lambda *_: None)
    threading.Thread(target=listen, name="exit-on-interrupt", daemon=True).start()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="grokkit", description="Grok-1-shaped models: sample from them, look at their files."
    )
    parser.add_argument("--version", action="version", version=f"grokkit {grokkit.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    sample = commands.add_parser(
        "sample", help="continue a text",
        description="Load a model and continue a text; it is printed as it is made.",
    )  # fmt: skip
    sample.set_defaults(run=_sample)
    sample.add_argument(
        "checkpoint", nargs="?", default="nano",
        help="nano, the model that ships with grokkit, or a directory that holds ckpt-0/ "
        "(default: nano)",
    )  # fmt: skip
    texts = sample.add_mutually_exclusive_group()
    texts.add_argument(
        "--prompt", default=PROMPT, metavar="TEXT",
        help="the text to continue (default: %(default)s)",
    )  # fmt: skip
    texts.add_argument(
        "--prompts", default=None, metavar="FILE",
        help="a file of texts to continue together instead, one a line, or JSON strings if it ends "
        "in .jsonl; needs --out",
    )  # fmt: skip
    sample.add_argument(
        "--out", default=None, metavar="FILE.jsonl",
        help="with --prompts, where the new texts go, one line of JSON each; the same command "
        "goes on after an interrupt",
    )  # fmt: skip
    sample.add_argument(
        "--slots", type=int, default=8, metavar="N",
        help="with --prompts, texts that are continued at once (default: %(default)s)",
    )  # fmt: skip
    sample.add_argument(
        "--max-len", type=int, default=100, metavar="N",
        help="the most tokens to add; prompt and new tokens must fit in the context (default: "
        "%(default)s)",
    )  # fmt: skip
    sample.add_argument(
        "--temperature", type=float, default=0.7, metavar="T",
        help="below 1 the probable gets more probable; 0 always takes the most probable token "
        "(default: %(default)s)",
    )  # fmt: skip
    sample.add_argument(
        "--top-p", type=float, default=0.95, metavar="P",
        help="draw from the fewest most probable tokens that together reach this probability; 1 "
        "draws from all (default: %(default)s)",
    )  # fmt: skip
    sample.add_argument(
        "--top-k", type=int, default=0, metavar="K",
        help="draw from the K most probable tokens; 0 draws from all (default: %(default)s)",
    )  # fmt: skip
    sample.add_argument(
        "--min-p", type=float, default=0.0, metavar="P",
        help="draw only tokens at least P times as probable as the most probable one (default: "
        "%(default)s)",
    )  # fmt: skip
    sample.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="R",
        help="above 1, tokens that the text holds already become less probable (default: "
        "%(default)s)",
    )  # fmt: skip
    sample.add_argument(
        "--allowed", type=_token_ids, default=None, metavar="ID,ID,...",
        help="ids of the tokens that may be drawn, the end of text, 2, among them if it may end "
        "(default: all)",
    )  # fmt: skip
    sample.add_argument(
        "--seed", type=int, default=0, metavar="S",
        help="the same seed gives the same text; another one, another (default: %(default)s)",
    )  # fmt: skip
    sample.add_argument(
        "--mesh", type=_mesh_shape, default=None, metavar="DATA,MODEL",
        help="devices along the batch, of which one prompt can use 1, and devices that share each "
        "layer's weights (default: 1 and as many as there are and divide the model's shapes)",
    )  # fmt: skip
    sample.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default=None,
        help="what matrix products round to (default: float32 on a CPU, bfloat16 elsewhere)",
    )  # fmt: skip
    sample.add_argument(
        "--virtual-devices", type=int, default=None, metavar="N",
        help="split the CPU into N devices, to try a mesh without the hardware (default: no split)",
    )  # fmt: skip
    sample.add_argument(
        "--stream", action="store_true",
        help="leave the layers on disk and read them again for each token, two in memory at most: "
        "for a model that does not fit",
    )  # fmt: skip
    sample.add_argument("--no-progress", action="store_true", help="no progress bar while loading")
    sample.add_argument(
        "--processes", type=_processes, default=None, metavar="N",
        help="run as one of N processes, on one machine or several, or auto under SLURM; the same "
        "command is started for each (default: alone)",
    )  # fmt: skip
    sample.add_argument(
        "--process", type=int, default=None, metavar="I", help="which of them this is, from 0"
    )
    sample.add_argument(
        "--coordinator", default=None, metavar="HOST:PORT", help="where process 0 is to be found"
    )

    inspect = commands.add_parser(
        "inspect", help="list a checkpoint's tensors and their layout",
        description="Check a checkpoint's files and list each tensor's name, shape, dtype, bytes "
        "and layout on a mesh, from the files' headers: no weight is loaded and no device needed.",
    )  # fmt: skip
    inspect.set_defaults(run=_inspect)
    inspect.add_argument(
        "checkpoint",
        metavar="DIR",
        help="a directory that holds ckpt-0/ or safetensors files, or nano",
    )
    inspect.add_argument(
        "--mesh", type=_mesh_shape, default="1,8", metavar="DATA,MODEL",
        help="devices along the batch, and devices that share each layer's weights (default: "
        "%(default)s)",
    )  # fmt: skip
    inspect.add_argument(
        "--check", action="store_true",
        help="also read all float values and refuse the checkpoint if one is NaN or infinite; of a "
        "conversion, all files, and refuse it if one was altered",
    )  # fmt: skip
    inspect.add_argument("--no-progress", action="store_true", help="no progress bar for --check")
    cli_plan.add(commands, _mesh_shape)
    cli_checkpoints.add_commands(commands)
    return parser


def _mesh_shape(text: str) -> tuple[int, int]:
    """`"1,8"` as (data, model)."""
    try:
        data, model = map(int, text.split(","))
    except ValueError:
        data = model = 0
    if data < 1 or model < 1:
        raise argparse.ArgumentTypeError(
            f"expected two numbers of devices, at least 1 each, as in 1,8; found {text!r}"
        )
    return data, model


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


def _sample(options: argparse.Namespace) -> None:
    if options.virtual_devices is not None:
        grokkit.virtual_devices(options.virtual_devices)
    _join_processes(options)
    mesh = processes.agree(lambda: _prepare(options), together=options.processes is not None)
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
    checkpoint = _open(options.checkpoint)
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


def _inspect(options: argparse.Namespace) -> None:
    checkpoint = _open(options.checkpoint)
    print(checkpoint_layout(checkpoint, *options.mesh))
    if options.check:
        sys.stdout.flush()
        check_content(checkpoint, progress=not options.no_progress)
        print("every float value is finite")


def _specs(checkpoint: Checkpoint) -> Any:
    return stored_specs(checkpoint, param_specs(checkpoint.config))


def _open(source: str) -> Checkpoint:
    return open_checkpoint(shipped(source) or source)


if __name__ == "__main__":
    sys.exit(main())
