"""Train the vision tower of the world's CLIP further: on what is where in pictures of several things."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoImageProcessor, CLIPModel

import sap_lightning.data
from sap_lightning.data.preprocess import Preprocess
from sap_lightning.data.shapes.arrangement import Arrangement, Box
from sap_lightning.data.shapes.world import CLASSES, COLOURS, STYLES, WALLS

SHAPES_CLIP = Path(sap_lightning.data.__file__).with_name("shapes_clip")
LAYER = -2
"""Whose hidden states a LLaVA takes."""
HUES = (*COLOURS, *WALLS)
EPOCHS = 5
BATCH = 64
LEARNING_RATE = 1e-3


class Drawn(NamedTuple):
    """A picture, what it shows, and where."""

    image: Image.Image
    scene: Arrangement
    boxes: list[Box]


def pretrain_tower(folder: Path, drawn: Sequence[Drawn], seed: int) -> None:
    """Write the world's CLIP with another vision tower: the same bytes for the same seed and machine.

    The CLIP has seen one large thing at a time, and tells of those of a quarter's size next to nothing. Here each
    patch's features are to tell, by a linear layer that is dropped again, which thing is there (or none), its colour
    (or the background's) and the style. The text tower stays as it was, and no longer fits.

    Args:
        folder: where to.
        drawn: pictures to learn from.
        seed: of those linear layers and the order of batches.
    """
    torch.manual_seed(seed)
    clip, preprocess = CLIPModel.from_pretrained(SHAPES_CLIP), Preprocess(str(SHAPES_CLIP))
    images = torch.from_numpy(np.stack([preprocess.pixels(one.image) for one in drawn]))
    config: Any = clip.config.vision_config
    labels = torch.stack([labels_of(one, config.image_size // config.patch_size) for one in drawn])
    heads = [nn.Linear(config.hidden_size, n) for n in (1 + len(CLASSES), len(HUES), len(STYLES))]
    fit(clip.vision_model, heads, preprocess.normalise(images), labels, torch.Generator().manual_seed(seed))
    clip.save_pretrained(folder)
    AutoImageProcessor.from_pretrained(SHAPES_CLIP, backend="pil").save_pretrained(folder)


def labels_of(drawn: Drawn, grid: int) -> Tensor:
    """Numbers of thing (0: none), colour and style at each patch, shape (grid², 3)."""
    centres = (np.arange(grid) + 0.5) / grid
    labels = np.empty((grid, grid, 3), dtype=np.int64)
    labels[:] = 0, HUES.index(drawn.scene.background), list(STYLES).index(drawn.scene.style)
    for item, (x1, y1, x2, y2) in zip(drawn.scene.items, drawn.boxes, strict=True):
        inside = np.outer((centres > y1) & (centres < y2), (centres > x1) & (centres < x2))
        labels[inside, :2] = 1 + CLASSES.index(item.thing), HUES.index(item.colour)
    return torch.from_numpy(labels).flatten(0, 1)


def fit(
    tower: nn.Module, heads: Sequence[nn.Module], images: Tensor, labels: Tensor, generator: torch.Generator
) -> None:
    """Learns the labels (n, patches, 3) of images (n, 3, H, W)."""
    steps = EPOCHS * -(-len(images) // BATCH)
    learned = [*tower.parameters(), *(weight for head in heads for weight in head.parameters())]
    optimizer = torch.optim.AdamW(learned, lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    for epoch in range(EPOCHS):
        total = 0.0
        for chosen in torch.randperm(len(images), generator=generator).split(BATCH):
            seen = tower(images[chosen], output_hidden_states=True).hidden_states[LAYER][:, 1:]
            wanted = labels[chosen].unbind(dim=2)
            loss = sum(
                (
                    F.cross_entropy(head(seen).flatten(0, 1), of.flatten())
                    for head, of in zip(heads, wanted, strict=True)
                ),
                torch.zeros(()),
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(chosen) / len(images)
        print(f"epoch {epoch + 1}/{EPOCHS}: loss of patches {total:.3f}", flush=True)
