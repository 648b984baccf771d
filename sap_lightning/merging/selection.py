"""Which clients have a part in a merge: all, or those that do not stand out on the anchors."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch

from sap_lightning.errors import InputError
from sap_lightning.functional.outliers import LEAST_VALUES, far_below
from sap_lightning.io.adapter import Adapter
from sap_lightning.models.probe import LOSS, MARGIN, AnchorProbe

log = logging.getLogger(__name__)


class Selection(NamedTuple):
    """The adapters that are merged, and the names of those that are left out."""

    adapters: Sequence[Adapter]
    rejected: list[str]


class Standing(NamedTuple):
    """How an adapter stands among the others by how far it alone tells the anchors' captions apart.

    Attributes:
        adapter: the adapter.
        margin: how much closer an image is to its own caption than to the others, on average.
        stands_out: whether that is below two thirds of the median.
    """

    adapter: Adapter
    margin: float
    stands_out: bool


def standings(adapters: Sequence[Adapter], anchors: AnchorProbe) -> list[Standing]:
    """How each adapter stands among these."""
    margins = [anchors.recall(MARGIN, one.sha256, partial(anchors.caption_margin, one.layers)) for one in adapters]
    return [Standing(*one) for one in zip(adapters, margins, far_below(torch.tensor(margins)).tolist(), strict=True)]


def without_outliers(adapters: Sequence[Adapter], anchors: AnchorProbe) -> Selection:
    """Leaves out adapters with which the anchors' images are much less close to their captions than with the others.

    Raises:
        InputError: when with no adapter the features are finite numbers.
    """
    every = standings(adapters, anchors)
    if not any(math.isfinite(one.margin) for one in every):
        raise InputError("no upload gives finite features on the anchors; all of them are broken, or training diverged")
    for one in every:
        if one.stands_out:
            log.warning("%s left out: %s", one.adapter.name, _in_words(one, every))
    kept = [one.adapter for one in every if not one.stands_out]
    return Selection(kept, [one.adapter.name for one in every if one.stands_out])


def doubts_on_anchors(adapters: Sequence[Adapter], anchors: AnchorProbe) -> list[str]:
    """Which adapters stand out on the anchors, in words."""
    every = standings(adapters, anchors)
    return [
        f"upload {one.adapter.name!r}: {_in_words(one, every)}; --merge.reject_outliers true leaves it out"
        for one in every
        if one.stands_out
    ]


def _in_words(one: Standing, every: Sequence[Standing]) -> str:
    typical = statistics.median(other.margin for other in every if math.isfinite(other.margin))
    return f"it stands out on the anchors, caption margin {one.margin:.3f} where {typical:.3f} is the clients' median"


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
