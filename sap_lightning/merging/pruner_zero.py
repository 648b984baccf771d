"""Pruner-Zero: the symbolic score |W|·|W|·σ(|G|) that its search found (Dong et al., ICML 2024, arXiv:2406.02924).

Reference code: pprp/Pruner-Zero, data/best_tree.json and lib/prune.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from sap_lightning.errors import check_share
from sap_lightning.functional.masking import keep_in_rows
from sap_lightning.functional.spaces import Parameters, Space
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.clients import Source
from sap_lightning.merging.pruning import PruningMethod
from sap_lightning.models.probe import AnchorProbe, Answer


@dataclass(frozen=True)
class PrunerZero(PruningMethod):
    """Mean of the adapters without the elements of ΔW that score lowest in their row.

    As in the authors' code, G is the root of the summed squares of the anchors' gradients, σ is min-max scaling over
    a layer, and every output row drops the same share. There W is a language model's weight; here it is ΔW.

    Args:
        sparsity: ρ, the share of every row that is dropped.
    """

    name = "pruner_zero"
    needs_anchors = True

    sparsity: float = 0.5

    def __post_init__(self) -> None:
        check_share("merge.method.sparsity", self.sparsity)

    def examine(self, adapter: Adapter, anchors: AnchorProbe) -> Answer:
        squares = anchors.gradients(adapter.layers, self.spaces_on(anchors.device, adapter), "square")
        # The number of anchors and the root of the mean's divisor fall out of min-max scaling.
        return squares._replace(of={name: tuple(g.sqrt().cpu() for g in layer) for name, layer in squares.of.items()})

    def scores(self, source: Source, spaces: Mapping[str, Space], answer: Answer) -> dict[str, Parameters]:
        return {
            name: tuple(w.square() * min_max(g) for w, g in zip(space.parameters, answer.of[name], strict=True))
            for name, space in spaces.items()
        }

    def masks(self, scores: Mapping[str, Parameters], sparsity: float) -> dict[str, Parameters]:
        return {name: tuple(keep_in_rows(score, sparsity) for score in layer) for name, layer in scores.items()}


def min_max(values: Tensor) -> Tensor:
    """Values moved and scaled to [0, 1]; all 1 where they are all the same, which leaves a score to the weights."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else values.new_ones(values.shape)
