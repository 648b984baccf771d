"""Updates rotated and scaled to be nearest to another one: orthogonal Procrustes (Schönemann 1966), least squares."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sap_lightning.functional.lora import LoRALayer, Update

Side = Literal["input", "output"]


def aligned(update: Update, reference: Update, side: Side = "input") -> Update:
    """ΔW·P·Λ (``input``) or D·R·ΔW (``output``), nearest to the reference.

    P is the rotation UVᵀ from ΔWᵀ·ΔW_ref = UΣVᵀ on the directions where Σ is not zero, and Λ the diagonal that scales
    each column by least squares; R and D are the same of the rows. Where the two have nothing in common the rotation is
    not determined, and ΔW is left out there.

    Args:
        update: ΔW in factor form, or dense of shape (d_out, d_in).
        reference: ΔW_ref in the same form.
        side: what is rotated and scaled: inputs or outputs.

    Returns:
        In factor form or dense, as they are.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.procrustes import aligned
        >>> reference = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> turned = torch.tensor([[0.0, 1.0], [-2.0, 0.0]])  # its inputs by a quarter
        >>> aligned(turned, reference).round(decimals=3).tolist()
        [[1.0, 0.0], [0.0, 2.0]]
    """
    if isinstance(update, LoRALayer) and isinstance(reference, LoRALayer):
        if side == "output":
            return _aligned_outputs(update, reference)
        return _transposed(_aligned_outputs(_transposed(update), _transposed(reference)))
    assert isinstance(update, Tensor) and isinstance(reference, Tensor)
    if side == "output":
        return _aligned_rows(update, reference)
    return _aligned_rows(update.T, reference.T).T


def _transposed(layer: LoRALayer) -> LoRALayer:
    return LoRALayer(layer.B.T, layer.A.T, layer.scale)


def _aligned_outputs(layer: LoRALayer, reference: LoRALayer) -> LoRALayer:
    """D·R·ΔW in factor form, from an SVD as large as the ranks."""
    A, B = layer.A.double(), layer.scale * layer.B.double()
    A_ref, B_ref = reference.A.double(), reference.scale * reference.B.double()
    Q, R = torch.linalg.qr(B)
    Q_ref, R_ref = torch.linalg.qr(B_ref)
    U, V = _common_directions(R_ref @ (A_ref @ A.T) @ R.T)
    rotated = Q_ref @ U @ (V @ Q.T @ B)
    along = (rotated @ (A @ A_ref.T) * B_ref).sum(1)
    size = (rotated @ (A @ A.T) * rotated).sum(1)
    return LoRALayer(layer.A, (_scales(along, size)[:, None] * rotated).float())


def _aligned_rows(delta: Tensor, reference: Tensor) -> Tensor:
    """D·R·ΔW of matrices (d, n), from an SVD as large as the lesser of d and n: ΔW's columns span no more."""
    delta, reference = delta.double(), reference.double()
    _, R = torch.linalg.qr(delta)
    Q_ref, R_ref = torch.linalg.qr(reference)
    U, V = _common_directions(R_ref @ R.T)
    rotated = Q_ref @ U @ (V @ R)
    scales = _scales((rotated * reference).sum(1), rotated.square().sum(1))
    return (scales[:, None] * rotated).float()


def _common_directions(core: Tensor) -> tuple[Tensor, Tensor]:
    """U and V of the singular triplets that are not zero."""
    U, sigma, V = torch.linalg.svd(core, full_matrices=False)
    common = sigma > len(sigma) * torch.finfo(sigma.dtype).eps * sigma.norm()
    return U[:, common], V[common]


def _scales(along: Tensor, size: Tensor) -> Tensor:
    return torch.where(size > 0, along / size, 0)
