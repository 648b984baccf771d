"""Another method's merge, as long as the clients say that their adapters reach: ours, see ``functional.reach``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from sap_lightning.errors import InputError
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.method import MergeMethod, Prepared
from sap_lightning.merging.on_top import Changed, OnTop
from sap_lightning.merging.reach import at_length, reach_of
from sap_lightning.models.probe import AnchorProbe

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AtReach(OnTop):
    """Another method's ΔW, scaled as a whole to the length that the clients' reach asks for.

    They say how images are read with their adapters when the style is changed. Where each style wins a good part of
    what is won at home, the merge is halfway between their average and a client, in Frobenius norm; where one does not,
    or next to nothing is won at home, it is half of the average. Where nothing carries over to the styles together the
    merge is the base itself, and the log says so. The length of the other method does not matter, so methods can be
    compared at one that no label of the unseen domain has chosen.

    Args:
        method: a method, or the name of one at its default settings.
    """

    name = "at_reach"
    needs_manifests = True
    needs_reach = True
    uses_weights = True  # in the length

    method: MergeMethod | str = "average"

    def prepare(
        self, adapters: Sequence[Adapter], weights: Sequence[float], anchors: AnchorProbe | None = None
    ) -> Prepared:
        reach = reach_of(adapters, weights)
        if reach is None:
            raise InputError(
                f"merge.method {self.name}: not every upload's manifest says how far its adapter reaches; train the"
                " clients with --model.reach true and some data.val_fraction, or use another method"
            )
        if reach.length == 0:
            log.warning("nothing that the clients learned carries over to other styles; the merge is the base")
        else:
            said = "holds in every style" if reach.transfers else "is next to nothing, or does not hold in every style"
            log.info("what the clients learned %s", said)
        prepared = self.inner.prepare(adapters, weights, anchors)
        return Changed(prepared, lambda merged: at_length(merged, reach.length), reach.findings)
