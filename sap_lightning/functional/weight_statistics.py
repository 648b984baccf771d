"""A weight in six numbers, by which StatsMerging knows it (Merugu et al. 2025, arXiv:2506.04567)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def weight_statistics(weight: Tensor) -> Tensor:
    """Mean, variance, norm and the three largest singular values; of a vector the first of them is the norm, others 0.

    Args:
        weight: shape (d_out, d_in), or (1, d) of a vector.

    Returns:
        float64 (6,).

    Example:
        >>> import torch
        >>> from sap_lightning.functional.weight_statistics import weight_statistics
        >>> weight_statistics(torch.tensor([[3.0, 0.0], [0.0, -1.0]])).round(decimals=3).tolist()
        [0.5, 2.25, 3.162, 3.0, 1.0, 0.0]
    """
    weight = weight.double()
    gram = weight @ weight.T if len(weight) < weight.shape[1] else weight.T @ weight
    largest = torch.linalg.eigvalsh(gram).flip(0)[:3].clamp(min=0).sqrt()
    moments = torch.stack([weight.mean(), weight.var(correction=0), weight.norm()])
    return torch.cat([moments, pad(largest, (0, 3 - len(largest)))])
