"""What outputs of a model say of its neurons: how much each is used, and how flat the loss may be around it."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Sharpness = Literal["code", "paper"]
EPSILON = 1e-6


def sharpness_aware_saliency(
    weight: Tensor, direction: Tensor, sharpness: Sharpness = "code", a: float = 0.1
) -> Tensor:
    """SAFE-M's score of every weight, |w·g| less where g is large: over 1 + a·g² (``code``), or g² + ε (``paper``).

    Args:
        weight: w, any shape.
        direction: g of the same shape, which stands for the gradient.
        sharpness: what stands for the sharpness of the loss.
        a: in the score of the code.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.flatness import sharpness_aware_saliency
        >>> weight, direction = torch.tensor([1.0, -2.0]), torch.tensor([2.0, 3.0])
        >>> sharpness_aware_saliency(weight, direction, a=1.0).tolist()  # 2/5 and 6/10
        [0.4000000059604645, 0.6000000238418579]
    """
    square = direction.square()
    return (weight * direction).abs() / (1 + a * square if sharpness == "code" else square + EPSILON)
