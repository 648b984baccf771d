"""How long a merge should be, from what the clients say of how far their adapters reach."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sap_lightning.functional.consensus import weighted_sum
from sap_lightning.functional.lora import Update, no_change, times
from sap_lightning.functional.reach import LENGTHS, carried_over, transfers, won_at_home
from sap_lightning.functional.rescaling import length_of, norm
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.clients import client_layers, say_how_far


@dataclass(frozen=True)
class ReachOfClients:
    """What clients say of how far their adapters reach, and what follows for a merge of them.

    Attributes:
        transfers: whether they learned something that holds in every style.
        length: Frobenius norm that their merge should have. Where it holds, halfway between those of their average and
            of a client, as a mean of several that point apart is shorter than each; else that of half of the average,
            as where nothing can be tuned (``wise_ft``). 0 where no length wins anything in the mean over the styles.
        won_at_home: what whole adapters win over λ = 0 of images as they are.
        carried_over: what is won over λ = 0 in the style that wins the least, by λ.
    """

    transfers: bool
    length: float
    won_at_home: float
    carried_over: Mapping[float, float]

    @property
    def findings(self) -> dict[str, Any]:
        """For the merge's record."""
        return asdict(self)


def reach_of(adapters: Sequence[Adapter], weights: Sequence[float]) -> ReachOfClients | None:
    """What follows from the clients' manifests; None where one of them does not say how far it reaches.

    Args:
        adapters: the clients'.
        weights: each one's share of the whole.
    """
    if not say_how_far(adapters):
        return None
    reaches = [one.manifest.reach for one in adapters if one.manifest]
    won, holds = carried_over(reaches), transfers(reaches)
    client = sum(weight * one.length for one, weight in zip(adapters, weights, strict=True))
    average = math.hypot(*(norm(weighted_sum(of, weights), 2) for of in client_layers(adapters).values()))
    length = 0.0
    if won.mean(0).max() > 0:
        length = (average + client) / 2 if holds else average / 2
    worst = dict(zip(LENGTHS, won.min(0).values.tolist(), strict=True))
    return ReachOfClients(holds, length, won_at_home(reaches), worst)


def at_length(merged: Mapping[str, Update], length: float) -> dict[str, Update]:
    """The merged update made so long, in Frobenius norm over all layers; nothing, of rank 1, at length 0."""
    size = length_of(merged)
    if length == 0 or size == 0:
        return {name: no_change((update.shape[0], update.shape[1])) for name, update in merged.items()}
    return times(merged, length / size)
