"""An update of fewer ranks: its largest singular triplets, from products with it instead of a decomposition of it."""

from __future__ import annotations

import torch
from torch import Tensor

from sap_lightning.functional.lora import LoRALayer, Update, singular_triplets

OVERSAMPLED = 8
"""Columns of a Krylov block beside those that are wanted: σ that lie close together come out sooner."""
NOISE = 5e-4
"""How large the rounding errors of Grams may be beside what the largest triplets leave."""


def recompress(update: Update, rank: int) -> LoRALayer:
    """The best approximation of ΔW of at most this rank (Eckart–Young), singular values shared by A and B.

    With ΔW = U·diag(σ)·V cut to its `largest_triplets`, A = √σ·V and B = U·√σ. The Frobenius error is within a
    hundred-thousandth of the least, or what rounding leaves.

    Args:
        update: ΔW in factor form, or dense of shape (d_out, d_in).
        rank: of the result, less where ΔW has fewer triplets.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.recompression import recompress
        >>> update = torch.tensor([[2.0, 1.0], [1.0, 2.0]])  # singular values 3 and 1
        >>> recompress(update, rank=1).delta().round(decimals=3).tolist()
        [[1.5, 1.5], [1.5, 1.5]]
    """
    U, sigma, V = largest_triplets(update, rank)
    root = sigma.sqrt()
    return LoRALayer(root[:, None] * V, U * root)


def largest_triplets(update: Update, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The singular triplets of ΔW with the largest σ, from products with it where they are few.

    They leave of ΔW a Frobenius norm within a hundred-thousandth of the least (Eckart–Young), but for rounding.
    Of a ΔW in factor form they come from the Grams of A and B where these are exact enough, else from all its triplets.

    Args:
        update: ΔW in factor form, or dense of shape (d_out, d_in).
        count: how many, at least one; less if ΔW has fewer.

    Returns:
        U (d_out, count), σ (count,) in descending order, V (count, d_in).

    Example:
        >>> import torch
        >>> from sap_lightning.functional.recompression import largest_triplets
        >>> U, sigma, V = largest_triplets(torch.diag(torch.arange(100.0)), count=2)
        >>> sigma.tolist(), V.abs().argmax(dim=1).tolist()
        ([99.0, 98.0], [99, 98])
    """
    if isinstance(update, Tensor):
        return _of_products(update, count)
    if count < update.rank <= min(update.shape) and (found := _of_grams(update, count)):
        return found
    U, sigma, V = singular_triplets(update)
    return U[:, :count], sigma[:count], V[:count]


def _of_grams(layer: LoRALayer, count: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """The largest triplets of ΔW = s·B·A by way of the r × r Grams of its factors; none where rounding might cost them.

    With BᵀB = LLᵀ, ΔW/s and M = LᵀA have the same right singular vectors, and with M·Mᵀ = YΛYᵀ those are Mᵀ·Y up to
    their lengths. A Rayleigh–Ritz step on ΔW itself gives the triplets, so the error of M·Mᵀ, ε·‖AAᵀ‖·‖BᵀB‖, counts
    in second order: beside what any triplets leave, up to six times its square was lost of Σσ² where it was measured.
    """
    A, B, scale = layer
    gram_of_A, gram_of_B = A @ A.T, B.T @ B
    noise = torch.finfo(A.dtype).eps * torch.linalg.matrix_norm(gram_of_B)
    gram_of_B.diagonal().add_(noise)  # B may be of less than full rank
    L, failed = torch.linalg.cholesky_ex(gram_of_B)
    if failed:
        return None
    energies, Y = torch.linalg.eigh(L.T @ gram_of_A @ L)
    left = energies[:-count].sum()
    if not noise * torch.linalg.matrix_norm(gram_of_A) < NOISE * left:
        return None
    basis, _ = torch.linalg.qr(A.T @ (L @ Y[:, -count:]))
    U, sigma, V = torch.linalg.svd(scale * (B @ (A @ basis)), full_matrices=False)
    return U, sigma, V @ basis.T


def _of_products(update: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest triplets of a dense ΔW.

    Block Krylov iteration (Musco & Musco, NeurIPS 2015, arXiv:1504.05477) from a fixed start, until a further block
    adds less than a ten-thousandth to the sum of their σ²; an SVD where half of ΔW's columns would not be enough.
    """
    d_out, d_in = update.shape
    if d_out < d_in:
        U, sigma, V = _of_products(update.T, count)
        return V.T, sigma, U.T
    basis, images, energy = update.new_empty(d_in, 0), update.new_empty(d_out, 0), 0.0
    block = torch.randn(d_in, count + OVERSAMPLED, generator=torch.Generator().manual_seed(0)).to(update)
    while basis.shape[1] + block.shape[1] <= d_in // 2:
        for _ in range(2):  # what is left of a block may be rounding errors, which need not be orthogonal to the basis
            block, _ = torch.linalg.qr(block - basis @ (basis.T @ block))
        image = update @ block
        basis, images = torch.cat([basis, block], dim=1), torch.cat([images, image], dim=1)
        before, energy = energy, float(torch.linalg.eigvalsh((images.T @ images).double())[-count:].sum())
        if images.shape[1] > block.shape[1] and energy - before <= 1e-4 * energy:
            U, sigma, V = torch.linalg.svd(images, full_matrices=False)
            return U[:, :count], sigma[:count], V[:count] @ basis.T
        block = update.T @ image
    U, sigma, V = torch.linalg.svd(update, full_matrices=False)
    return U[:, :count], sigma[:count], V[:count]
