"""What outputs of a model say of its neurons: how much each is used, and how flat the loss may be around it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.special import entr

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


def sharpness_of(responses: Tensor) -> Tensor:
    """What stands for each neuron's curvature: the variance v of its outputs as v / (v + the median of all), in [0, 1).

    Args:
        responses: shape (n, d), n positions.

    Returns:
        Shape (d,).

    Example:
        >>> import torch
        >>> from sap_lightning.functional.flatness import sharpness_of
        >>> sharpness_of(torch.tensor([[0.0, 0.0, 0.0], [2.0, 4.0, 0.0]])).tolist()  # of variances 1, 4 and 0
        [0.5, 0.800000011920929, 0.0]
    """
    variance = responses.var(0, correction=0)
    return variance / (variance + variance.median()).clamp(min=torch.finfo(variance.dtype).tiny)


def mutual_information(signal: Tensor, responses: Tensor, bins: int = 32) -> Tensor:
    """Mutual information in nats of a signal and each neuron's outputs, by histograms of bins of equal width.

    Args:
        signal: shape (n,), n positions.
        responses: shape (n, d).
        bins: of each of both.

    Returns:
        Shape (d,).

    Example:
        >>> import torch
        >>> from sap_lightning.functional.flatness import mutual_information
        >>> signal = torch.tensor([0.0, 0.0, 1.0, 1.0])
        >>> responses = torch.tensor([[5.0, 1.0], [5.0, 2.0], [9.0, 1.0], [9.0, 2.0]])
        >>> mutual_information(signal, responses, bins=2).tolist()  # ln 2, and nothing
        [0.6931471824645996, 0.0]
    """
    neurons = responses.shape[1]
    cell = _bin(signal[:, None], bins) * bins + _bin(responses, bins)
    cell += torch.arange(neurons) * bins * bins
    joint = torch.bincount(cell.flatten(), minlength=neurons * bins * bins).view(neurons, bins, bins) / len(signal)
    entropies = [entr(p).flatten(1).sum(1) for p in (joint.sum(1), joint.sum(2), joint)]
    return (entropies[0] + entropies[1] - entropies[2]).clamp(min=0)


def _bin(values: Tensor, bins: int) -> Tensor:
    """The bin of each value, between the least and the greatest of its column."""
    least, greatest = values.aminmax(dim=0)
    width = (greatest - least).clamp(min=torch.finfo(values.dtype).tiny)
    return ((values - least) / width * bins).long().clamp(max=bins - 1)


def flatness_aware_importance(signal: Tensor, responses: Tensor) -> Tensor:
    """FAI of FAM: mean |output| · mutual information with the signal / variance of the output, for each neuron.

    Args:
        signal: shape (n,), n positions.
        responses: shape (n, d).

    Returns:
        Shape (d,).

    Example:
        >>> import torch
        >>> from sap_lightning.functional.flatness import flatness_aware_importance
        >>> signal, responses = torch.tensor([0.0, 1.0]), torch.tensor([[3.0, 1.0], [5.0, 1.0]])
        >>> flatness_aware_importance(signal, responses).round(decimals=3).tolist()  # 4 · ln 2 / 1, and 1 · 0 / 0
        [2.7730000019073486, 0.0]
    """
    used, curved = responses.abs().mean(0), responses.var(0, correction=0)
    return used * mutual_information(signal, responses) / (curved + EPSILON)


def as_flat(sharpness: Tensor, other: Tensor, sigma: float) -> Tensor:
    """exp(−|H_i − H_j| / σ) of every neuron of one model and of another, by which FAM lessens their similarity.

    Args:
        sharpness: H of the one, shape (d,).
        other: of the other, shape (d',).
        sigma: σ.

    Returns:
        Shape (d, d').

    Example:
        >>> import torch
        >>> from sap_lightning.functional.flatness import as_flat
        >>> as_flat(torch.tensor([0.5]), torch.tensor([0.5, 0.6]), sigma=0.1).round(decimals=3).tolist()
        [[1.0, 0.36800000071525574]]
    """
    return (-(sharpness[:, None] - other).abs() / sigma).exp()
