"""RobustMerge: trim, complementary scaling, normalisation (Zeng et al., NeurIPS 2025, arXiv:2502.17159).

Reference code: AuroraZengfh/RobustMerge, llava/model/builder.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sap_lightning.errors import check_share
from sap_lightning.functional.consensus import balanced_factors, padded_sum
from sap_lightning.functional.lora import LoRALayer, Update, in_factors
from sap_lightning.functional.masking import smallest
from sap_lightning.functional.rescaling import complementary_scales
from sap_lightning.merging.method import SparseLayerwiseMethod


@dataclass(frozen=True)
class RobustMerge(SparseLayerwiseMethod):
    """B·A from A = Σ λ·trim(A_k) and B = Σ λ·s_k⊙trim(B_k) / Σ s_k, to the letter of the authors' code.

    trim keeps the largest elements of each matrix, and s_k ≥ 1 makes up by rank for what it takes from A_k. As A is a
    sum and B a mean, the update grows with the number of clients K: about λ²·K times that of ``fedavg``, so
    λ = 1 / √K keeps the size. Where the code divides by zero, at ranks of which trim leaves nothing of A_k, s_k is 0.
    The code knows no weights, scales and ranks of clients: here λ is times K·w_k, each client's scale goes into both
    its factors by its root, and lower ranks are padded with zeros that do not count in Σ s_k.

    Args:
        sparsity: ρ, the share of A_k and of B_k that is trimmed; 0.8 keeps the authors' 20 %, and of N elements
            N − ⌊ρN⌋ + 1 and all ties, as they do.
        scale: λ, on both A and B.
    """

    name = "robustmerge"
    needs_factors = True

    sparsity: float = 0.8
    scale: float = 2.0

    def __post_init__(self) -> None:
        check_share("merge.method.sparsity", self.sparsity)

    def merge_layer(self, layers: Sequence[Update], weights: Sequence[float], sparsity: float) -> LoRALayer:
        """One layer's update of clients that are trimmed to a sparsity."""
        merged_A = merged_B = sum_of_s = torch.zeros(0, 0)
        for layer, weight in zip(map(in_factors, layers), weights, strict=True):
            if layer.rank:
                factor = self.scale * len(layers) * weight
                kept = LoRALayer(trim(layer.A, sparsity), trim(layer.B, sparsity), layer.scale)
                s = complementary_scales(layer.A, kept.A)
                A, B = balanced_factors(kept)
                merged_A = padded_sum(merged_A, factor * A)
                merged_B = padded_sum(merged_B, factor * s * B)
                sum_of_s = padded_sum(sum_of_s, s[None])
        return LoRALayer(merged_A, torch.where(sum_of_s > 0, merged_B / sum_of_s, 0))


def trim(matrix: Tensor, sparsity: float) -> Tensor:
    """A matrix of N elements with zeros below its ⌊ρN⌋-th smallest magnitude."""
    magnitudes = matrix.abs()
    rank_of_threshold = int(sparsity * matrix.numel())
    if rank_of_threshold == 0:
        return matrix
    return matrix * (magnitudes >= smallest(magnitudes.flatten(), rank_of_threshold))
