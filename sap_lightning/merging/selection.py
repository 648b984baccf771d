"""Which clients have a part in a merge: all, or those whose anchor loss does not stand out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch

from sap_lightning.errors import InputError
from sap_lightning.functional.outliers import LEAST_VALUES, OUTLIER, robust_z_scores
from sap_lightning.io.adapter import Adapter
from sap_lightning.models.probe import AnchorProbe

log = logging.getLogger(__name__)


class Selection(NamedTuple):
    """The adapters that are merged, and the names of those that are left out."""

    adapters: Sequence[Adapter]
    rejected: list[str]


def without_outliers(adapters: Sequence[Adapter], anchors: AnchorProbe) -> Selection:
    """Leaves out adapters whose own anchor loss has a robust z-score above 3.5 among them.

    Raises:
        InputError: when no adapter has a finite loss.
    """
    losses = torch.tensor(losses_alone(adapters, anchors))
    if not losses.isfinite().any():
        raise InputError("no upload has a finite anchor loss; all of them are broken, or training diverged")
    kept, rejected = [], []
    for adapter, loss, z in zip(adapters, losses.tolist(), robust_z_scores(losses).tolist(), strict=True):
        if z > OUTLIER:
            log.warning("%s left out: anchor loss %.4f, robust z-score %.1f", adapter.name, loss, z)
            rejected.append(adapter.name)
        else:
            kept.append(adapter)
    return Selection(kept, rejected)


def losses_alone(adapters: Sequence[Adapter], anchors: AnchorProbe) -> list[float]:
    """The anchors' mean alignment loss with each adapter alone."""
    return [anchors.recall("loss", adapter.sha256, partial(anchors.loss, adapter.layers)) for adapter in adapters]


def check_rejection(clients: int) -> None:
    """Raises InputError when outliers are to be left out of so few clients that none can be called one."""
    if clients < LEAST_VALUES:
        raise InputError(
            f"merge.reject_outliers needs at least {LEAST_VALUES} clients in a merge, here are {clients}; add"
            " clients or leave it out"
        )
