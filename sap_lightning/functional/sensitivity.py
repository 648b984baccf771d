"""How much the output of a part of a model changes when its input is changed where that hurts most."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sap_lightning.functional.masking import keep_highest


def steepest(gradients: Tensor, radius: float) -> Tensor:
    """ε* = Γ·∂L/∂x / ‖∂L/∂x‖₂ of every sample: the change of length Γ that raises its loss the most, to first order.

    Args:
        gradients: ∂L_i/∂x_i, shape (n, …).
        radius: Γ.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.sensitivity import steepest
        >>> steepest(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), radius=10.0).tolist()
        [[6.0, 8.0], [0.0, 0.0]]
    """
    lengths = torch.linalg.vector_norm(gradients.flatten(1), dim=1)
    scales = torch.where(lengths > 0, radius / lengths, 0.0)
    return gradients * scales.view(-1, *[1] * (gradients.ndim - 1))


def relative_change(before: Tensor, after: Tensor) -> Tensor:
    """‖h(x + ε) − h(x)‖_F / ‖h(x)‖_F of every sample, shape (n,), from outputs of shape (n, …); 0 where h(x) is 0.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.sensitivity import relative_change
        >>> relative_change(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[3.0, 5.0], [1.0, 0.0]])).tolist()
        [0.20000000298023224, 0.0]
    """
    changes = torch.linalg.vector_norm((after - before).flatten(1), dim=1)
    lengths = torch.linalg.vector_norm(before.flatten(1), dim=1)
    return torch.where(lengths > 0, changes / lengths, 0.0)


def most_sensitive(sensitivity: Mapping[int, float], share: float) -> list[int]:
    """The parts of the largest sensitivity, at least one, in ascending order; of equal ones the last are kept.

    Example:
        >>> from sap_lightning.functional.sensitivity import most_sensitive
        >>> most_sensitive({0: 0.3, 1: 0.1, 2: 0.2, 3: 0.4}, share=0.5)
        [0, 3]
    """
    parts = sorted(sensitivity)
    kept = keep_highest(torch.tensor([sensitivity[part] for part in parts], dtype=torch.float64), share)
    return [part for part, stays in zip(parts, kept.tolist(), strict=True) if stays]
