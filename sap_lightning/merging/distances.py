"""How far apart the clients' updates are, and whether they point the same way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sap_lightning.console import track
from sap_lightning.functional import agreement
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.clients import client_layers


def squared_distances(adapters: Sequence[Adapter]) -> Tensor:
    """‖ΔW_i − ΔW_j‖² in Frobenius norm over all layers, shape (K, K), float64; exactly symmetric, and at least 0."""
    products = inner_products(adapters)
    norms = products.diagonal()
    return (norms[:, None] + norms - 2 * products).clamp(min=0)


def mean_cosine(adapters: Sequence[Adapter]) -> float:
    """Mean cosine of ΔW_i and ΔW_j over all pairs of clients and all layers together; 0 with fewer than two clients."""
    return agreement.mean_cosine(inner_products(adapters)) if len(adapters) > 1 else 0.0


def inner_products(adapters: Sequence[Adapter]) -> Tensor:
    """⟨ΔW_i, ΔW_j⟩ over all layers, shape (K, K), float64; exactly symmetric.

    From products of the factors, with one layer's factors of all clients in memory at a time.
    """
    products = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    for clients in track(list(client_layers(adapters).values()), "distances: layers"):
        layers = list(clients)
        A = torch.cat([layer.A.double() for layer in layers])
        B = torch.cat([layer.scale * layer.B.double() for layer in layers], dim=1)
        owners = torch.tensor([i for i, layer in enumerate(layers) for _ in range(layer.rank)], dtype=torch.int64)
        start = 0
        for i, layer in enumerate(layers):
            # ⟨ΔW_i, ΔW_j⟩ = Σ (B_iᵀB_j ⊙ A_iA_jᵀ) for every j up to i at once.
            end = start + layer.rank
            inner = ((B[:, start:end].T @ B[:, :end]) * (A[start:end] @ A[:end].T)).sum(0)
            products[i].index_add_(0, owners[:end], inner)
            start = end
    return products + products.tril(-1).T
