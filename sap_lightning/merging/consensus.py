"""Consensus Merging: only what several clients want stays in their sum (Wang et al., ICML 2024, arXiv:2405.07813).

Reference code: nik-dim/tall_masks, src/utils/tallmask_utils.py and src/eval/aggregation.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sap_lightning.errors import check_at_least
from sap_lightning.functional.consensus import weighted_sum
from sap_lightning.functional.lora import Update, dense
from sap_lightning.merging.method import LayerwiseMethod


@dataclass(frozen=True)
class Consensus(LayerwiseMethod):
    """α·m⊙T with T = Σ K·w_k·ΔW_k, where m keeps the elements that enough clients want.

    A client wants an element if |ΔW_k| > λ·|T − ΔW_k| there (its TALL mask). What one client alone wants is called
    selfish, what none wants catastrophic; both go. This is Consensus Task Arithmetic; the authors also take the sum of
    TIES for T. They search λ for each client, and α, on validation data: here λ is the middle of their grid, one for
    all, and α is that of ``task_arithmetic``.

    The mask is strict as in the code; the paper has ≥. Of fewer clients than ``wanted_by`` all must want an element,
    so that one client alone stays as it is, where the code keeps nothing. Clients that agree hide each other: of K
    equal ones nothing stays from λ·(K − 1) = 1 on.

    Args:
        threshold: λ; the more, the fewer elements a client wants.
        wanted_by: the least number of clients that want what stays; 1 removes only catastrophic elements, 0 nothing.
        scale: α.
    """

    name = "consensus"
    by_element = True

    threshold: float = 0.4
    wanted_by: int = 2
    scale: float = 0.3

    def __post_init__(self) -> None:
        check_at_least("merge.method.threshold", self.threshold, 0)
        check_at_least("merge.method.wanted_by", self.wanted_by, 0)

    def merge_layer(self, layers: Sequence[Update], weights: Sequence[float]) -> Tensor:
        total = dense(weighted_sum(layers, [len(layers) * weight for weight in weights]))
        wanting = torch.zeros_like(total)
        for layer in layers:
            wanting += tall_mask(dense(layer), total, self.threshold)
        return self.scale * total * (wanting >= min(self.wanted_by, len(layers)))


def tall_mask(delta: Tensor, total: Tensor, threshold: float) -> Tensor:
    """Where a client's update ΔW is more than λ times what the others add to it in the total."""
    return delta.abs() > threshold * (total - delta).abs()
