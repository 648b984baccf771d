"""Random pruning: the control of every method that says which parameters matter.

The authors of saliency pruning as alignment report it beside theirs; reference code: pillowwwwww/Spectral-Consensus,
src/random_pruning.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sap_lightning.errors import InputError, check_share
from sap_lightning.functional.masking import Scope
from sap_lightning.functional.rescaling import Rescale
from sap_lightning.functional.spaces import Parameters, Space, SpaceName
from sap_lightning.merging.clients import Source
from sap_lightning.merging.pruning import MeanOf, PruningMethod, uniform_scores
from sap_lightning.models.probe import Answer


@dataclass(frozen=True)
class RandomPruning(PruningMethod):
    """The weighted mean of the updates, each without a share of its parameters chosen at random.

    Scores are uniform random numbers that depend on the seed, the adapter and the layer, not on other clients and their
    order; a higher sparsity keeps a part of what a lower one does. The reference code drops each element of A and B
    with probability ρ, so that the share is ρ in expectation; here it is exact.

    Args:
        sparsity: ρ, the share that is pruned.
        space: what is pruned: elements of A and B (the reference's), elements of ΔW, or singular triplets of ΔW.
        scope: the share is of a whole adapter, of each layer, or of each of its tensors.
        rescale: how a pruned adapter is scaled up again, layer by layer; the reference does not.
        mean_of: whether the pruned ΔW are averaged, or their A and B apart (factors, in factor space; the reference's).
        seed: of the choice.
    """

    name = "random_pruning"

    sparsity: float = 0.8
    space: SpaceName = "delta"
    scope: Scope = "layer"
    rescale: Rescale = "none"
    mean_of: MeanOf = "delta"
    seed: int = 0

    def __post_init__(self) -> None:
        check_share("merge.method.sparsity", self.sparsity)
        for setting in ("rescale robust", "mean_of factors"):
            name, value = setting.split()
            if getattr(self, name) == value and self.space != "factor":
                raise InputError(f"merge.method.{setting} needs merge.method.space factor, got {self.space}")

    def scores(self, source: Source, spaces: Mapping[str, Space], answer: Answer) -> dict[str, Parameters]:
        return uniform_scores(self.seed, source, spaces)
