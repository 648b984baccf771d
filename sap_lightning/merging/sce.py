"""SCE: select, calculate, erase; the merge of FuseChat (Wan et al. 2024, arXiv:2408.07990).

Reference code: fanqiwan/FuseAI, FuseChat/mergekit/mergekit/merge_methods/sce_merging.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sap_lightning.errors import check_share
from sap_lightning.functional.consensus import ElectedMean
from sap_lightning.functional.lora import Update, dense
from sap_lightning.functional.masking import keep_mask
from sap_lightning.functional.rescaling import norm
from sap_lightning.merging.method import SparseLayerwiseMethod


@dataclass(frozen=True)
class SCE(SparseLayerwiseMethod):
    """The mean of the ΔW that agree with the elected sign, weighted by η_k ∝ w_k·‖m⊙ΔW_k‖², layer by layer.

    Select: m keeps the elements with the largest variance among the clients, the share 1 − ρ of those that vary at
    all. Calculate: η from what is selected. Erase: an element's sign is that of Σ w_k·ΔW_k, and values of the other
    sign are left out of its mean. The reference code knows no weights w of clients.

    At ρ = 0, and where nothing varies, as with one client, all elements are selected. Shares are rounded to the nearest
    number of elements, where the reference code and mergekit round down. mergekit takes equal η where the clients' mean
    squares sum to less than 1e-6; here, as in the reference code, η are equal only where all squares are zero.

    Args:
        sparsity: ρ, the share of varying elements that is not selected; 0.9 leaves the authors' top 10 %.
        variant: mergekit: what is not selected is zero in the merge too. authors: selection decides on η alone, and
            the whole ΔW are merged, as the reference code does.
    """

    name = "sce"

    sparsity: float = 0.9
    variant: Literal["mergekit", "authors"] = "mergekit"

    def __post_init__(self) -> None:
        check_share("merge.method.sparsity", self.sparsity)

    def merge_layer(self, layers: Sequence[Update], weights: Sequence[float], sparsity: float) -> Tensor:
        """One layer's update with this share of its varying elements not selected."""
        selected = most_varying(variance(layers), sparsity)
        energies = [
            weight * norm(dense(layer) * selected, 2) ** 2 for layer, weight in zip(layers, weights, strict=True)
        ]
        election = ElectedMean()
        for layer, weight, energy in zip(layers, weights, energies if any(energies) else weights, strict=True):
            delta = dense(layer)
            election.add(delta * selected if self.variant == "mergekit" else delta, energy, vote=weight)
        return election.result()


def variance(layers: Sequence[Update]) -> Tensor:
    """The clients' population variance at every element of ΔW, shape (d_out, d_in); equal clients have exactly 0."""
    # Differences to one of the values keep the digits that squares of the values would lose.
    first = dense(layers[0])
    total, squares = torch.zeros_like(first), torch.zeros_like(first)
    for layer in layers:
        difference = dense(layer) - first
        total += difference
        squares.addcmul_(difference, difference)
    return (squares / len(layers) - (total / len(layers)).square()).clamp(min=0)


def most_varying(variances: Tensor, sparsity: float) -> Tensor:
    """True at the largest variances but the share ρ of those that are not zero; everywhere at ρ = 0 or if all are."""
    varying = int(variances.count_nonzero())
    if sparsity == 0 or varying == 0:
        return torch.ones_like(variances, dtype=torch.bool)
    selected = varying - round(sparsity * varying)
    return keep_mask(variances, 1 - selected / variances.numel())
