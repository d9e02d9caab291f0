"""What the `grokkit` command runs: Ctrl-C ends it without a traceback while it imports libraries too.

This is no part of the package, since to import anything in there imports them first.
"""

import os
import signal
import sys

INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended


def main() -> int:
    """Run the command. **Returns:** the exit status; see `grokkit.cli.main`."""
    usual = signal.getsignal(signal.SIGINT)
    if usual is signal.default_int_handler:  # and not ignored, as under nohup
        signal.signal(signal.SIGINT, _end)
    from grokkit.cli import main as run

    signal.signal(signal.SIGINT, usual)
    try:
        return run()
    except KeyboardInterrupt:  # before the command has begun
        print("grokkit: interrupted", file=sys.stderr)
        return INTERRUPTED


def _end(*_: object) -> None:
    # An exception could be lost in a library that is only half imported.
    os.write(2, b"grokkit: interrupted\n")
    os._exit(INTERRUPTED)
