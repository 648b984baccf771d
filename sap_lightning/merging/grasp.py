"""GRASP: gradient-attributed singular triplets (Liu et al. 2024, arXiv:2501.00339).

Reference code: LyoAI/GRASP, modeling_grasp.py (``dynamic_svd_selection``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from sap_lightning.errors import check_share
from sap_lightning.functional.lora import LoRALayer
from sap_lightning.functional.spaces import Parameters, SingularSpace, Space
from sap_lightning.functional.subspaces import Triplets
from sap_lightning.functional.triplets import triplet_scores
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.clients import Source
from sap_lightning.merging.pruning import PruningMethod
from sap_lightning.models.probe import AnchorProbe, Answer


@dataclass(frozen=True)
class GRASP(PruningMethod):
    """Mean of the adapters without the singular triplets Φ_k = (u_k, σ_k, v_k) of ΔW that matter least.

    ``paper`` and ``code`` are those of `triplet_scores`. The paper prunes the weights of a language model on a
    language-modelling loss; here it is ΔW on the anchors' alignment loss.

    Args:
        sparsity: ρ, the share of each layer's triplets that is dropped.
        score: the paper's score or the code's.
    """

    name = "grasp"
    needs_anchors = True
    space = "singular"

    sparsity: float = 0.5
    score: Literal["paper", "code"] = "paper"

    def __post_init__(self) -> None:
        check_share("merge.method.sparsity", self.sparsity)

    def examine(self, adapter: Adapter, anchors: AnchorProbe) -> Answer:
        triplets = {name: TripletSpace(layer.to(anchors.device)) for name, layer in adapter.layers.items()}
        gradients, loss = anchors.gradients(adapter.layers, triplets, "mean_then_abs")
        scores = {name: (self._score(space.parameters, gradients[name]).cpu(),) for name, space in triplets.items()}
        return Answer(scores, loss)

    def _score(self, parameters: Parameters, gradients: Parameters) -> Tensor:
        return triplet_scores(Triplets(*parameters), Triplets(*gradients), self.score)

    def scores(self, source: Source, spaces: Mapping[str, Space], answer: Answer) -> Mapping[str, Parameters]:
        return answer.of


class TripletSpace(SingularSpace):
    """θ: the elements of U (d_out, k), σ (k,) and V (k, d_in). ∂L/∂U = GVᵀσ, ∂L/∂σ_k = u_kᵀGv_k, ∂L/∂V = σUᵀG."""

    def __init__(self, layer: LoRALayer) -> None:
        super().__init__(layer)
        self.parameters = (self.U, *self.parameters, self.V)

    def gradients(self, x: Tensor, g: Tensor) -> Parameters:
        U, sigma, V = self.parameters
        of_u, of_v = g.T @ (x @ V.T) * sigma, sigma[:, None] * ((g @ U).T @ x)
        return of_u, ((g @ U) * (x @ V.T)).sum(0), of_v
