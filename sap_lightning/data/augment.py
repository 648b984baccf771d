"""Random resized crop and horizontal flip, on a batch and on its device.

What happens to an image depends on (seed, epoch, image) alone: not on the batch it comes in, nor on the number of
processes, nor on whether training was resumed.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

RATIO = (3 / 4, 4 / 3)


class Crops(NamedTuple):
    """One crop per image.

    Attributes:
        boxes: (n, 4) corners x0, y0, x1, y1 as fractions of width and height.
        flips: (n,) bool, mirror left and right.
    """

    boxes: Tensor
    flips: Tensor


def draw_crops(n: int, smallest: float, generator: torch.Generator) -> Crops:
    """Draw n boxes that cover ``smallest`` to 1 of the area at an aspect ratio of 3:4 to 4:3, and n flips of a coin."""
    area = torch.empty(n).uniform_(smallest, 1, generator=generator)
    ratio = torch.empty(n).uniform_(*map(math.log, RATIO), generator=generator).exp()
    # A side longer than the image is cut to it and the other kept long enough, so that area and ratio stay in range.
    size = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], dim=1).clamp(smallest, 1)
    corner = torch.rand(n, 2, generator=generator) * (1 - size)
    flips = torch.rand(n, generator=generator) < 0.5
    return Crops(torch.cat([corner, corner + size], dim=1), flips)


@lru_cache(maxsize=1)
def epoch_crops(n: int, smallest: float, seed: int, epoch: int) -> Crops:
    """The crops of all n images of a domain in one epoch, none of less than ``smallest`` of the area."""
    mixed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    return draw_crops(n, smallest, torch.Generator().manual_seed(mixed))


def resized_crop(images: Tensor, boxes: Tensor, flips: Tensor) -> Tensor:
    """Cut a box out of each image and stretch it to the image's size, bilinear.

    Args:
        images: (B, C, H, W) float.
        boxes: (B, 4) corners x0, y0, x1, y1 as fractions of width and height.
        flips: (B,) bool, mirror left and right after cutting.

    Returns:
        (B, C, H, W) float.
    """
    low, high = boxes[:, :2], boxes[:, 2:]
    size = high - low
    size_x = torch.where(flips, -size[:, 0], size[:, 0])
    theta = boxes.new_zeros(len(boxes), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = size_x, size[:, 1], low + high - 1
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
