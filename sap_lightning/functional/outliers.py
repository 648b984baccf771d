"""Which of a few values lies above the others."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEAST_VALUES = 3
"""Of fewer none can be called the odd one."""
MARGIN = 0.15
"""So far above the median a share of mismatches stands out; docs/results/poisoning.md says what that leaves out."""
_CHANCE = 0.6
"""Twice the standard deviation of a share that is uniform in [0, 1]."""


def margin(pairs: int) -> float:
    """How far above the median a mean share of mismatches over this many anchors must be to stand out.

    0.15, or 0.6/√n where that is more, as it is below 16 anchors: twice what chance can move the mean of n shares by.
    Our own choice: a margin known beforehand, for of three or four values none can be learned. Their median absolute
    deviation, by which outliers are usually told (Iglewicz & Hoaglin 1993), is of three values the smaller of two gaps.
    """
    return max(MARGIN, _CHANCE / math.sqrt(pairs))


def above_median(values: Tensor) -> Tensor:
    """How far each value is above the median of all, the mean of the middle two where their number is even.

    Args:
        values: shape (n,).

    Returns:
        float64 (n,); zeros for fewer than three finite values, of which none can be called the odd one; inf for a value
        that is no finite number, which counts among no others.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.outliers import above_median
        >>> above_median(torch.tensor([1.0, 2.0, 4.0, 100.0])).tolist()
        [-2.0, -1.0, 1.0, 97.0]
    """
    values = values.double()
    finite = values.isfinite()
    above = torch.full_like(values, torch.inf)
    few = int(finite.sum()) < LEAST_VALUES
    above[finite] = 0.0 if few else values[finite] - values[finite].quantile(0.5)
    return above
