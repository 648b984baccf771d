"""CART: centred arithmetic with rank-reduced task vectors (Choi et al. 2024, arXiv:2412.12153).

Reference code: JH-GEECS/CART, src/merging.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sap_lightning.errors import check_share
from sap_lightning.functional.lora import LoRALayer, Update, dense, in_factors
from sap_lightning.functional.subspaces import joint_space
from sap_lightning.merging.method import LayerwiseMethod


@dataclass(frozen=True)
class CART(LayerwiseMethod):
    """M + λ·Σ K·w_k·SVD_n(ΔW_k − M) with M = Σ w_k·ΔW_k: what sets a client apart from the average, cut to rank n.

    Uncut, the deviations cancel out and leave the average. Two clients that count alike deviate by ± the same, so for
    them it is the average at any rank.

    Where we deviate: n is a share of the rank of the space that all clients span together, Σ r_k at most, where the
    authors take min(d_out, d_in). 8 % of a layer of 768 are 61 triplets; three LoRAs of rank 16 deviate by 48, so
    nothing would be cut and everything cancel. Panariello et al. (2025, arXiv:2509.17786) count as we do.

    Args:
        share: of the joint rank that stays of each deviation, at least one triplet; the paper finds 8 % to do well
            everywhere, its code has 12 to 32 %.
        scale: λ; the authors search it for each benchmark (1.5 to 2 in their configs). At 1 a client's own update is
            restored in the directions that set it apart.
    """

    name = "cart"
    needs_matrices = True

    share: float = 0.08
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_share("merge.method.share", self.share)

    def merge_layer(self, layers: Sequence[Update], weights: Sequence[float]) -> Update:
        if not all(isinstance(layer, LoRALayer) for layer in layers):
            return self._merged(torch.stack([dense(layer).double() for layer in layers]), weights).float()
        U, cores, V = joint_space([in_factors(layer) for layer in layers])
        return LoRALayer(V.float(), (U @ self._merged(cores, weights)).float())

    def _merged(self, cores: Tensor, weights: Sequence[float]) -> Tensor:
        """The same of the clients as matrices of one space, shape (K, p, q), float64."""
        average = torch.tensordot(torch.tensor(weights, dtype=torch.float64), cores, dims=1)
        rank = max(1, round(self.share * min(average.shape)))
        merged = average.clone()
        for core, weight in zip(cores, weights, strict=True):
            merged += self.scale * len(cores) * weight * truncated(core - average, rank)
        return merged


def truncated(matrix: Tensor, rank: int) -> Tensor:
    """The nearest matrix of this rank, of the same shape (p, q)."""
    U, sigma, V = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * sigma[:rank]) @ V[:rank]
