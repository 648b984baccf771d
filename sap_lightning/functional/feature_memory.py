"""A memory of labelled features that answers by likeness: no training, one product with what it remembers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot


def recalled(features: Tensor, keys: Tensor, labels: Tensor, classes: int, beta: float) -> Tensor:
    """A·Y with A = exp(−β·(1 − f·Fᵀ)), the cache of Tip-Adapter (Zhang et al. 2022, arXiv:2207.09519).

    Args:
        features: normalised f, shape (n, d).
        keys: normalised F of the images that are remembered, shape (m, d).
        labels: their classes, shape (m,), which Y has one-hot.
        classes: number of classes.
        beta: β; the larger, the less an image counts that is not alike.

    Returns:
        What the memory has of each class, shape (n, classes).

    Example:
        >>> import torch
        >>> from sap_lightning.functional.feature_memory import recalled
        >>> keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> recalled(keys[:1], keys, torch.tensor([1, 0, 0]), classes=2, beta=1.0).round(decimals=3).tolist()
        [[0.7360000014305115, 1.0]]
    """
    alike = torch.exp(-beta * (1 - features @ keys.T))
    return alike @ one_hot(labels, classes).to(alike.dtype)
