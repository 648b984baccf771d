"""Easy images first: which share of its images a client trains on, epoch by epoch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sap_lightning.errors import InputError

Pace = Literal["linear", "sqrt", "exp"]


@dataclass(frozen=True)
class Curriculum:
    """The share of a client's images that an epoch shows, the easiest of them (FibecFed, EMNLP 2024, arXiv:2410.00131).

    With τ = t / (α·T) after t of T epochs the share is, and stays once it is 1,
    linear β + (1 − β)·τ, sqrt √(β² + (1 − β²)·τ), exp β^(1 − τ).

    The paper cuts the images into batches in the order of their difficulty, and shows a share of the batches. Our
    reading: the share is of the images, and batches are drawn from it anew in every epoch, so that an epoch of all
    images is the one that there is without a curriculum.

    Args:
        start: β, the share in the first epoch; 1 shows all images from the first epoch on.
        full_at: α, the share of the training after which all images are shown.
        pace: how the share grows.

    Raises:
        InputError: when a share does not lie in (0, 1].

    Example:
        >>> from sap_lightning.data.curriculum import Curriculum
        >>> [round(Curriculum(start=0.5).share(epoch, epochs=5), 3) for epoch in range(5)]
        [0.5, 0.625, 0.75, 0.875, 1.0]
    """

    start: float = 1.0
    full_at: float = 0.8
    pace: Pace = "linear"

    def __post_init__(self) -> None:
        for name in ("start", "full_at"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"data.curriculum.{name} must lie in (0, 1], got {getattr(self, name)}")

    @property
    def narrows(self) -> bool:
        """Whether any epoch shows less than all images."""
        return self.start < 1

    def share(self, epoch: int, epochs: int) -> float:
        """The share of the images that an epoch shows, of so many epochs."""
        grown, start = epoch / (self.full_at * epochs), self.start
        if grown >= 1:
            return 1.0
        if self.pace == "linear":
            return start + (1 - start) * grown
        return math.sqrt(start**2 + (1 - start**2) * grown) if self.pace == "sqrt" else start ** (1 - grown)

    def images(self, number: int, least: int, epoch: int, epochs: int) -> int:
        """How many of a number of images an epoch shows; at least so many, as far as there are."""
        return max(round(self.share(epoch, epochs) * number), min(least, number))


def easiest(difficulty: Tensor, number: int) -> Tensor:
    """Positions of so many images of the lowest difficulty, in ascending order; of equal ones the first are easier.

    Args:
        difficulty: shape (n,).
        number: at most n.

    Example:
        >>> import torch
        >>> from sap_lightning.data.curriculum import easiest
        >>> easiest(torch.tensor([3.0, 1.0, 2.0, 1.0]), number=3).tolist()
        [1, 2, 3]
    """
    return torch.argsort(difficulty, stable=True)[:number].sort().values
