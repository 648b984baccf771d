"""``python -m sap_lightning.data.shapes FOLDER`` draws the world."""

from __future__ import annotations

import sys

from jsonargparse import auto_cli

from sap_lightning.data.shapes.world import draw_world
from sap_lightning.errors import InputError


def main() -> None:
    """Draw the world from the command line."""
    try:
        auto_cli(draw_world, as_positional=True)
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
