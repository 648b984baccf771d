"""``python -m sap_lightning COMMAND``, or ``sap-lightning COMMAND``: from a command's name to its function."""

from __future__ import annotations

import sys

from lightning.fabric.utilities.exceptions import MisconfigurationException

from sap_lightning import __version__
from sap_lightning.commands import COMMANDS
from sap_lightning.console import quieten
from sap_lightning.errors import InputError, first_line


def main() -> None:
    """Runs a command; bad input ends in one line on standard error and exit code 1."""
    quieten()
    command, *args = sys.argv[1:] or [""]
    if command == "--version":
        print(f"sap-lightning {__version__}")
        sys.exit(0)
    if command not in COMMANDS:
        if command and not command.startswith("-"):
            print(f"error: no command {command!r}", file=sys.stderr)
        lines = (f"  {name:8}{function.__doc__}" for name, function in COMMANDS.items())
        print("usage: python -m sap_lightning COMMAND [--help] [--config FILE] [options]\n", *lines, sep="\n")
        sys.exit(0 if command in ("--help", "-h") else 2)
    try:
        COMMANDS[command](args)
    except InputError as error:
        sys.exit(f"error: {error}")
    except MisconfigurationException as error:  # what a Trainer finds only when it trains
        sys.exit(f"error: trainer: {first_line(error)}")
    except KeyboardInterrupt:
        sys.exit("interrupted: run the same command again to continue")


if __name__ == "__main__":
    main()
