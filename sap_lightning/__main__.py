"""``python -m sap_lightning COMMAND``, or ``sap-lightning COMMAND``: from a command's name to its function."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import NoReturn

from sap_lightning import __version__

INTERRUPTIONS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM; Lightning alone would end without a word, and on SIGTERM with exit code 0."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number


def main() -> None:
    """Runs a command; bad input ends in one line on standard error and exit code 1, an interruption in 130 or 143."""
    before = {number: signal.signal(number, _interrupt) for number in INTERRUPTIONS}
    try:
        _run()
    except Interrupted as end:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print("interrupted: run the same command again to continue", file=sys.stderr)
        sys.exit(end.exit_code)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    for other in INTERRUPTIONS:
        signal.signal(other, signal.SIG_IGN)  # what is half-written is cleared away now
    raise Interrupted(number)


def _commands(named: str) -> Mapping[str, Callable[[Sequence[str]], None]]:
    """All commands by name, or the named one alone where it does without what the others import."""
    # Here, as imports take seconds in which a command can be interrupted too.
    if named == "fuse":
        from sap_lightning.fuse import fuse

        return {"fuse": fuse}
    from sap_lightning.commands import COMMANDS

    return COMMANDS


def _run() -> None:
    command, *args = sys.argv[1:] or [""]
    if command == "--version":
        print(f"sap-lightning {__version__}")
        sys.exit(0)
    from sap_lightning.console import quieten
    from sap_lightning.errors import in_one_line, is_said

    commands = _commands(command)
    quieten()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name in letters that the locale has none for
    if command not in commands:
        if command and not command.startswith("-"):
            print(f"error: no command {command!r}", file=sys.stderr)
        lines = (f"  {name:9}{function.__doc__}" for name, function in commands.items())
        print("usage: python -m sap_lightning COMMAND [--help] [--config FILE] [options]\n", *lines, sep="\n")
        sys.exit(0 if command in ("--help", "-h") else 2)
    try:
        commands[command](args)
    except Exception as error:
        if not is_said(error):
            raise
        sys.exit(f"error: {in_one_line(error)}")


if __name__ == "__main__":
    main()
