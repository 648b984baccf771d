"""SAP, pruning as alignment: keep of each adapter what matters to image–text alignment on public anchors.

Saliency is first-order Taylor importance (Molchanov et al. 2019, arXiv:1906.10771) of the anchors' alignment loss, or
of the next token's loss in texts where language models are fused whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from sap_lightning.errors import InputError, check_positive, check_share
from sap_lightning.functional.consensus import Consensus, ElectedMean, MedianOf
from sap_lightning.functional.masking import Scope
from sap_lightning.functional.rescaling import Rescale
from sap_lightning.functional.saliency import AnchorLoss, Reduction, loss_reduction, saliency
from sap_lightning.functional.spaces import Parameters, Space, SpaceName
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.clients import Source
from sap_lightning.merging.pruning import MeanOf, PruningMethod
from sap_lightning.models.probe import LOSS, AnchorProbe, Answer

SAPConsensus = Literal["mean", "elected", "median"]
OTHER_CONSENSUS: dict[str, Callable[[], Consensus]] = {"elected": ElectedMean, "median": MedianOf}


@dataclass(frozen=True)
class SAP(PruningMethod):
    """λ times the consensus of the adapters, each without the share ρ of its least salient parameters, rescaled.

    Args:
        sparsity: ρ, the share of parameters set to zero.
        space: what is scored and masked: elements of A and B (factor), elements of ΔW (delta), or singular
            triplets of ΔW (singular).
        scope: one threshold for the whole adapter (global), one for each layer (layer), or one for each of its tensors,
            A and B apart in factor space (tensor).
        reduction: how the anchors' gradients g_i become one score: |θ·mean g_i| (mean_then_abs),
            mean |θ·g_i| (abs_then_mean) or mean (θ·g_i)² (square).
        rescale: how a pruned adapter is scaled up again: to its l1 or l2 norm before pruning, by 1 / (1 − ρ), or
            rank by rank as RobustMerge does (factor space only).
        rescale_scope: whether l1 and l2 restore the norm of each layer, of its A and its B apart (tensor, in factor
            space), or of the whole adapter (global).
        rescale_cap: the largest factor of l1 and l2, from 1 on; any if not given.
        mean_of: whether the pruned ΔW are averaged, or their A and B apart as FedAvg does (factors, in factor space).
        consensus: of the pruned ΔW: their weighted mean, their mean over those of the elected sign at every element, as
            in TIES (elected), or their median, whatever the weights.
        scale: λ, above 0. The mean of updates that are nearly at right angles is shorter than each of them.
        loss: the anchors' loss: 1 − cos of a pair (cosine), InfoNCE from image to text against all captions
            (contrastive), the entropy of an image over all captions (entropy), or CLIP's own, both ways within a batch
            of anchors (contrastive_symmetric), whose gradients are summed over the batches; the last needs reduction
            mean_then_abs.
        sign_aware: keep the parameters that lower the loss most, −θ·mean g_i; needs reduction mean_then_abs.

    Raises:
        InputError: when a setting is out of range, or for a combination that is not defined.
    """

    name = "sap"
    needs_anchors = True
    scores_elements = True
    not_asked = frozenset(
        {"sparsity", "scope", "rescale", "rescale_scope", "rescale_cap", "mean_of", "consensus", "scale"}
    )

    sparsity: float = 0.8
    space: SpaceName = "delta"
    scope: Scope = "global"
    reduction: Reduction = "abs_then_mean"
    rescale: Rescale = "l2"
    rescale_scope: Scope = "layer"
    rescale_cap: float | None = None
    mean_of: MeanOf = "delta"
    consensus: SAPConsensus = "mean"
    scale: float = 1.0
    loss: AnchorLoss = "cosine"
    sign_aware: bool = False

    def __post_init__(self) -> None:
        check_share("prune.sparsity", self.sparsity)
        check_positive("prune.scale", self.scale)
        self._check_space()
        if self.rescale_cap is not None and not (self.rescale_cap >= 1 and self.rescale in ("l1", "l2")):
            raise InputError(
                f"prune.rescale_cap {self.rescale_cap}: must be at least 1, and is for prune.rescale l1 or l2, got"
                f" {self.rescale}"
            )
        if self.consensus != "mean" and self.mean_of == "factors":
            raise InputError(f"prune.consensus {self.consensus} is of ΔW, and prune.mean_of factors of A and B apart")
        if self.asks_by_batch and self.reduction != "mean_then_abs":
            raise InputError(
                f"prune.loss {self.loss} is of a batch and needs prune.reduction mean_then_abs, got {self.reduction}"
            )
        if self.sign_aware and self.reduction != "mean_then_abs":
            raise InputError(f"prune.sign_aware needs prune.reduction mean_then_abs, got {self.reduction}")

    def _check_space(self) -> None:
        for setting, needs_factors in (
            ("rescale robust scales the ranks of B", self.rescale == "robust"),
            ("rescale_scope tensor restores A and B apart", self.rescale_scope == "tensor"),
            ("mean_of factors averages A and B apart", self.mean_of == "factors"),
        ):
            if needs_factors and self.space != "factor":
                raise InputError(f"prune.{setting} and needs prune.space factor, got {self.space}")

    @property
    def uses_weights(self) -> bool:  # type: ignore[override]  # a median has none
        return self.consensus != "median"

    @property
    def asks_by_batch(self) -> bool:  # type: ignore[override]  # follows from the loss
        return self.loss == "contrastive_symmetric"

    def examine(self, adapter: Adapter, anchors: AnchorProbe) -> Answer:
        spaces = self.spaces_on(anchors.device, adapter)
        gradients = anchors.gradients(adapter.layers, spaces, self.reduction, self.loss)
        if self.loss == "cosine":
            anchors.recall(
                LOSS, adapter.sha256, lambda: gradients.loss
            )  # whoever asks for it later need not look again
        scores = {name: self.score(space.parameters, gradients.of[name]) for name, space in spaces.items()}
        if any(not tensor.isfinite().all() for layer in scores.values() for tensor in layer):
            raise InputError(
                f"upload {adapter.name!r}: its saliency on the anchors is not finite; its weights are too large"
                " for this precision, try --trainer.precision 32-true or leave it out"
            )
        return Answer({name: tuple(tensor.cpu() for tensor in layer) for name, layer in scores.items()}, gradients.loss)

    def score(self, parameters: Parameters, gradients: Parameters) -> Parameters:
        """How much parameters matter by gradients that were reduced as the method says."""
        if self.sign_aware:
            return loss_reduction(parameters, gradients)
        return saliency(parameters, gradients, self.reduction)

    def scores(self, source: Source, spaces: Mapping[str, Space], answer: Answer) -> Mapping[str, Parameters]:
        return answer.of

    def new_consensus(self) -> Consensus:
        return OTHER_CONSENSUS.get(self.consensus, super().new_consensus)()

    def factor(self, clients: int) -> float:
        return self.scale
