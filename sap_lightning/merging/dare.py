"""DARE: drop elements at random and rescale the rest (Yu et al., ICML 2024, arXiv:2311.03099).

Reference code: yule-BUAA/MergeLM, utils/utils.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from sap_lightning.errors import check_share
from sap_lightning.functional.consensus import Consensus, ElectedMean, WeightedSum
from sap_lightning.functional.spaces import Parameters, Space
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.pruning import PruningMethod
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

    def scores(self, adapter: Adapter, spaces: Mapping[str, Space], answer: Answer) -> dict[str, Parameters]:
        """Uniform random numbers in [0, 1)."""
        return {name: draws(self.seed, adapter, name, space) for name, space in spaces.items()}

    def masks(self, scores: Mapping[str, Parameters], sparsity: float) -> dict[str, Parameters]:
        return {name: tuple(draw >= sparsity for draw in layer) for name, layer in scores.items()}

    def consensus(self) -> Consensus:
        return ElectedMean() if self.election else WeightedSum()


def draws(seed: int, adapter: Adapter, layer: str, space: Space) -> Parameters:
    """Uniform random numbers in [0, 1) for a layer's parameters, from the seed, the adapter and the layer's name."""
    digest = hashlib.sha256(f"{seed}\0{adapter.sha256}\0{layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]))
    return tuple(torch.rand(theta.shape, generator=generator) for theta in space.parameters)
