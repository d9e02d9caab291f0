"""The commands that write checkpoints: `grokkit convert` and `grokkit download`."""

import argparse
import functools
import sys
from collections.abc import Callable
from typing import Any

from grokkit.checkpoint import convert, download
from grokkit.checkpoint.converting import DTYPES, LAYOUTS
from grokkit.checkpoint.downloading import REPOSITORY
from grokkit.checkpoint.plan_files import SHARD_BYTES
from grokkit.cli_arguments import n_bytes
from grokkit.zoo import shipped


def add_commands(commands: Any) -> None:
    """Add the commands to argparse's subparsers."""
    convert = commands.add_parser(
        "convert", help="write a checkpoint in another layout or precision",
        description="Write a checkpoint in another layout or precision. What was cut off leaves "
        "nothing that loads; the same command then goes on where it stopped.",
    )  # fmt: skip
    convert.set_defaults(run=_convert)
    convert.add_argument(
        "source", metavar="SRC",
        help="a directory that holds ckpt-0/ or safetensors files, or nano",
    )  # fmt: skip
    convert.add_argument("target", metavar="DST", help="a new directory")
    convert.add_argument(
        "--to", choices=LAYOUTS, default=None,
        help="the layout of the original release, or grokkit's own (default: safetensors; official "
        "of grokkit's own in 8 bits)",
    )  # fmt: skip
    convert.add_argument(
        "--dtype", choices=DTYPES, default=None,
        help="what matrices become: floats, with their scales multiplied in, or 8 bits (default: "
        "as they are)",
    )  # fmt: skip
    convert.add_argument(
        "--experts", choices=("int4",), default=None,
        help="round the experts' matrices to 4 bits (default: as --dtype says)",
    )  # fmt: skip
    convert.add_argument(
        "--group-size", type=int, default=32, metavar="N",
        help="rows that share a scale in 4 bits (default: %(default)s)",
    )  # fmt: skip
    convert.add_argument(
        "--shard-bytes", type=n_bytes, default=SHARD_BYTES, metavar="BYTES",
        help="most bytes of a safetensors file, as in 5GB (default: %(default)s)",
    )  # fmt: skip
    convert.add_argument(
        "--verify", action="store_true",
        help="read everything again and compare every tensor; of a finished conversion, only that",
    )  # fmt: skip
    convert.add_argument("--no-progress", action="store_true", help="no progress bars")

    download = commands.add_parser(
        "download", help="fetch the official weights",
        description="Fetch a checkpoint from the Hugging Face Hub, 318 GB for the official one, and "
        "compare every file's digest. The same command goes on after the last complete file. Needs "
        "huggingface_hub: pip install 'grokkit[hub]'.",
    )  # fmt: skip
    download.set_defaults(run=_download)
    download.add_argument("target", metavar="DIR", help="the directory to fill")
    download.add_argument(
        "--repository", default=REPOSITORY, metavar="OWNER/NAME", help="(default: %(default)s)"
    )
    download.add_argument(
        "--revision", default=None, metavar="REV",
        help="a branch, tag or commit (default: the main branch)",
    )  # fmt: skip
    download.add_argument("--no-progress", action="store_true", help="no progress bars")


def goes_on(run: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], None]:
    """A command that says, when Ctrl-C ends it, that nothing of what it did is lost."""

    @functools.wraps(run)
    def said(options: argparse.Namespace) -> None:
        try:
            run(options)
        except KeyboardInterrupt:
            print(
                "\ngrokkit: interrupted; the same command goes on after the last complete file",
                end="", file=sys.stderr,
            )  # fmt: skip
            raise

    return said


def writes_files(run: Callable[..., None]) -> bool:
    """Whether a command writes files, and so must tidy up after Ctrl-C."""
    return run in (_convert, _download)


@goes_on
def _convert(options: argparse.Namespace) -> None:
    source = shipped(options.source) or options.source
    checkpoint = convert(
        source,
        options.target,
        to=options.to,
        dtype=options.dtype,
        experts=options.experts,
        group_size=options.group_size,
        shard_bytes=options.shard_bytes,
        verify=options.verify,
        progress=not options.no_progress,
    )
    print(f"{checkpoint.directory}: {checkpoint.describe('official')}")
    if options.verify:
        print("every tensor is as in the source")


@goes_on
def _download(options: argparse.Namespace) -> None:
    progress = not options.no_progress
    checkpoint = download(options.target, options.repository, options.revision, progress)
    print(f"{checkpoint.directory}: {checkpoint.describe('official')}")
    if checkpoint.tokenizer_file is None:
        print(
            "text needs tokenizer.model beside the weights: take it from the original repository, "
            "https://github.com/xai-org/grok-1"
        )
