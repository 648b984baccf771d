"""The coordinate-wise trimmed mean of the updates (Yin et al., ICML 2018, arXiv:1803.01498)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from sap_lightning.errors import InputError
from sap_lightning.functional.consensus import coordinatewise, trimmed_mean
from sap_lightning.functional.lora import Update
from sap_lightning.merging.method import LayerwiseMethod


@dataclass(frozen=True)
class TrimmedMean(LayerwiseMethod):
    """The mean of the clients' ΔW at every element without the smallest and largest values there.

    Clients count alike whatever their weights.

    Args:
        trim: share cut at each end: of K clients the ⌊trim·K⌋ smallest and as many largest values. Fewer than
            1 / trim clients are averaged whole.

    Raises:
        InputError: when trim does not lie in [0, 0.5).
    """

    name = "trimmed_mean"
    by_element = True
    uses_weights = False
    merges_prompts = True

    trim: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.trim < 0.5:
            raise InputError(f"merge.method.trim must lie in [0, 0.5), got {self.trim}")

    def merge_layer(self, layers: Sequence[Update], weights: Sequence[float]) -> Tensor:
        return coordinatewise(partial(trimmed_mean, trim=self.trim), layers)
