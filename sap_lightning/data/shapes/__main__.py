"""``python -m sap_lightning.data.shapes FOLDER`` draws the world."""

from __future__ import annotations

from sap_lightning.console import run_as_command
from sap_lightning.data.shapes.world import draw_world

if __name__ == "__main__":
    run_as_command(draw_world)
