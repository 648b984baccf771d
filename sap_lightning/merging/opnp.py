"""OPNP: parameters whose sensitivity is exceptionally large are dropped like those where it is near zero.

Chen et al., NeurIPS 2023, arXiv:2402.10062; the authors published no code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sap_lightning.functional.masking import Scope, keep_masks
from sap_lightning.functional.spaces import Parameters, Space
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.clients import Source
from sap_lightning.merging.pruning import PruningMethod, check_both_ends
from sap_lightning.models.probe import AnchorProbe, Answer


@dataclass(frozen=True)
class OPNP(PruningMethod):
    """Mean of the adapters without the elements of ΔW whose mean |∂L/∂ΔW| is largest or near zero.

    The paper takes the gradient of a classifier's energy and prunes its last layer. Here the loss is the anchors'
    alignment loss and the parameters are those of the adapter; the shares are ours, as the paper's are not known to us.

    Args:
        sparsity: share dropped altogether, at both ends.
        largest: share dropped at the upper end; at most ``sparsity``.
        scope: thresholds over the whole adapter or over each layer, whose one tensor here is ΔW.
    """

    name = "opnp"
    needs_anchors = True
    not_asked = frozenset({"sparsity", "largest", "scope"})
    has_one_threshold = False

    sparsity: float = 0.5
    largest: float = 0.01
    scope: Scope = "layer"

    def __post_init__(self) -> None:
        check_both_ends(self.sparsity, self.largest)

    def examine(self, adapter: Adapter, anchors: AnchorProbe) -> Answer:
        gradients = anchors.gradients(adapter.layers, self.spaces_on(anchors.device, adapter), "abs_then_mean")
        return gradients._replace(of={name: tuple(g.cpu() for g in layer) for name, layer in gradients.of.items()})

    def scores(self, source: Source, spaces: Mapping[str, Space], answer: Answer) -> Mapping[str, Parameters]:
        return answer.of

    def masks(self, scores: Mapping[str, Parameters], sparsity: float) -> dict[str, Parameters]:
        largest = min(self.largest, sparsity)
        without_small = keep_masks(scores, sparsity - largest, self.scope)
        # What went at the lower end cannot go again at the upper one, where scores are equal.
        reversed_scores = {
            name: tuple(torch.where(keep, -s, torch.inf) for s, keep in zip(layer, without_small[name], strict=True))
            for name, layer in scores.items()
        }
        without_large = keep_masks(reversed_scores, largest, self.scope)
        return {
            name: tuple(a & b for a, b in zip(without_small[name], without_large[name], strict=True)) for name in scores
        }
