"""One adapted linear layer in factor form, and exact linear algebra on it without the dense product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class LoRALayer(NamedTuple):
    """ΔW = scale · B·A of one linear layer (LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    Attributes:
        A: down projection, shape (r, d_in).
        B: up projection, shape (d_out, r).
        scale: s, usually alpha / r.
    """

    A: Tensor
    B: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Number of rows of A."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of ΔW."""
        return self.B.shape[0], self.A.shape[1]

    def delta(self) -> Tensor:
        """The dense update ΔW, shape (d_out, d_in)."""
        return (self.scale * self.B) @ self.A

    def to(self, device: torch.device | str) -> LoRALayer:
        """The same layer with its factors on a device."""
        return self._replace(A=self.A.to(device), B=self.B.to(device))


Update = LoRALayer | Tensor
"""What a merge adds to one weight: in factor form, or dense of shape (d_out, d_in)."""


def dense(update: Update) -> Tensor:
    """ΔW of shape (d_out, d_in), whatever form the update has."""
    return update.delta() if isinstance(update, LoRALayer) else update


def scaled(update: Update, factor: float) -> Update:
    """factor · ΔW in the form it came in."""
    if isinstance(update, LoRALayer):
        return update._replace(scale=update.scale * factor)
    return factor * update


def times(updates: Mapping[str, Update], factor: float) -> dict[str, Update]:
    """factor · ΔW of every layer."""
    return {name: scaled(update, factor) for name, update in updates.items()}


def inner(one: LoRALayer, other: LoRALayer) -> float:
    """⟨ΔW₁, ΔW₂⟩ = Σ (B₁ᵀB₂ ⊙ A₁A₂ᵀ)·s₁s₂ in float64, from r×r products instead of the dense updates."""
    products = (one.B.double().T @ other.B.double()) * (one.A.double() @ other.A.double().T)
    return one.scale * other.scale * float(products.sum())


def singular_triplets(update: Update) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of ΔW = U·diag(σ)·V; in factor form from QRs of the factors and an SVD of their small core.

    Returns:
        U (d_out, k), σ (k,) in descending order, V (k, d_in), where k = min(d_in, d_out), in factor form at most r.
    """
    if isinstance(update, Tensor):
        return torch.linalg.svd(update, full_matrices=False)
    Qb, Rb = torch.linalg.qr(update.B)
    Qa, Ra = torch.linalg.qr(update.A.T)
    U, sigma, V = torch.linalg.svd(update.scale * Rb @ Ra.T, full_matrices=False)
    return Qb @ U, sigma, V @ Qa.T


def stack(layers: Sequence[LoRALayer], weights: Sequence[float]) -> LoRALayer:
    """The exact weighted sum Σ w_k·ΔW_k as one layer of rank Σ r_k.

    Stacking keeps the ΔW_k apart; averaging A and B apart would add cross terms B_j·A_k.
    """
    A = torch.cat([layer.A for layer in layers])
    B = torch.cat([w * layer.scale * layer.B for layer, w in zip(layers, weights, strict=True)], dim=1)
    return LoRALayer(A, B)


def recompress(update: Update, rank: int) -> LoRALayer:
    """The best approximation of ΔW of at most this rank (Eckart–Young), singular values shared by A and B."""
    U, sigma, V = singular_triplets(update)
    root = sigma[:rank].sqrt()
    return LoRALayer(root[:, None] * V[:rank], U[:, :rank] * root)
