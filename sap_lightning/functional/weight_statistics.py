"""A weight in six numbers, by which StatsMerging knows it (Merugu et al. 2025, arXiv:2506.04567)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from sap_lightning.functional.lora import LoRALayer, Update, singular_triplets


def weight_statistics(weight: Update) -> Tensor:
    """Mean, variance, norm and the three largest singular values; of a vector the first of them is the norm, others 0.

    Args:
        weight: shape (d_out, d_in), or (1, d) of a vector; in factor form it is never made dense.

    Returns:
        float64 (6,).

    Example:
        >>> import torch
        >>> from sap_lightning.functional.weight_statistics import weight_statistics
        >>> weight_statistics(torch.tensor([[3.0, 0.0], [0.0, -1.0]])).round(decimals=3).tolist()
        [0.5, 2.25, 3.162, 3.0, 1.0, 0.0]
    """
    mean, squares, sigma = _of_factors(weight) if isinstance(weight, LoRALayer) else _of_matrix(weight.double())
    d_out, d_in = weight.shape
    moments = torch.stack([mean, (squares / (d_out * d_in) - mean**2).clamp(min=0), squares.sqrt()])
    return torch.cat([moments, pad(sigma, (0, 3 - len(sigma)))])


def _of_matrix(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, sum of squares, and the three largest singular values, or as many as there are."""
    gram = weight @ weight.T if len(weight) < weight.shape[1] else weight.T @ weight
    return weight.mean(), weight.square().sum(), torch.linalg.eigvalsh(gram).flip(0)[:3].clamp(min=0).sqrt()


def _of_factors(layer: LoRALayer) -> tuple[Tensor, Tensor, Tensor]:
    layer = LoRALayer(layer.A.double(), layer.B.double(), layer.scale)
    d_out, d_in = layer.shape
    total = layer.scale * layer.B.sum(0) @ layer.A.sum(1)
    sigma = singular_triplets(layer)[1]
    return total / (d_out * d_in), sigma.square().sum(), sigma[:3]


def scaled_over_all(statistics: Tensor) -> Tensor:
    """Each of them of mean 0 and deviation 1 over weights and models; one that is the same everywhere is 0.

    Args:
        statistics: float64 (weights, K, 6).

    Returns:
        float64 of that shape.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.weight_statistics import scaled_over_all
        >>> scaled_over_all(torch.tensor([[[1.0, 7.0], [3.0, 7.0]]], dtype=torch.float64)).tolist()
        [[[-1.0, 0.0], [1.0, 0.0]]]
    """
    centred = statistics - statistics.mean((0, 1))
    return centred / centred.std((0, 1), correction=0).clamp(min=torch.finfo(torch.float64).tiny)
