"""DC-Merge: merging with directional consistency (Zhang et al., CVPR 2026, arXiv:2603.06242).

Reference code: Tobeginwith/DC-Merge, vision_lora_merge/merging_functions.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sap_lightning.errors import check_at_least, check_share
from sap_lightning.functional.lora import Update
from sap_lightning.functional.subspaces import NOISE, Triplets, leading_triplets, orthogonalised, summands
from sap_lightning.merging.method import LayerwiseMethod


@dataclass(frozen=True)
class DCMerge(LayerwiseMethod):
    """λ·U⊥·(mask ⊙ TIES(M_1, …, M_K))·V⊥ with M_k = U⊥ᵀ·ΔW_k·V⊥ᵀ in the space that covers all clients.

    1. Each client's singular values are evened out, their sum kept: strong directions do not drown weak ones.
    2. U⊥ and V⊥ are the clients' singular vectors made orthogonal as in ``tsv_m``.
    3. Of each M_k only the largest elements stay. Of every element the mean of the clients that agree with the
       sign of the sum remains, and of that the blocks on the diagonal, where a client's outputs meet its own inputs.

    A client's σ are multiplied by K times its share of the whole; where all count alike, that is by 1.

    Where we deviate: the code keeps 0.1 % of the elements of M_k, which are at least the client's r directions from its
    smallest benchmark on (K·r = 128, r = 16). Of three clients of rank 16 it would keep two elements, so we keep r
    if that is more. Where clients cancel out, the sum has no sign and the element is 0, rounding errors or not. We take
    no more directions of a client than ⌊min(d_out, d_in) / K⌋, as their code for full updates does.

    Args:
        ratio: the largest of a client's evened σ over its smallest, at most: they fall in equal steps. 1 makes all σ
            their mean, the authors' default; they find 5 better on ViT-B/32.
        share: of the elements of each M_k that stay.
        scale: λ; the authors search it for each benchmark.
    """

    name = "dc_merge"
    needs_matrices = True

    ratio: float = 1.0
    share: float = 0.001
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_at_least("merge.method.ratio", self.ratio, 1)
        check_share("merge.method.share", self.share)

    def merge_layer(self, layers: Sequence[Update], weights: Sequence[float]) -> Update:
        room = max(1, min(layers[0].shape) // len(layers))
        parts = [smoothed(leading_triplets(layer, room), self.ratio) for layer in summands(layers, weights)]
        U, sigma, V = orthogonalised(parts)
        projected = [self._trimmed((U.T @ part.U * part.sigma) @ (part.V @ V.T), len(part.sigma)) for part in parts]
        own_blocks = torch.block_diag(*[torch.ones(2 * (len(part.sigma),)) for part in parts])
        merged = self.scale * own_blocks * agreeing_mean(torch.stack(projected))
        return Triplets(U @ merged, torch.ones_like(sigma), V).layer()

    def _trimmed(self, matrix: Tensor, directions: int) -> Tensor:
        """A client's M with zeros but for the largest elements; elements of the same size stay or go together."""
        kept = max(directions, int(self.share * matrix.numel()))
        if not kept:
            return torch.zeros_like(matrix)
        least = matrix.abs().flatten().topk(kept).values[-1]
        return matrix * (matrix.abs() >= (1 - NOISE) * least)


def smoothed(triplets: Triplets, ratio: float) -> Triplets:
    """The same directions and Σ σ, with σ that fall in equal steps and by at most this ratio in all."""
    U, sigma, V = triplets
    if not len(sigma):
        return triplets
    steps = torch.linspace(min(ratio, float(sigma[0] / sigma[-1])), 1, len(sigma), dtype=sigma.dtype)
    return Triplets(U, sigma.sum() * steps / steps.sum(), V)


def agreeing_mean(stacked: Tensor) -> Tensor:
    """Of every element of (K, m, n) the mean of those that have the sign of the sum; 0 where they cancel out."""
    total = stacked.sum(0)
    elected = torch.where(total.abs() > NOISE * stacked.abs().sum(0), total.sign(), 0)
    agrees = (stacked.sign() == elected) & (stacked != 0)
    return (stacked * agrees).sum(0) / agrees.sum(0).clamp(min=1)
