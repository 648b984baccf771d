"""``python -m sap_lightning COMMAND``: from a command's name to its function."""

from __future__ import annotations

import sys

from sap_lightning import cli
from sap_lightning.errors import InputError
from sap_lightning.quiet import quieten

COMMANDS = {
    "fit": cli.fit,
    "sweep": cli.sweep,
    "client": cli.client,
    "merge": cli.merge,
    "test": cli.test,
    "predict": cli.predict,
}


def main() -> None:
    """Runs a command; bad input ends in one line on standard error and exit code 1."""
    quieten()
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        lines = (f"  {name:8}{function.__doc__}" for name, function in COMMANDS.items())
        print("usage: python -m sap_lightning COMMAND [--help] [--config FILE] [options]\n", *lines, sep="\n")
        sys.exit(0 if sys.argv[1:2] in (["--help"], ["-h"]) else 2)
    try:
        COMMANDS[sys.argv[1]](sys.argv[2:])
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: run the same command again to continue")


if __name__ == "__main__":
    main()
