"""Which clients have a part in a merge: all, or those whose anchor loss does not stand out."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch

from sap_lightning.errors import InputError
from sap_lightning.functional.outliers import LEAST_VALUES, OUTLIER, robust_z_scores
from sap_lightning.io.adapter import Adapter
from sap_lightning.models.probe import LOSS, AnchorProbe

log = logging.getLogger(__name__)


class Selection(NamedTuple):
    """The adapters that are merged, and the names of those that are left out."""

    adapters: Sequence[Adapter]
    rejected: list[str]


class Standing(NamedTuple):
    """How an adapter stands among the others by the anchors' loss with it alone."""

    adapter: Adapter
    loss: float
    z: float

    @property
    def stands_out(self) -> bool:
        """Whether its loss is above the others' beyond what chance gives."""
        return self.z > OUTLIER


def standings(adapters: Sequence[Adapter], anchors: AnchorProbe) -> list[Standing]:
    """Each adapter's loss alone, and its robust z-score among them."""
    losses = losses_alone(adapters, anchors)
    scores = robust_z_scores(torch.tensor(losses)).tolist()
    return [Standing(*one) for one in zip(adapters, losses, scores, strict=True)]


def without_outliers(adapters: Sequence[Adapter], anchors: AnchorProbe) -> Selection:
    """Leaves out adapters whose own anchor loss has a robust z-score above 3.5 among them.

    Raises:
        InputError: when no adapter has a finite loss.
    """
    every = standings(adapters, anchors)
    if not any(math.isfinite(one.loss) for one in every):
        raise InputError("no upload has a finite anchor loss; all of them are broken, or training diverged")
    for adapter, loss, z in filter(lambda one: one.stands_out, every):
        log.warning("%s left out: anchor loss %.4f, robust z-score %.1f", adapter.name, loss, z)
    kept = [one.adapter for one in every if not one.stands_out]
    return Selection(kept, [one.adapter.name for one in every if one.stands_out])


def doubts_on_anchors(adapters: Sequence[Adapter], anchors: AnchorProbe) -> list[str]:
    """Which adapters' own anchor loss stands out, in words."""
    return [
        f"upload {adapter.name!r}: its anchor loss of {loss:.4f} stands out (robust z-score {z:.1f});"
        " --merge.reject_outliers true leaves it out"
        for adapter, loss, z in filter(lambda one: one.stands_out, standings(adapters, anchors))
    ]


def losses_alone(adapters: Sequence[Adapter], anchors: AnchorProbe) -> list[float]:
    """The anchors' mean alignment loss with each adapter alone."""
    return [anchors.recall(LOSS, adapter.sha256, partial(anchors.loss, adapter.layers)) for adapter in adapters]


def check_rejection(clients: int) -> None:
    """Raises InputError when outliers are to be left out of so few clients that none can be called one."""
    if clients < LEAST_VALUES:
        raise InputError(
            f"merge.reject_outliers needs at least {LEAST_VALUES} clients in a merge, here are {clients}; add"
            " clients or leave it out"
        )
