"""The command line: `grokkit sample`, `inspect`, `plan`, `convert` and `download`."""

import argparse
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence

import grokkit
from grokkit import cli_checkpoints, cli_plan, cli_sample
from grokkit.checkpoint import check_content
from grokkit.cli_arguments import mesh_shape, open_named
from grokkit.errors import GrokkitError
from grokkit.inspect_checkpoint import checkpoint_layout
from grokkit.runtime import compiling

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
        with compiling.announced():
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
        compiling.stop()
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

    cli_sample.add(commands)
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
        "--mesh", type=mesh_shape, default="1,8", metavar="DATA,MODEL",
        help="devices along the batch, and devices that share each layer's weights (default: "
        "%(default)s)",
    )  # fmt: skip
    inspect.add_argument(
        "--check", action="store_true",
        help="also read all float values and refuse the checkpoint if one is NaN or infinite; of a "
        "conversion, all files, and refuse it if one was altered",
    )  # fmt: skip
    inspect.add_argument("--no-progress", action="store_true", help="no progress bar for --check")
    cli_plan.add(commands, mesh_shape)
    cli_checkpoints.add_commands(commands)
    return parser


def _inspect(options: argparse.Namespace) -> None:
    checkpoint = open_named(options.checkpoint)
    print(checkpoint_layout(checkpoint, *options.mesh))
    if options.check:
        sys.stdout.flush()
        check_content(checkpoint, progress=not options.no_progress)
        print("every float value is finite")


if __name__ == "__main__":
    sys.exit(main())
