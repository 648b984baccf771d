"""DARE: drop elements at random and rescale the rest (Yu et al., ICML 2024, arXiv:2311.03099).

Reference code: yule-BUAA/MergeLM, utils/utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sap_lightning.errors import check_share
from sap_lightning.functional.consensus import Consensus, ElectedMean, WeightedSum
from sap_lightning.functional.spaces import Parameters, Space
from sap_lightning.merging.clients import Source
from sap_lightning.merging.pruning import PruningMethod, uniform_scores
from sap_lightning.models.probe import Answer


@dataclass(frozen=True)
class DARE(PruningMethod):
    """The weighted mean of the ΔW, each of whose elements is dropped with probability ρ.

    The share that is dropped is therefore ρ in expectation only. What is dropped depends on the seed, the adapter and
    the layer, not on other clients and their order.

    Args:
        sparsity: ρ, the probability of an element to be dropped.
        seed: of the drops.
        election: merge what is left by TIES' sign election (DARE-TIES) without a further trim, not by the mean.
        rescale: inverse_keep: by 1 / (1 − ρ), the authors'. l1: to each layer's l1 norm, mergekit's.
    """

    name = "dare"

    sparsity: float = 0.9
    seed: int = 0
    election: bool = False
    rescale: Literal["inverse_keep", "l1"] = "inverse_keep"

    def __post_init__(self) -> None:
        check_share("merge.method.sparsity", self.sparsity)

    def scores(self, source: Source, spaces: Mapping[str, Space], answer: Answer) -> dict[str, Parameters]:
        return uniform_scores(self.seed, source, spaces)

    def masks(self, scores: Mapping[str, Parameters], sparsity: float) -> dict[str, Parameters]:
        return {name: tuple(draw >= sparsity for draw in layer) for name, layer in scores.items()}

    def new_consensus(self) -> Consensus:
        return ElectedMean() if self.election else WeightedSum()
