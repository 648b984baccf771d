"""SAP, pruning as alignment: keep of each adapter what matters to image–text alignment on public anchors.

Saliency is first-order Taylor importance (Molchanov et al. 2019, arXiv:1906.10771) of the anchors' alignment loss.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from sap_lightning.adapter import Adapter
from sap_lightning.errors import InputError
from sap_lightning.functional.lora import Update, scaled
from sap_lightning.functional.masking import Scope
from sap_lightning.functional.rescaling import Rescale
from sap_lightning.functional.saliency import AnchorLoss, Reduction, loss_reduction, saliency
from sap_lightning.functional.spaces import Parameters, Space, SpaceName
from sap_lightning.merging.distances import mean_cosine
from sap_lightning.merging.method import MergeMethod, PruningMethod, check_positive, check_share, required
from sap_lightning.probe import AnchorProbe

log = logging.getLogger(__name__)


class SAP(PruningMethod):
    """λ times the weighted mean of the adapters, each without the share ρ of its least salient parameters, rescaled.

    Args:
        sparsity: ρ, the share of parameters set to zero.
        space: what is scored and masked: elements of A and B (factor), elements of ΔW (delta), or singular
            triplets of ΔW (singular).
        scope: one threshold for the whole adapter (global) or one for each layer (layer).
        reduction: how the anchors' gradients g_i become one score: |θ·mean g_i| (mean_then_abs),
            mean |θ·g_i| (abs_then_mean) or mean (θ·g_i)² (square).
        rescale: how a pruned adapter is scaled up again: to its l1 or l2 norm before pruning, by 1 / (1 − ρ), or
            rank by rank as RobustMerge does (factor space only).
        rescale_scope: whether l1 and l2 restore the norm of each layer or of the whole adapter.
        scale: λ, above 0. The mean of updates that are nearly at right angles is shorter than each of them.
        loss: the anchors' loss: 1 − cos of a pair (cosine), or InfoNCE from image to text (contrastive).
        sign_aware: keep the parameters that lower the loss most, −θ·mean g_i; needs reduction mean_then_abs.

    Raises:
        InputError: for a combination that is not defined.
    """

    name = "sap"
    needs_anchors = True

    def __init__(
        self,
        sparsity: float = 0.8,
        space: SpaceName = "delta",
        scope: Scope = "global",
        reduction: Reduction = "abs_then_mean",
        rescale: Rescale = "l2",
        rescale_scope: Scope = "layer",
        scale: float = 1.0,
        loss: AnchorLoss = "cosine",
        sign_aware: bool = False,
    ) -> None:
        check_positive("merge.scale", scale)
        self.sparsity = check_share("prune.sparsity", sparsity)
        self.space = space
        self.scope = scope
        self.reduction = reduction
        self.rescale = rescale
        self.rescale_scope = rescale_scope
        self.scale = scale
        self.loss = loss
        self.sign_aware = sign_aware
        if rescale == "robust" and space != "factor":
            raise InputError(f"merge.rescale robust scales the ranks of B and needs prune.space factor, got {space}")
        if sign_aware and reduction != "mean_then_abs":
            raise InputError(f"prune.sign_aware needs prune.reduction mean_then_abs, got {reduction}")
        self.losses: dict[tuple[str, str], float] = {}

    def examine(self, adapter: Adapter, anchors: AnchorProbe) -> dict[str, Parameters]:
        spaces = self.spaces(adapter, device=anchors.device)
        gradients = anchors.gradients(adapter.layers, spaces, self.reduction, self.loss)
        scores = {name: self._score(space.parameters, gradients.of[name]) for name, space in spaces.items()}
        if any(not tensor.isfinite().all() for layer in scores.values() for tensor in layer):
            raise InputError(
                f"upload {adapter.name!r}: its saliency on the anchors is not finite; its weights are too large"
                " for this precision, try --trainer.precision 32-true or leave it out"
            )
        self.losses[anchors.fingerprint, adapter.sha256] = gradients.loss
        return {name: tuple(tensor.cpu() for tensor in layer) for name, layer in scores.items()}

    def apply(self, sparsity: float | None = None) -> dict[str, Update]:
        return _times(super().apply(sparsity), self.scale)

    def share_answers(self, other: SAP) -> None:
        """Keeps what the anchors say in one place with another SAP of the same space, reduction and loss."""
        self.answers, self.losses = other.answers, other.losses

    def loss_before(self, adapter: Adapter) -> float:
        """The anchors' mean loss with the whole adapter."""
        return self.losses[self._asked, adapter.sha256]

    def _score(self, parameters: Parameters, gradients: Parameters) -> Parameters:
        if self.sign_aware:
            return loss_reduction(parameters, gradients)
        return saliency(parameters, gradients, self.reduction)

    def scores(self, adapter: Adapter, spaces: Mapping[str, Space]) -> dict[str, Parameters]:
        return self.evidence(adapter)


class Trial(NamedTuple):
    """One setting that SAPAuto tried, and the alignment loss on the anchors that did not score."""

    space: SpaceName
    sparsity: float
    scale: float
    loss: float


