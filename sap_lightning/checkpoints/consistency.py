"""How much of the other models ATAF mixes in: as much as keeps predictions nearest to all models' own."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sap_lightning.checkpoints.examples import Examples
from sap_lightning.checkpoints.fuser import Fuser
from sap_lightning.checkpoints.keys import names_in
from sap_lightning.checkpoints.sources import Sources
from sap_lightning.console import track
from sap_lightning.functional.agreement import divergence
from sap_lightning.functional.lora import dense
from sap_lightning.merging import ATAF

log = logging.getLogger(__name__)


def divergences(method: ATAF, shares: Sequence[float], sources: Sources, examples: Examples) -> dict[float, float]:
    """Mean Jensen-Shannon divergence of predictions from each model's own, by α.

    It is the mean over all positions of the examples and over the models. The weights of one model, what the others
    would change of them, and all predictions are in memory together.

    Raises:
        InputError: when a model is not of the kind that the examples are for, or transformers makes weights of others.
    """
    own = [examples.predictions(examples.load(model.folder)) for model in sources.models]
    model, towards = examples.load(sources.first.folder), _towards(ATAF(side=method.side, alpha=1.0), shares, sources)
    weights, names = model.state_dict(), names_in(model, sources.first, list(towards))
    start = {key: weights[name].clone() for key, name in names.items()}
    found = {}
    for alpha in track(method.grid, f"{method.name}: alphas"):
        for key, name in names.items():
            weights[name].copy_(start[key] + alpha * towards[key].view(start[key].shape))
        fused = examples.predictions(model)
        found[alpha] = sum(_mean_divergence(fused, one) for one in own) / len(own)
        log.info("%s: alpha %g diverges from the models by %.3e", method.name, alpha, found[alpha])
    return found


def most_consistent(found: Mapping[float, float]) -> float:
    """The α of the least divergence; of equal ones the smallest."""
    return min(found, key=lambda alpha: (found[alpha], alpha))


def _towards(method: ATAF, shares: Sequence[float], sources: Sources) -> dict[str, Tensor]:
    """What leads each weight from the first model's, at α = 0, to the others', at α = 1."""
    fuser = Fuser(method, shares, sources)
    keys = [key for key in sources.first.stated if key not in fuser.kept]
    found = {}
    for key in track(keys, f"{method.name}: weights"):
        (part,) = fuser.parts(key)
        found[key] = dense(method.merge_weight(key, part.changes, shares)) - part.changes[0].layers[key]
    return found


def _mean_divergence(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Mean over all positions; tokens that one model alone has are none of the other's predictions."""
    total = positions = 0.0
    for p, q in zip(some, others, strict=True):
        size = max(p.shape[1], q.shape[1])
        padded = (torch.nn.functional.pad(one, (0, size - one.shape[1])) for one in (p, q))
        total += float(divergence(*padded).sum())
        positions += len(p)
    return total / positions
