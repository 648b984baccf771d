"""The coordinate-wise median of the updates (Yin et al., ICML 2018, arXiv:1803.01498)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sap_lightning.functional.consensus import coordinatewise, median
from sap_lightning.functional.lora import Update
from sap_lightning.merging.method import LayerwiseMethod


@dataclass(frozen=True)
class Median(LayerwiseMethod):
    """The median of the clients' ΔW at every element; of an even number of clients the mean of the middle two.

    Clients count alike whatever their weights.
    """

    name = "median"
    by_element = True
    uses_weights = False
    merges_prompts = True

    def merge_layer(self, layers: Sequence[Update], weights: Sequence[float]) -> Tensor:
        return coordinatewise(median, layers)
