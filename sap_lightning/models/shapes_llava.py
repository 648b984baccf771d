"""``python -m sap_lightning.models.shapes_llava FOLDER`` pretrains the shapes world's own small LLaVA."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch

from sap_lightning.console import quieten, run_as_command
from sap_lightning.data.shapes import pretrain_language
from sap_lightning.data.shapes.arrangement import arranged, some_things
from sap_lightning.data.shapes.pretrain import SIZE, THREADS
from sap_lightning.data.shapes.pretrain_tower import Drawn, pretrain_tower
from sap_lightning.data.shapes.world import COLOUR_TEMPLATES, STYLES, TEMPLATES
from sap_lightning.errors import check_at_least
from sap_lightning.files import refuse_existing
from sap_lightning.models.pretrain_connector import Whole, assemble, caption_samples, train, write

PICTURES = 4096
ALIGNED_EPOCHS = 4
PATCHES = 1024
"""A step of aligning."""
EPOCHS = 3
BATCH = 32
LEARNING_RATE = 3e-3


def pretrain(folder: str | Path, seed: int = 0) -> None:
    """Write a LLaVA checkpoint: the same bytes for the same seed and machine.

    Its vision tower is that of the world's CLIP, trained further on small things; its language model learns from texts
    alone. Then both are frozen, and the connector learns from neutral pictures, of one to three things, in any style,
    before any background: first to say of each patch what those texts would, then their captions.

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
        language, tower, pictures = (Path(temporary) / name for name in ("language", "tower", "pictures"))
        pretrain_language.pretrain(language, seed)
        drawn = draw_pictures(pictures, PICTURES, seed)
        pretrain_tower(tower, drawn, seed)
        whole = assemble(str(tower), str(language), seed)
        samples = caption_samples(pictures / "captions.jsonl")
        align(whole, [cast(Path, sample.image) for sample in samples], drawn, seed)
        train(whole, samples, EPOCHS, BATCH, LEARNING_RATE, seed)
        write(whole, folder)


def align(whole: Whole, images: Sequence[Path], drawn: Sequence[Drawn], seed: int) -> None:
    """Trains the connector by least squares to give the embedding that a text would have in each patch's place.

    From a connector at random, captions alone find what the language model listens to somewhat later.
    """
    tokenizer, rng = whole.encoder.tokenizer, np.random.default_rng([seed, len(drawn)])
    connector, cpu = whole.llava.model.multi_modal_projector, torch.device("cpu")
    batches = [images[at : at + BATCH] for at in range(0, len(images), BATCH)]
    with torch.no_grad():
        seen = torch.cat([whole.vision(some, cpu) for some in batches]).flatten(0, 1)
        words = [pretrain_language.in_words(one.scene, one.boxes, rng) for one in drawn]
        ids = torch.tensor(tokenizer(words).input_ids)
        targets = whole.language.get_input_embeddings()(ids).flatten(0, 1)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(connector.parameters(), LEARNING_RATE, weight_decay=0.0)
    for _ in range(ALIGNED_EPOCHS):
        for chosen in torch.randperm(len(seen), generator=generator).split(PATCHES):
            loss = (connector(seen[chosen]) - targets[chosen]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def draw_pictures(folder: Path, number: int, seed: int) -> list[Drawn]:
    """Neutral pictures of several things, saved each with a caption."""
    folder.mkdir()
    rng = np.random.default_rng([seed, number])
    drawn = []
    with (folder / "captions.jsonl").open("w", encoding="utf-8") as lines:
        for at in range(number):
            scene, name = arranged(str(rng.choice(list(STYLES))), some_things(rng), rng), f"{at:05}.png"
            image, boxes = scene.draw(SIZE, rng)
            image.save(folder / name)
            drawn.append(Drawn(image, scene, boxes))
            caption = scene.caption(rng, TEMPLATES + COLOUR_TEMPLATES)
            lines.write(json.dumps({"file_name": name, "captions": [caption]}) + "\n")
    return drawn


if __name__ == "__main__":
    quieten()
    run_as_command(pretrain)
