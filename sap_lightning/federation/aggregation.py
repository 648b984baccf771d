"""What a round's uploads become before the next one: the ways of the field to bring LoRA back down to its rank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

from sap_lightning.functional.lora import LoRALayer, Update
from sap_lightning.functional.rounds import brought_down, mean_factors


class Aggregation(ABC):
    """K uploads of a round → the factors that the next one starts from, layer by layer.

    Attributes:
        takes_methods: whether a merge method decides what is brought down; else A and B are averaged.
        keeps_factors: whether A and B stay near the clients' own, so that what an optimizer has gathered of them still
            holds.
    """

    takes_methods = False
    keeps_factors = True

    @abstractmethod
    def start(self, layers: Sequence[LoRALayer], weights: Sequence[float], merged: Update, rank: int) -> LoRALayer:
        """The factors of one layer.

        Args:
            layers: the clients' own.
            weights: each one's share of the whole.
            merged: their merge.
            rank: the largest that a client trains.
        """


class FedIT(Aggregation):
    """A and B averaged apart: Zhang et al. 2023, arXiv:2305.05644.

    Reference code: JayZhang42/FederatedGPT-Shepherd, fed_utils/model_aggregation.py.
    """

    def start(self, layers: Sequence[LoRALayer], weights: Sequence[float], merged: Update, rank: int) -> LoRALayer:
        return mean_factors(layers, weights)


class FlexLoRA(Aggregation):
    """The merge of the ΔW, cut to its largest singular values: Bai et al. 2024, arXiv:2402.11505.

    A client of lower rank takes the first of them.
    """

    takes_methods = True
    keeps_factors = False

    def start(self, layers: Sequence[LoRALayer], weights: Sequence[float], merged: Update, rank: int) -> LoRALayer:
        return brought_down(merged, rank)


Way = Literal["fedit", "flexlora"]
AGGREGATIONS: dict[Way, Aggregation] = {"fedit": FedIT(), "flexlora": FlexLoRA()}
