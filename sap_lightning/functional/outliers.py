"""How far a value lies from the others, by statistics that one odd value cannot move."""

from __future__ import annotations

import torch
from torch import Tensor

OUTLIER = 3.5
"""Modified z-scores beyond this are outliers (Iglewicz & Hoaglin 1993, How to Detect and Handle Outliers)."""
LEAST_VALUES = 3
"""Of fewer none can be called the odd one."""
_NORMAL_MAD = 0.6745
_NORMAL_MEAN_DEVIATION = 1.253314


def robust_z_scores(values: Tensor) -> Tensor:
    """Modified z-scores 0.6745·(x − median) / MAD, MAD the median of |x − median| (Iglewicz & Hoaglin 1993).

    Where more than half of the values are equal, MAD is 0 and the mean of |x − median| stands in for it:
    (x − median) / (1.253314·mean |x − median|), as in IBM Cognos Analytics. Both constants make the score that of a
    normal distribution. The median of an even number of values is the mean of the middle two.

    Of a few values the scores are rough: of three, MAD is the smaller of the two gaps, so that two values that happen
    to lie close together put the third far out.

    Args:
        values: shape (n,).

    Returns:
        float64 (n,); zeros for fewer than three finite values, of which none can be called the odd one, and for equal
        ones; inf for a value that is no finite number, which counts among no others.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.outliers import OUTLIER, robust_z_scores
        >>> scores = robust_z_scores(torch.tensor([1.0, 2.0, 3.0, 4.0, 100.0]))  # median 3, MAD 1
        >>> scores.round(decimals=2).tolist()
        [-1.35, -0.67, 0.0, 0.67, 65.43]
        >>> (scores.abs() > OUTLIER).tolist()
        [False, False, False, False, True]
    """
    values = values.double()
    if not values.isfinite().all():
        scores = torch.full_like(values, torch.inf)
        scores[values.isfinite()] = robust_z_scores(values[values.isfinite()])
        return scores
    if len(values) < LEAST_VALUES:
        return torch.zeros_like(values)
    deviations = values - _median(values)
    if mad := float(_median(deviations.abs())):
        return _NORMAL_MAD * deviations / mad
    if mean := float(deviations.abs().mean()):
        return deviations / (_NORMAL_MEAN_DEVIATION * mean)
    return torch.zeros_like(values)


def _median(values: Tensor) -> Tensor:
    # torch.median takes the lower of the middle two.
    return values.quantile(0.5)
