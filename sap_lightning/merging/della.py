"""DELLA-Merging: drop small elements more often than large ones (Deep, Bhardwaj & Poria 2024, arXiv:2406.11617).

Reference code: declare-lab/della, mergekit/mergekit/sparsify.py and merge_methods/generalized_task_arithmetic.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sap_lightning.errors import check_share
from sap_lightning.functional.consensus import Consensus, ElectedMean
from sap_lightning.functional.lora import Update, dense
from sap_lightning.functional.masking import row_ranks
from sap_lightning.functional.spaces import Parameters, Space
from sap_lightning.merging.clients import Source
from sap_lightning.merging.pruning import PruningMethod, uniform_scores
from sap_lightning.models.probe import Answer


@dataclass(frozen=True)
class DELLA(PruningMethod):
    """λ times TIES' elected mean of the ΔW, each pruned by MAGPRUNE.

    MAGPRUNE drops an element with probability p = ρ + window·(½ − r), where r is the rank of its magnitude in its row
    of ΔW, from 0 (smallest) to 1, and divides what stays by 1 − p. So the share that is dropped is ρ in expectation.
    Draws are those of ``dare``: what is dropped depends on the seed, the adapter and the layer, not on other clients
    and their order. Where p would leave [0, 1], the window is narrowed to 2ρ or 2·(1 − ρ); the reference code fails
    there. The defaults are those of the command in its README.

    Args:
        sparsity: ρ, the mean probability of an element to be dropped.
        window: the width of the range of probabilities, twice mergekit's epsilon; 0 is DARE with election.
        scale: λ.
        seed: of the drops.
        rescale: inverse_keep: each element by 1 / (1 − p), the authors'. l1: to each layer's l1 norm, mergekit's.
    """

    name = "della"

    sparsity: float = 0.3
    window: float = 0.14
    scale: float = 1.1
    seed: int = 0
    rescale: Literal["inverse_keep", "l1"] = "inverse_keep"

    def __post_init__(self) -> None:
        check_share("merge.method.sparsity", self.sparsity)
        check_share("merge.method.window", self.window)

    def scores(self, source: Source, spaces: Mapping[str, Space], answer: Answer) -> dict[str, Parameters]:
        """A uniform random number in [0, 1) and the rank r of every element."""
        numbers = uniform_scores(self.seed, source, spaces)
        return {name: (*numbers[name], row_ranks(space.parameters[0].abs())) for name, space in spaces.items()}

    def masks(self, scores: Mapping[str, Parameters], sparsity: float) -> dict[str, Parameters]:
        return {
            name: (draw >= drop_probabilities(ranks, sparsity, self.window),) for name, (draw, ranks) in scores.items()
        }

    def made_up(self, source: Source, pruned: Mapping[str, Update], sparsity: float) -> Mapping[str, Update]:
        if self.rescale == "l1":
            return super().made_up(source, pruned, sparsity)
        return {name: self._made_up(dense(source.layers[name]), dense(pruned[name]), sparsity) for name in pruned}

    def _made_up(self, delta: Tensor, pruned: Tensor, sparsity: float) -> Tensor:
        kept = 1 - drop_probabilities(row_ranks(delta.abs()), sparsity, self.window)
        return torch.where(pruned != 0, pruned / kept, 0)

    def new_consensus(self) -> Consensus:
        return ElectedMean()

    def factor(self, clients: int) -> float:
        return self.scale


def drop_probabilities(ranks: Tensor, sparsity: float, window: float) -> Tensor:
    """p = ρ + window·(½ − r) of elements of rank r in [0, 1], with the window narrowed to keep p in [0, 1]."""
    return sparsity + min(window, 2 * sparsity, 2 * (1 - sparsity)) * (0.5 - ranks)
