"""How far an adapter reaches: what its client's held-out images say of multiples of it when their style is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sap_lightning.functional.styles import STYLES

LENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""λ: multiples of an adapter at which its client measures; what lies beyond its training is not for home to judge."""
Reach = Mapping[str, Sequence[float]]
"""Style → the mean probability of the right class at every length; ``plain`` for images as they are."""
MEASURED = ("plain", *STYLES)
"""What a reach measures."""


def carried_over(reaches: Sequence[Reach]) -> Tensor:
    """What is won over λ = 0 in the style that wins the least, mean over clients, shape (lengths,).

    A shortcut of the home domain shows here: what a client learned of colour is lost on grey images.

    Args:
        reaches: of the clients, at least one.

    Example:
        >>> from sap_lightning.functional.reach import carried_over
        >>> everywhere = [0.5, 0.6, 0.7, 0.8, 0.9]
        >>> shortcut = [0.5, 0.5, 0.4, 0.4, 0.3]
        >>> client = {"plain": everywhere, "grey": shortcut, "edges": everywhere}
        >>> [round(value, 3) for value in carried_over([client]).tolist()]
        [0.0, 0.0, -0.1, -0.1, -0.2]
    """
    styles = [style for style in reaches[0] if style != "plain"]
    measured = torch.tensor([[list(reach[style]) for style in styles] for reach in reaches], dtype=torch.float64)
    return (measured - measured[..., :1]).mean(0).min(0).values


def best_length(reaches: Sequence[Reach]) -> float:
    """The λ at which most is carried over in every style; 0 where nothing is. The shortest, where several are alike.

    Args:
        reaches: of the clients, at least one.

    Example:
        >>> from sap_lightning.functional.reach import best_length
        >>> best_length([{"plain": [0.5] * 5, "grey": [0.5, 0.6, 0.8, 0.7, 0.6]}])
        0.5
    """
    return LENGTHS[int(carried_over(reaches).argmax())]
