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
    """What is won over λ = 0 in each changed style, mean over clients, shape (styles, lengths), float64.

    A shortcut of the home domain shows here: what a client learned of colour is lost on grey images.

    Args:
        reaches: of the clients, at least one.

    Example:
        >>> from sap_lightning.functional.reach import carried_over
        >>> everywhere = [0.5, 0.6, 0.7, 0.8, 0.9]
        >>> shortcut = [0.5, 0.5, 0.4, 0.4, 0.3]
        >>> client = {"plain": everywhere, "grey": shortcut, "edges": everywhere}
        >>> (1000 * carried_over([client])).round().tolist()
        [[0.0, 0.0, -100.0, -100.0, -200.0], [0.0, 100.0, 200.0, 300.0, 400.0]]
    """
    styles = [style for style in reaches[0] if style != "plain"]
    measured = torch.tensor([[list(reach[style]) for style in styles] for reach in reaches], dtype=torch.float64)
    return (measured - measured[..., :1]).mean(0)


def best_length(won: Tensor) -> float:
    """The λ at which the style that wins the least wins most; 0 where it only loses. The shortest, of several alike.

    Args:
        won: what `carried_over` gives, shape (styles, lengths).

    Example:
        >>> import torch
        >>> from sap_lightning.functional.reach import best_length
        >>> best_length(torch.tensor([[0.0, 0.2, 0.3, 0.1, 0.1], [0.0, 0.3, 0.4, 0.5, 0.6]]))
        0.5
    """
    return LENGTHS[int(won.min(0).values.argmax())]
