"""Magnitude pruning of each update, then their average (Han et al., NeurIPS 2015, arXiv:1506.02626).

Reference code: ``magnitude_prune`` in huggingface/peft, src/peft/utils/merge_utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sap_lightning.errors import check_share
from sap_lightning.functional.masking import Scope
from sap_lightning.functional.spaces import Parameters, Space, SpaceName, magnitudes
from sap_lightning.merging.clients import Source
from sap_lightning.merging.pruning import PruningMethod
from sap_lightning.models.probe import Answer


@dataclass(frozen=True)
class Magnitude(PruningMethod):
    """The weighted mean of the updates, each without its smallest parameters |θ|; nothing is scaled up again.

    Args:
        sparsity: ρ, the share that is pruned.
        scope: one threshold for a whole adapter, one for each layer, or one for each of its tensors.
        space: what is pruned: elements of A and B, elements of ΔW, or singular triplets of ΔW.
    """

    name = "magnitude"
    scores_elements = True

    sparsity: float = 0.8
    scope: Scope = "layer"
    space: SpaceName = "delta"

    def __post_init__(self) -> None:
        check_share("merge.method.sparsity", self.sparsity)

    def scores(self, source: Source, spaces: Mapping[str, Space], answer: Answer) -> dict[str, Parameters]:
        return magnitudes(spaces)
