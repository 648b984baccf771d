"""TIES-Merging: trim, elect signs, disjoint mean (Yadav et al., NeurIPS 2023, arXiv:2306.01708).

Reference code: prateeky2806/ties-merging, src/utils/merge_utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sap_lightning.errors import check_share
from sap_lightning.functional.consensus import Consensus, ElectedMean, Majority
from sap_lightning.functional.masking import Scope
from sap_lightning.functional.spaces import Parameters, Space, magnitudes
from sap_lightning.merging.clients import Source
from sap_lightning.merging.pruning import PruningMethod
from sap_lightning.models.probe import Answer


@dataclass(frozen=True)
class TIES(PruningMethod):
    """λ times the disjoint mean of the ΔW, each trimmed to its largest elements.

    With clients that count alike, ``authors`` differs from the reference code in two corners only: it keeps exactly
    N − round(ρN) elements, where the code keeps one more and all ties; and where signs cancel exactly it chooses the
    positive, where the code chooses the sign most elements have.

    Args:
        sparsity: ρ, the share that is trimmed; 0.8 keeps the authors' 20 %.
        scale: λ.
        variant: authors: one threshold over a client's whole update. peft: one for each layer, and division by the
            number of clients that agree (``add_weighted_adapter``, ties_svd, with each weight times K). mergekit: one
            for each layer, and division by the weights of those that agree.
        majority: the sign of the larger sum (total) or of more clients (frequency).
    """

    name = "ties"
    scores_elements = True

    sparsity: float = 0.8
    scale: float = 1.0
    variant: Literal["authors", "peft", "mergekit"] = "authors"
    majority: Majority = "total"

    def __post_init__(self) -> None:
        check_share("merge.method.sparsity", self.sparsity)

    @property
    def scope(self) -> Scope:  # type: ignore[override]  # follows from the variant
        return "global" if self.variant == "authors" else "layer"

    def scores(self, source: Source, spaces: Mapping[str, Space], answer: Answer) -> dict[str, Parameters]:
        return magnitudes(spaces)

    def new_consensus(self) -> Consensus:
        return ElectedMean(self.majority, by_count=self.variant == "peft")

    def factor(self, clients: int) -> float:
        # PEFT divides by a count, so its weights are 1 where ours are 1 / K.
        return self.scale * (clients if self.variant == "peft" else 1)
