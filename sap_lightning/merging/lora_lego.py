"""LoRA-LEGO: ranks of all clients clustered (Zhao et al., ICLR 2025, arXiv:2409.16167).

The authors' code was not published when we looked; norms and factors as in Root88888/SMoEA, system/merging.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sap_lightning.errors import check_at_least
from sap_lightning.functional.clustering import kmeans, weighted_means
from sap_lightning.functional.consensus import balanced_factors
from sap_lightning.functional.lora import LoRALayer, Update, in_factors
from sap_lightning.merging.method import LayerwiseMethod

# A mean below this share of its members is rounding, and has no direction to scale back.
_NOISE = 1e-6


@dataclass(frozen=True)
class LoRALEGO(LayerwiseMethod):
    """√(r / k)·Σ_j b_j·a_jᵀ: a rank for each of k clusters of the clients' r_1 + … + r_K ranks, layer by layer.

    A minimal semantic unit is a row of A and the column of B that goes with it, [a; b]. All clients' units are put
    into k clusters by k-means, each of which gives one unit: the mean of its members, scaled back to the mean of their
    largest magnitudes ‖·‖_∞ (parameter reweighting, as a mean of unlike vectors is short). √(r / k) is output
    reweighting for another rank than the clients' own.

    Factors are only defined up to an invertible r × r matrix, B·A = (B·T⁻¹)·(T·A), and units with them: the same
    updates in other factors have other units, clusters and merges. Already [−a; −b], which is the same update as
    [a; b], is far from it. As the authors do we take the factors as they were trained, which for clients that started
    from the same A still tell the same thing; each client's scale goes into both by its root.

    Where we deviate: means are weighted by client; k-means starts from the units themselves and not at random
    (``functional.clustering``). A client without a layer has no unit there and so no say, where others have ΔW = 0. The
    sum of a client's own units that fall into one cluster is their mean, so the rank must not be too small.

    Args:
        rank: k; the largest client's in each layer, r, if not given.
    """

    name = "lora_lego"
    needs_factors = True

    rank: int | None = None

    def __post_init__(self) -> None:
        if self.rank is not None:
            check_at_least("merge.method.rank", self.rank, 1)

    def merge_layer(self, layers: Sequence[Update], weights: Sequence[float]) -> LoRALayer:
        clients = [in_factors(layer) for layer in layers]
        units, shares = torch.cat([units_of(layer) for layer in clients]), []
        for layer, weight in zip(clients, weights, strict=True):
            shares += [weight] * layer.rank
        largest = max(layer.rank for layer in clients)
        merged = clustered(units, torch.tensor(shares, dtype=torch.float64), self.rank or largest)
        A, B = merged.split([layers[0].shape[1], layers[0].shape[0]], dim=1)
        return LoRALayer(A, B.T, math.sqrt(largest / len(merged)))


def units_of(layer: LoRALayer) -> Tensor:
    """[a_j; b_j] for each rank j of ΔW = Σ b_j·a_jᵀ, shape (r, d_in + d_out)."""
    A, B = balanced_factors(layer)
    return torch.cat([A, B.T], dim=1)


def clustered(units: Tensor, shares: Tensor, clusters: int) -> Tensor:
    """The mean unit of every cluster at the mean of its members' largest magnitudes, shape (at most clusters, d).

    Args:
        units: shape (n, d).
        shares: each one's weight, shape (n,).
        clusters: how many.
    """
    labels = kmeans(units, shares, clusters)
    means = weighted_means(units.double(), shares, labels)
    before = weighted_means(units.abs().amax(1, keepdim=True).double(), shares, labels)
    after = means.abs().amax(1, keepdim=True)
    return torch.where(after > _NOISE * before, means * before / after, 0).to(units.dtype)
