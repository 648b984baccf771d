"""Which of a few values lies below the others."""

from __future__ import annotations

from torch import Tensor

LEAST_VALUES = 3
"""Of fewer none can be called the odd one."""
LEAST_SHARE = 2 / 3
"""A value stands out below this share of the median; docs/results/poisoning.md says what that leaves out."""
ROUNDING = 1e-5
"""A median no larger is of values that differ by rounding: of cosines in float32, say."""


def far_below(values: Tensor) -> Tensor:
    """Which values are below two thirds of the median of all, the mean of the middle two where their number is even.

    Our own rule, for values that have a scale of their own: of three or four none can be learned. The median absolute
    deviation, by which outliers are usually told (Iglewicz & Hoaglin 1993), is of three values the smaller of two gaps.

    Args:
        values: shape (n,).

    Returns:
        bool (n,); True for a value that is no finite number, which counts among no others. False for all others where
        fewer than three are finite, or their median is not above `ROUNDING`.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.outliers import far_below
        >>> far_below(torch.tensor([0.5, 0.4, 0.1, 0.3])).tolist()  # the median is 0.35
        [False, False, True, False]
    """
    finite = values.isfinite()
    found = ~finite
    if int(finite.sum()) >= LEAST_VALUES and (median := float(values[finite].double().quantile(0.5))) > ROUNDING:
        found |= values.double() < LEAST_SHARE * median
    return found