class SAPAuto(MergeMethod):
    """SAP that chooses ρ, space and scale by itself, without labels or images of the unseen domain.

    Where the clients' updates point the same way, their mean cosine above 0, what they learned is shared: half of it
    stays, and the mean is made a little longer. Where they contradict each other, each has learned what holds at home
    only, and most must go: half of the anchors then score, and the others measure the alignment loss of every space and
    sparsity, and of every scale of the best of them. The lowest loss wins, ties go to what was tried first. ``tried``
    holds all trials.

    Agreement between environments as a sign of what carries over: Parascandolo et al. 2021, arXiv:2009.00329.

    Args:
        sparsities: values of ρ to try.
        spaces: spaces to try.
        scales: factors to try on the merged update.
        agreed_sparsity: ρ where the clients agree.
        agreed_scale: λ where the clients agree, above 0.
        reduction: as for SAP.
    """

    name = "sap_auto"
    needs_anchors = True

    def __init__(
        self,
        sparsities: Sequence[float] = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99),
        spaces: Sequence[SpaceName] = ("delta", "factor", "singular"),
        scales: Sequence[float] = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0),
        agreed_sparsity: float = 0.5,
        agreed_scale: float = 1.2,
        reduction: Reduction = "abs_then_mean",
    ) -> None:
        if not (sparsities and spaces and scales):
            raise InputError("merge.method sap_auto: sparsities, spaces and scales must each name something to try")
        self.sparsities = [check_share("merge.method.sparsities", sparsity) for sparsity in sparsities]
        check_positive("merge.method.agreed_scale", agreed_scale)
        self.spaces = list(spaces)
        self.scales = list(scales)
        self.agreed_sparsity = check_share("merge.method.agreed_sparsity", agreed_sparsity)
        self.agreed_scale = agreed_scale
        self.reduction = reduction
        self.tried: list[Trial] = []
        # They keep what the anchors said of an adapter, which is merged for several unseen domains.
        self._scored = {space: SAP(space=space, reduction=reduction) for space in (*self.spaces, SAP().space)}

    def prepare(
        self, adapters: Sequence[Adapter], weights: Sequence[float], anchors: AnchorProbe | None = None
    ) -> None:
        anchors = required(anchors, self)
        self.agreement = mean_cosine(adapters)
        if self.agreement > 0:
            self._keep_what_is_shared(adapters, weights, anchors)
        else:
            self._search(adapters, weights, anchors)

    def _keep_what_is_shared(self, adapters: Sequence[Adapter], weights: Sequence[float], anchors: AnchorProbe) -> None:
        sap = self._scored[SAP().space]
        sap.prepare(adapters, weights, anchors)
        self._by_space = {sap.space: sap}
        loss = anchors.loss(_times(sap.apply(self.agreed_sparsity), self.agreed_scale))
        self.tried = [Trial(sap.space, self.agreed_sparsity, self.agreed_scale, loss)]
        self.base_loss = anchors.loss({})
        log.info("sap_auto: clients agree (mean cosine %.3f), sparsity %g, scale %g", self.agreement, *self.chosen[1:3])

    def _search(self, adapters: Sequence[Adapter], weights: Sequence[float], anchors: AnchorProbe) -> None:
        if len(anchors.chosen) < 2:
            raise InputError("merge.method sap_auto holds out half of the anchors; give it at least two")
        scoring, held_out = anchors.halves()
        self._by_space = {space: self._scored[space] for space in self.spaces}
        for method in self._by_space.values():
            method.prepare(adapters, weights, scoring)
        self.tried = [
            Trial(space, sparsity, 1.0, held_out.loss(self._by_space[space].apply(sparsity)))
            for space, sparsity in product(self.spaces, self.sparsities)
        ]
        space, sparsity, *_ = self.chosen
        merged = self._by_space[space].apply(sparsity)
        for scale in self.scales:
            if scale != 1.0:
                self.tried.append(Trial(space, sparsity, scale, held_out.loss(_times(merged, scale))))
        self.base_loss = held_out.loss({})
        log.info(
            "sap_auto: clients disagree (mean cosine %.3f), tried %d settings on %d held-out anchors: space %s,"
            " sparsity %g, scale %g has the lowest alignment loss, %.4f (%.4f without any merge)",
            self.agreement, len(self.tried), len(held_out.chosen), *self.chosen, self.base_loss,
        )  # fmt: skip

    @property
    def chosen(self) -> Trial:
        """The trial with the lowest loss."""
        return min(self.tried, key=lambda trial: trial.loss)

    @property
    def sap(self) -> SAP:
        """SAP in the space that was chosen, prepared."""
        return self._by_space[self.chosen.space]

    def apply(self, sparsity: float | None = None) -> dict[str, Update]:
        sparsity = self.chosen.sparsity if sparsity is None else sparsity
        return _times(self.sap.apply(sparsity), self.chosen.scale)

    @property
    def findings(self) -> dict[str, Any]:
        tried = [trial._asdict() for trial in self.tried]
        chosen = self.chosen._asdict()
        return {"agreement": self.agreement, "chosen": chosen, "loss_without_merge": self.base_loss, "tried": tried}


def _times(updates: Mapping[str, Update], scale: float) -> dict[str, Update]:
    return {name: scaled(update, scale) for name, update in updates.items()}
