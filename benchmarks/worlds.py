"""What the benchmarks run on when nothing else is named: the built-in world and its model."""

from __future__ import annotations

from pathlib import Path

import sap_lightning.data
from sap_lightning.data.shapes.world import draw_world

SHAPES_CLIP = str(Path(sap_lightning.data.__file__).with_name("shapes_clip"))
WORLD = Path("runs/shapes_world")


def images_in(part: str) -> Path:
    """The world's ``domains`` or ``anchors``, drawn if they are not there."""
    if not WORLD.exists():
        draw_world(WORLD)
    return WORLD / part
