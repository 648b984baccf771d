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
KEPT = 0.25
"""Of what is won at home, what the style that wins the least must win for the adapters to hold beyond it."""
WORTH = 0.1
"""What must be won at home for a share of it to say anything."""


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
    return _won(reaches, [style for style in reaches[0] if style != "plain"])


def won_at_home(reaches: Sequence[Reach]) -> float:
    """What whole adapters, at λ = 1, win over λ = 0 of images as they are, mean over clients.

    Args:
        reaches: of the clients, at least one.

    Example:
        >>> from sap_lightning.functional.reach import won_at_home
        >>> round(won_at_home([{"plain": [0.5, 0.6, 0.7, 0.8, 0.9], "grey": [0.5, 0.4, 0.3, 0.2, 0.1]}]), 3)
        0.4
    """
    return float(_won(reaches, ["plain"])[0, -1])


def transfers(reaches: Sequence[Reach]) -> bool:
    """Whether whole adapters, at λ = 1, win `WORTH` as images are, and in every changed style at least `KEPT` of it.

    What was learned of one's own domain alone is lost where the style changes: where shortcuts were to be learned, the
    worst style won at most a tenth of what was won at home, and mostly lost; elsewhere four tenths or more. And of a
    base that hardly gets better at home nobody can tell whether it gets better elsewhere (docs/results/which.md).

    Args:
        reaches: of the clients, at least one.

    Example:
        >>> from sap_lightning.functional.reach import transfers
        >>> everywhere = [0.5, 0.6, 0.7, 0.8, 0.9]
        >>> hardly = [0.5, 0.55, 0.6, 0.58, 0.55]
        >>> transfers([{"plain": everywhere, "grey": hardly, "edges": everywhere}])
        False
    """
    home = won_at_home(reaches)
    return bool(home >= WORTH and carried_over(reaches)[:, -1].min() >= KEPT * home)


def won_elsewhere(reach: Reach) -> float:
    """What a whole adapter, at λ = 1, wins in the mean over changed styles, as a share of what was left to win at home.

    A domain that the base knows well leaves less to be won, which says nothing against who has won most of that. 0
    where the adapter loses, and where nothing was left to be won; 1 at most, as styles may win more than that.

    Args:
        reach: of one client.

    Example:
        >>> from sap_lightning.functional.reach import won_elsewhere
        >>> client = {"plain": [0.6, 0.7, 0.8, 0.9, 0.9], "grey": [0.5, 0.5, 0.6, 0.6, 0.7], "edges": [0.4] * 5}
        >>> round(won_elsewhere(client), 3)  # 0.2 and 0 are won, of 0.4
        0.25
    """
    won = carried_over([reach])[:, -1].mean()
    left = 1 - reach["plain"][0]
    return min(max(float(won) / left, 0.0), 1.0) if left > 0 else 0.0


def _won(reaches: Sequence[Reach], styles: Sequence[str]) -> Tensor:
    """What is won over λ = 0 in these styles, mean over clients, shape (styles, lengths), float64."""
    measured = torch.tensor([[list(reach[style]) for style in styles] for reach in reaches], dtype=torch.float64)
    return (measured - measured[..., :1]).mean(0)
