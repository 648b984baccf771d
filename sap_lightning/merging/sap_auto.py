"""SAP that chooses its sparsity, space and scale by itself, without labels or images of the unseen domain."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

from sap_lightning.errors import InputError, check_positive, check_share
from sap_lightning.functional.lora import times
from sap_lightning.functional.saliency import Reduction
from sap_lightning.functional.spaces import SpaceName
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.at_reach import AtReach
from sap_lightning.merging.clients import say_how_far
from sap_lightning.merging.distances import mean_cosine
from sap_lightning.merging.method import MergeMethod, Prepared, required
from sap_lightning.merging.pruning import Pruning
from sap_lightning.merging.sap import SAP
from sap_lightning.models.probe import AnchorProbe

log = logging.getLogger(__name__)


class Trial(NamedTuple):
    """One setting that SAPAuto tried, and the alignment loss on the anchors that did not score."""

    space: SpaceName
    sparsity: float
    scale: float
    loss: float


@dataclass(frozen=True)
class SAPAuto(MergeMethod):
    """SAP at the settings that the clients and the anchors suggest.

    Where every client says how far its adapter reaches (``functional.reach``), they decide how long the merge is:
    ``at_reach`` of SAP at ρ = ``reach_sparsity``. Unless weights are given, each then counts by what it wins in other
    styles. Where nothing that they learned carries over to these, the merge is the base itself, and the log says so.

    Where they do not say, the updates themselves are asked. Where these point the same way, their mean cosine above 0,
    what the clients learned is shared: half of it stays, and the mean is made a little longer. Where they contradict
    each other, each has learned what holds at home only, and most must go: half of the anchors then score, and the
    others measure the alignment loss of every space and sparsity, and of every scale of the best of them. The lowest
    loss wins, ties go to what was tried first. The findings hold all trials.

    Agreement between environments as a sign of what carries over: Parascandolo et al. 2021, arXiv:2009.00329.

    Args:
        sparsities: values of ρ to try.
        spaces: spaces to try.
        scales: factors to try on the merged update.
        reach_sparsity: ρ where the clients say how far they reach.
        agreed_sparsity: ρ where the clients agree.
        agreed_scale: λ where the clients agree, above 0.
        reduction: as for SAP.

    Raises:
        InputError: when there is nothing to try, or a setting is out of range.
    """

    name = "sap_auto"
    needs_manifests = True
    needs_anchors = True
    weighs_by_reach = True
    has_masks = True

    sparsities: Sequence[float] = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99)
    spaces: Sequence[SpaceName] = ("delta", "factor", "singular")
    scales: Sequence[float] = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
    reach_sparsity: float = 0.65
    agreed_sparsity: float = 0.5
    agreed_scale: float = 1.2
    reduction: Reduction = "abs_then_mean"

    def __post_init__(self) -> None:
        for name in ("sparsities", "spaces", "scales"):  # lists, where they come from a config file
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not (self.sparsities and self.spaces and self.scales):
            raise InputError("merge.method sap_auto: sparsities, spaces and scales must each name something to try")
        for sparsity in self.sparsities:
            check_share("merge.method.sparsities", sparsity)
        for scale in self.scales:
            check_positive("merge.method.scales", scale)
        check_share("merge.method.reach_sparsity", self.reach_sparsity)
        check_share("merge.method.agreed_sparsity", self.agreed_sparsity)
        check_positive("merge.method.agreed_scale", self.agreed_scale)

    def prepare(
        self, adapters: Sequence[Adapter], weights: Sequence[float], anchors: AnchorProbe | None = None
    ) -> Prepared:
        anchors = required(anchors, self)
        if say_how_far(adapters):
            sap = SAP(self.reach_sparsity, reduction=self.reduction)
            return AtReach(sap).prepare(adapters, weights, anchors)
        agreement = mean_cosine(adapters)
        if agreement > 0:
            trials = Trials(adapters, weights, self.reduction, anchors, anchors)
            trials.measure(SAP().space, self.agreed_sparsity, [self.agreed_scale])
        else:
            trials = self._search(adapters, weights, anchors)
        chosen, without = trials.best, trials.measuring.loss({})
        log.info(
            "sap_auto: clients %s (mean cosine %.3f), tried %d settings on %d anchors: space %s, sparsity %g, scale %g"
            " has the lowest alignment loss, %.4f (%.4f without any merge)",
            "agree" if agreement > 0 else "disagree", agreement, len(trials.tried), len(trials.measuring.pairs),
            *chosen, without,
        )  # fmt: skip
        findings = {
            "agreement": agreement,
            "chosen": chosen._asdict(),
            "loss_without_merge": without,
            "tried": [trial._asdict() for trial in trials.tried],
        }
        return replace(trials.prepared(chosen), findings=findings)

    def _search(self, adapters: Sequence[Adapter], weights: Sequence[float], anchors: AnchorProbe) -> Trials:
        if len(anchors.pairs) < 2:
            raise InputError("merge.method sap_auto holds out half of the anchors; give it at least two")
        trials = Trials(adapters, weights, self.reduction, *anchors.halves())
        for space, sparsity in product(self.spaces, self.sparsities):
            trials.measure(space, sparsity, [1.0])
        space, sparsity, *_ = trials.best
        trials.measure(space, sparsity, [scale for scale in self.scales if scale != 1.0])
        return trials


class Trials:
    """Settings of SAP tried out on the same clients; some anchors score them and some, or the same, measure."""

    def __init__(
        self,
        adapters: Sequence[Adapter],
        weights: Sequence[float],
        reduction: Reduction,
        scoring: AnchorProbe,
        measuring: AnchorProbe,
    ) -> None:
        self.adapters = adapters
        self.weights = weights
        self.reduction = reduction
        self.scoring = scoring
        self.measuring = measuring
        self.tried: list[Trial] = []

    def measure(self, space: SpaceName, sparsity: float, scales: Sequence[float]) -> None:
        """Tries some scales of one merge."""
        merged = self._prepare(SAP(sparsity, space, reduction=self.reduction)).apply()
        for scale in scales:
            self.tried.append(Trial(space, sparsity, scale, self.measuring.loss(times(merged, scale))))

    @property
    def best(self) -> Trial:
        """The trial with the lowest loss."""
        return min(self.tried, key=lambda trial: trial.loss)

    def prepared(self, trial: Trial) -> Pruning:
        """SAP at the settings of a trial."""
        return self._prepare(SAP(trial.sparsity, trial.space, scale=trial.scale, reduction=self.reduction))

    def _prepare(self, sap: SAP) -> Pruning:
        return sap.prepare(self.adapters, self.weights, self.scoring)
