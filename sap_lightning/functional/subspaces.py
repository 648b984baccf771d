"""Singular subspaces of the clients' updates: found from the factors, made orthogonal, joined; all in float64.

A LoRA update has at most r singular triplets, and the updates of K clients lie in a joint space of at most Σ r_k
dimensions on either side. What the papers do to dense matrices of full rank is done here on those triplets alone:
what lies beyond them has σ = 0, and its directions are whatever an SVD happens to return.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sap_lightning.functional.lora import LoRALayer, Update, dense, no_change, scaled, singular_triplets, stack
from sap_lightning.functional.rescaling import norm

NOISE = 1e-6
"""Singular values below this share of what they came from are rounding errors of float32."""


class Triplets(NamedTuple):
    """Some singular triplets, or what stands in their place: Σ σ_j·u_j·v_jᵀ.

    Attributes:
        U: shape (d_out, n).
        sigma: shape (n,).
        V: shape (n, d_in).
    """

    U: Tensor
    sigma: Tensor
    V: Tensor

    def layer(self) -> LoRALayer:
        """U·diag(σ)·V in factor form, float32; `no_change` without any triplet.

        Example:
            >>> import torch
            >>> from sap_lightning.functional.subspaces import Triplets
            >>> Triplets(torch.tensor([[1.0], [0.0]]), torch.tensor([3.0]), torch.tensor([[0.0, 1.0]])).layer().delta()
            tensor([[0., 3.],
                    [0., 0.]])
            >>> Triplets(torch.zeros(2, 0), torch.zeros(0), torch.zeros(0, 2)).layer().rank
            1
        """
        if not len(self.sigma):
            return no_change((self.U.shape[0], self.V.shape[1]))
        return LoRALayer(self.V.float(), (self.U * self.sigma).float())

    @classmethod
    def of(cls, weight: Tensor) -> Triplets:
        """Those of a weight, in float64, so that σ that nearly tie have one order.

        Example:
            >>> import torch
            >>> from sap_lightning.functional.subspaces import Triplets
            >>> Triplets.of(torch.tensor([[2.0, 1.0], [1.0, 2.0]])).sigma.round(decimals=3).tolist()
            [3.0, 1.0]
        """
        return cls(*singular_triplets(weight.double()))

    def gradients(self, G: Tensor) -> Triplets:
        """∂L/∂U = G·Vᵀ·diag(σ), ∂L/∂σ_k = u_kᵀ·G·v_k and ∂L/∂V = diag(σ)·Uᵀ·G, from G = ∂L/∂W.

        Example:
            >>> import torch
            >>> from sap_lightning.functional.subspaces import Triplets
            >>> triplets = Triplets(torch.eye(2), torch.tensor([3.0, 1.0]), torch.eye(2))
            >>> triplets.gradients(torch.tensor([[1.0, 2.0], [4.0, 5.0]])).sigma.tolist()
            [1.0, 5.0]
        """
        G = G.to(self.U.dtype)
        of_u, of_v = G @ self.V.T, self.U.T @ G
        return Triplets(of_u * self.sigma, (self.U * of_u).sum(0), self.sigma[:, None] * of_v)

    def factors(self, kept: Tensor) -> LoRALayer:
        """The weight of these triplets alone, σ shared by both factors: A = √σ·V (K, d_in) and B = U·√σ (d_out, K).

        Args:
            kept: indices of the triplets, shape (K,).

        Example:
            >>> import torch
            >>> from sap_lightning.functional.subspaces import Triplets
            >>> triplets = Triplets(torch.eye(2), torch.tensor([4.0, 1.0]), torch.eye(2))
            >>> triplets.factors(torch.tensor([0])).delta().tolist()
            [[4.0, 0.0], [0.0, 0.0]]
        """
        root = self.sigma[kept].sqrt()
        return LoRALayer(root[:, None] * self.V[kept], self.U[:, kept] * root)


def summands(layers: Sequence[Update], weights: Sequence[float]) -> list[Update]:
    """K·w_k·ΔW_k of each of the K clients, float64: their sum is the plain one where all count alike.

    Args:
        layers: the K updates ΔW_k, in factor form or dense of shape (d_out, d_in).
        weights: each client's share of the whole, w_k.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.lora import LoRALayer
        >>> from sap_lightning.functional.subspaces import summands
        >>> layer = LoRALayer(A=torch.ones(1, 2), B=torch.ones(1, 1))
        >>> [term.delta().tolist() for term in summands([layer, layer], [0.25, 0.75])]
        [[[0.5, 0.5]], [[1.5, 1.5]]]
    """
    return [scaled(precise(layer), len(layers) * weight) for layer, weight in zip(layers, weights, strict=True)]


def precise(update: Update) -> Update:
    """The same ΔW in float64, in factor form or dense of shape (d_out, d_in).

    Example:
        >>> import torch
        >>> from sap_lightning.functional.subspaces import precise
        >>> precise(torch.ones(1, 2)).dtype
        torch.float64
    """
    if isinstance(update, LoRALayer):
        return update._replace(A=update.A.double(), B=update.B.double())
    return update.double()


def rank_of(update: Update) -> int:
    """The most singular triplets that ΔW may have, in factor form or dense of shape (d_out, d_in).

    Example:
        >>> import torch
        >>> from sap_lightning.functional.subspaces import rank_of
        >>> rank_of(torch.ones(4, 3))
        3
    """
    return update.rank if isinstance(update, LoRALayer) else min(update.shape)


def sum_of(parts: Sequence[Update]) -> Update:
    """Σ ΔW_k, stacked in factor form, or dense of shape (d_out, d_in) where one of them is.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.subspaces import sum_of
        >>> sum_of([torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])]).tolist()
        [[4.0, 6.0]]
    """
    factors = [part for part in parts if isinstance(part, LoRALayer)]
    if len(factors) == len(parts):
        return stack(factors, [1.0] * len(factors))
    return torch.stack([dense(part) for part in parts]).sum(0)


def leading_triplets(update: Update, rank: int | None = None, size: float | None = None) -> Triplets:
    """The singular triplets of ΔW with the largest σ, without those that are rounding errors.

    Args:
        update: ΔW in factor form, or dense of shape (d_out, d_in).
        rank: the most triplets there may be.
        size: of what ΔW was made from, where that is larger than ΔW: clients may cancel out. ‖ΔW‖ if not given.

    Returns:
        U (d_out, n), σ (n,) in descending order, V (n, d_in), all float64; n = 0 for ΔW = 0.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.lora import LoRALayer
        >>> from sap_lightning.functional.subspaces import leading_triplets
        >>> update = LoRALayer(A=torch.tensor([[2.0, 1.0], [1.0, 2.0], [0.0, 0.0]]), B=torch.eye(3)[:2])
        >>> leading_triplets(update).sigma.round(decimals=3).tolist()
        [3.0, 1.0]
        >>> leading_triplets(update, rank=1).sigma.round(decimals=3).tolist()
        [3.0]
        >>> leading_triplets(update, size=1e7).sigma.tolist()
        []
    """
    doubled = precise(update)
    U, sigma, V = singular_triplets(doubled)
    kept = int((sigma > NOISE * (norm(doubled, 2) if size is None else size)).sum())
    if rank is not None:
        kept = min(kept, rank)
    return Triplets(U[:, :kept], sigma[:kept], V[:kept])


def outside(U: Tensor, update: Update) -> Update:
    """(I − U·Uᵀ)·ΔW: what an update does outside a space of outputs.

    Args:
        U: orthonormal columns, shape (d_out, n).
        update: ΔW in factor form, or dense of shape (d_out, d_in).

    Example:
        >>> import torch
        >>> from sap_lightning.functional.lora import LoRALayer
        >>> from sap_lightning.functional.subspaces import outside
        >>> update = LoRALayer(A=torch.tensor([[2.0, 1.0]]), B=torch.ones(2, 1))
        >>> outside(torch.tensor([[1.0], [0.0]]), update).delta().tolist()
        [[0.0, 0.0], [2.0, 1.0]]
    """
    if isinstance(update, LoRALayer):
        return update._replace(B=update.B - U @ (U.T @ update.B))
    return update - U @ (U.T @ update)


def polar_factor(X: Tensor) -> Tensor:
    """X·(XᵀX)^(−1/2): of all matrices with orthonormal columns the nearest to X (orthogonal Procrustes, whitening).

    Where the columns depend on each other it is the partial isometry P·Qᵀ of the SVD X = P·diag(s)·Qᵀ without the
    s that are 0, so that columns that are the same stay the same; which orthonormal columns to add would be arbitrary.

    Args:
        X: shape (d, n).

    Returns:
        Shape (d, n).

    Example:
        >>> import torch
        >>> from sap_lightning.functional.subspaces import polar_factor
        >>> polar_factor(torch.tensor([[2.0, 0.0], [0.0, 3.0]])).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
        >>> twice = polar_factor(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))  # 1 / √2
        >>> twice.round(decimals=3).tolist()
        [[0.7070000171661377, 0.7070000171661377], [0.0, 0.0]]
    """
    P, s, Q = torch.linalg.svd(X, full_matrices=False)
    kept = s > NOISE * s[:1]
    return P[:, kept] @ Q[kept]


def orthogonalised(parts: Sequence[Triplets]) -> Triplets:
    """The triplets of all clients side by side, U and V each replaced by their polar factor.

    Task Singular Vectors, Gargiulo et al. 2025, arXiv:2412.00081.

    Args:
        parts: of every client, U_k (d_out, n_k), σ_k (n_k,), V_k (n_k, d_in).

    Returns:
        U (d_out, Σ n_k) and Vᵀ (d_in, Σ n_k), each with orthonormal columns as far as that goes, and all σ.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.subspaces import Triplets, orthogonalised
        >>> one = Triplets(torch.tensor([[1.0], [0.0]]), torch.tensor([3.0]), torch.tensor([[1.0, 0.0]]))
        >>> other = Triplets(torch.tensor([[0.6], [0.8]]), torch.tensor([2.0]), torch.tensor([[0.0, 1.0]]))
        >>> U, sigma, V = orthogonalised([one, other])
        >>> torch.allclose(U.T @ U, torch.eye(2), atol=1e-6), sigma.tolist(), V.tolist()
        (True, [3.0, 2.0], [[1.0, 0.0], [0.0, 1.0]])
    """
    U = torch.cat([part.U for part in parts], dim=1)
    V = torch.cat([part.V for part in parts])
    return Triplets(polar_factor(U), torch.cat([part.sigma for part in parts]), polar_factor(V.T).T)


class JointSpace(NamedTuple):
    """Orthonormal bases of the rows and columns of all clients' updates, in which ΔW_k = U·C_k·V loses nothing.

    Attributes:
        U: shape (d_out, p), p at most Σ r_k.
        cores: C_1 … C_K, shape (K, p, q).
        V: shape (q, d_in), q at most Σ r_k.
    """

    U: Tensor
    cores: Tensor
    V: Tensor


def joint_space(layers: Sequence[LoRALayer]) -> JointSpace:
    """The clients' updates as small matrices C_k: the core space of Panariello et al. 2025, arXiv:2509.17786.

    What commutes with rotations, an SVD, a sum or a norm, is the same done to the C_k.

    Args:
        layers: the K updates ΔW_k of shape (d_out, d_in).

    Example:
        >>> import torch
        >>> from sap_lightning.functional.lora import LoRALayer
        >>> from sap_lightning.functional.subspaces import joint_space
        >>> layers = [LoRALayer(A=torch.rand(2, 9), B=torch.rand(8, 2), scale=s) for s in (1.0, 0.5, 2.0)]
        >>> U, cores, V = joint_space(layers)
        >>> U.shape, cores.shape, V.shape
        (torch.Size([8, 6]), torch.Size([3, 6, 6]), torch.Size([6, 9]))
        >>> torch.allclose((U @ cores[2] @ V).float(), layers[2].delta(), atol=1e-6)
        True
    """
    U = torch.linalg.qr(torch.cat([layer.B.double() for layer in layers], dim=1)).Q
    V = torch.linalg.qr(torch.cat([layer.A.double() for layer in layers]).T).Q.T
    cores = [layer.scale * (U.T @ layer.B.double()) @ (layer.A.double() @ V.T) for layer in layers]
    return JointSpace(U, torch.stack(cores), V)
