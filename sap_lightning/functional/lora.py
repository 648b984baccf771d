"""One adapted linear layer in factor form, and exact linear algebra on it without the dense product."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class LoRALayer(NamedTuple):
    """ΔW = scale · B·A of one linear layer (LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    Attributes:
        A: down projection, shape (r, d_in).
        B: up projection, shape (d_out, r).
        scale: s, usually alpha / r.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.lora import LoRALayer
        >>> layer = LoRALayer(A=torch.tensor([[1.0, 2.0]]), B=torch.tensor([[4.0], [6.0]]), scale=0.5)
        >>> layer.rank, layer.shape
        (1, (2, 2))
        >>> layer.delta().tolist()
        [[2.0, 4.0], [3.0, 6.0]]
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


def no_change(shape: tuple[int, int]) -> LoRALayer:
    """ΔW = 0 of rank 1, as no adapter that PEFT loads has rank 0.

    Args:
        shape: (d_out, d_in).

    Example:
        >>> from sap_lightning.functional.lora import no_change
        >>> no_change((2, 3)).delta().tolist()
        [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """
    d_out, d_in = shape
    return LoRALayer(torch.zeros(1, d_in), torch.zeros(d_out, 1))


Update = LoRALayer | Tensor
"""What a merge adds to one weight: in factor form, or dense of shape (d_out, d_in)."""


def dense(update: Update) -> Tensor:
    """ΔW of shape (d_out, d_in), whatever form the update has.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.lora import LoRALayer, dense
        >>> layer = LoRALayer(A=torch.tensor([[1.0, 2.0]]), B=torch.tensor([[3.0]]))
        >>> dense(layer).tolist()
        [[3.0, 6.0]]
        >>> dense(torch.tensor([[3.0, 6.0]])).tolist()
        [[3.0, 6.0]]
    """
    return update.delta() if isinstance(update, LoRALayer) else update


def in_factors(update: Update) -> LoRALayer:
    """ΔW in factor form.

    Raises:
        ValueError: for a dense one, which has no A and B.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.lora import LoRALayer, in_factors
        >>> in_factors(LoRALayer(A=torch.ones(1, 2), B=torch.ones(3, 1))).rank
        1
    """
    if not isinstance(update, LoRALayer):
        raise ValueError("A and B are looked at apart and need updates in factor form")
    return update


def rows(update: Update, start: int, stop: int) -> Tensor:
    """The rows of ΔW from start up to stop, dense, shape (stop − start, d_in).

    Example:
        >>> import torch
        >>> from sap_lightning.functional.lora import LoRALayer, rows
        >>> rows(LoRALayer(A=torch.tensor([[1.0, 2.0]]), B=torch.tensor([[3.0], [4.0]])), 1, 2).tolist()
        [[4.0, 8.0]]
        >>> rows(torch.tensor([[3.0, 6.0], [4.0, 8.0]]), 0, 1).tolist()
        [[3.0, 6.0]]
    """
    return dense(update._replace(B=update.B[start:stop]) if isinstance(update, LoRALayer) else update[start:stop])


def scaled(update: Update, factor: float) -> Update:
    """factor · ΔW in the form it came in, in factor form or dense of shape (d_out, d_in).

    Example:
        >>> import torch
        >>> from sap_lightning.functional.lora import LoRALayer, scaled
        >>> scaled(torch.tensor([[3.0, 6.0]]), 2.0).tolist()
        [[6.0, 12.0]]
        >>> scaled(LoRALayer(A=torch.ones(1, 2), B=torch.ones(2, 1), scale=0.5), 2.0).scale
        1.0
    """
    if isinstance(update, LoRALayer):
        return update._replace(scale=update.scale * factor)
    return factor * update


def times(updates: Mapping[str, Update], factor: float) -> dict[str, Update]:
    """factor · ΔW of every layer, each in the form it came in.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.lora import times
        >>> doubled = times({"q_proj": torch.tensor([[1.0, 2.0]]), "v_proj": torch.tensor([[3.0]])}, 2.0)
        >>> {name: update.tolist() for name, update in doubled.items()}
        {'q_proj': [[2.0, 4.0]], 'v_proj': [[6.0]]}
    """
    return {name: scaled(update, factor) for name, update in updates.items()}


def inner(one: LoRALayer, other: LoRALayer) -> float:
    """⟨ΔW₁, ΔW₂⟩ = s₁s₂·Σ (B₁ᵀB₂ ⊙ A₁A₂ᵀ) in float64, from r₁×r₂ products instead of the dense updates.

    Args:
        one: ΔW₁ of shape (d_out, d_in) and rank r₁.
        other: ΔW₂ of the same shape and rank r₂.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.lora import LoRALayer, inner
        >>> one = LoRALayer(A=torch.tensor([[1.0, 2.0]]), B=torch.tensor([[1.0]]))
        >>> other = LoRALayer(A=torch.tensor([[3.0, 4.0]]), B=torch.tensor([[1.0]]), scale=2.0)
        >>> inner(one, other)  # 1·6 + 2·8
        22.0
    """
    products = (one.B.double().T @ other.B.double()) * (one.A.double() @ other.A.double().T)
    return one.scale * other.scale * float(products.sum())


def singular_triplets(update: Update) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of ΔW = U·diag(σ)·V; in factor form from QRs of the factors and an SVD of their small core.

    Returns:
        U (d_out, k), σ (k,) in descending order, V (k, d_in), where k = min(d_in, d_out), in factor form at most r.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.lora import singular_triplets
        >>> update = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> U, sigma, V = singular_triplets(update)
        >>> sigma.round(decimals=3).tolist()
        [3.0, 1.0]
        >>> torch.allclose((U * sigma) @ V, update)
        True
    """
    if isinstance(update, Tensor):
        return torch.linalg.svd(update, full_matrices=False)
    Qb, Rb = torch.linalg.qr(update.B)
    Qa, Ra = torch.linalg.qr(update.A.T)
    U, sigma, V = torch.linalg.svd(update.scale * Rb @ Ra.T, full_matrices=False)
    return Qb @ U, sigma, V @ Qa.T


def left_singular_vectors(blocks: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """U and σ of the thin SVD of [X_1 … X_K] in float64, from one block after another.

    More than 2d columns are folded to U·diag(σ), which has the same U and σ, so memory does not grow with K.

    Args:
        blocks: X_k, each of shape (d, n_k).

    Returns:
        U (d, n) and σ (n,) in descending order, where n = min(d, Σ n_k).

    Example:
        >>> import torch
        >>> from sap_lightning.functional.lora import left_singular_vectors
        >>> U, sigma = left_singular_vectors([torch.tensor([[0.0], [3.0]]), torch.tensor([[2.0, 0.0], [0.0, 4.0]])])
        >>> sigma.round(decimals=3).tolist()  # of [[0, 2, 0], [3, 0, 4]]
        [5.0, 2.0]
        >>> U.abs().round(decimals=3).tolist()
        [[0.0, 1.0], [1.0, 0.0]]
    """
    columns = None
    for block in blocks:
        columns = block.double() if columns is None else torch.cat([columns, block.double()], dim=1)
        if columns.shape[1] > 2 * len(columns):
            U, sigma, _ = torch.linalg.svd(columns, full_matrices=False)
            columns = U * sigma
    if columns is None:
        raise ValueError("there is no block")
    U, sigma, _ = torch.linalg.svd(columns, full_matrices=False)
    return U, sigma


def stack(layers: Sequence[LoRALayer], weights: Sequence[float]) -> LoRALayer:
    """The exact weighted sum Σ w_k·ΔW_k as one layer of rank Σ r_k.

    A = [A_1; ...; A_K] one below the other, B = [w_1·s_1·B_1, ..., w_K·s_K·B_K] side by side. Stacking keeps the ΔW_k
    apart; averaging A and B apart would add cross terms B_j·A_k.

    Args:
        layers: the K updates, all of shape (d_out, d_in).
        weights: the K weights w_k.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.lora import LoRALayer, stack
        >>> one = LoRALayer(A=torch.tensor([[1.0, 2.0]]), B=torch.tensor([[1.0], [0.0]]))
        >>> other = LoRALayer(A=torch.tensor([[3.0, 4.0]]), B=torch.tensor([[0.0], [1.0]]))
        >>> both = stack([one, other], [1.0, 10.0])
        >>> both.rank
        2
        >>> both.delta().tolist()
        [[1.0, 2.0], [30.0, 40.0]]
    """
    A = torch.cat([layer.A for layer in layers])
    B = torch.cat([w * layer.scale * layer.B for layer, w in zip(layers, weights, strict=True)], dim=1)
    return LoRALayer(A, B)
