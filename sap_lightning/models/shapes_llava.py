"""``python -m sap_lightning.models.shapes_llava FOLDER`` pretrains the shapes world's own small LLaVA."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from jsonargparse import auto_cli

import sap_lightning.data
from sap_lightning.console import quieten
from sap_lightning.data.shapes import pretrain_language
from sap_lightning.data.shapes.arrangement import arranged, some_things
from sap_lightning.data.shapes.pretrain import SIZE, THREADS
from sap_lightning.data.shapes.world import COLOUR_TEMPLATES, STYLES, TEMPLATES
from sap_lightning.errors import InputError, check_at_least
from sap_lightning.files import refuse_existing
from sap_lightning.models.pretrain_connector import pretrain_connector

SHAPES_CLIP = Path(sap_lightning.data.__file__).with_name("shapes_clip")
PICTURES = 4096
EPOCHS = 4
BATCH = 32
LEARNING_RATE = 3e-3


def pretrain(folder: str | Path, seed: int = 0) -> None:
    """Write a LLaVA checkpoint: the same bytes for the same seed and machine.

    Its vision tower is that of the world's CLIP, its language model learns from texts alone, and its connector from
    captions of neutral pictures: of one to three things, in any style, before any background.

    Args:
        folder: where to; must not exist yet.
        seed: of all that is drawn at random.

    Raises:
        InputError: the folder exists, or the seed is negative.
    """
    refuse_existing(folder)
    check_at_least("seed", seed, 0)
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as temporary:
        language, pictures = Path(temporary) / "language", Path(temporary) / "pictures"
        pretrain_language.pretrain(language, seed)
        draw_pictures(pictures, PICTURES, seed)
        pretrain_connector(
            str(SHAPES_CLIP), str(language), pictures / "captions.jsonl", folder, EPOCHS, BATCH, LEARNING_RATE, seed
        )


def draw_pictures(folder: Path, number: int, seed: int) -> None:
    """Neutral pictures of several things, each with a caption."""
    folder.mkdir()
    rng = np.random.default_rng([seed, number])
    with (folder / "captions.jsonl").open("w", encoding="utf-8") as lines:
        for at in range(number):
            scene, name = arranged(str(rng.choice(list(STYLES))), some_things(rng), rng), f"{at:05}.png"
            scene.draw(SIZE, rng)[0].save(folder / name)
            caption = scene.caption(rng, TEMPLATES + COLOUR_TEMPLATES)
            lines.write(json.dumps({"file_name": name, "captions": [caption]}) + "\n")


def main() -> None:
    """Pretrain from the command line."""
    quieten()
    try:
        auto_cli(pretrain, as_positional=True)
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
