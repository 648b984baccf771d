"""Which singular triplets of a weight matter for a loss, and the weight without the others: GRASP's maths.

Liu et al. 2024, arXiv:2501.00339; reference code: LyoAI/GRASP, modeling_grasp.py (``dynamic_svd_selection``).
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor
from torch.nn.functional import cosine_similarity

from sap_lightning.functional.subspaces import Triplets

TripletScore = Literal["paper", "code", "gradient"]


def triplet_scores(triplets: Triplets, gradients: Triplets, score: TripletScore) -> Tensor:
    """How much each triplet Φ_k = (u_k, σ_k, v_k) matters, shape (k,), with T(θ) = |θ·∂L/∂θ| of every element.

    ``paper``: I(Φ_k) = T(σ_k) + Σ_i T(u_ik) + Σ_j T(v_kj). (With signed terms the three sums would be equal.)
    ``code``: T(σ_k) alone. ``gradient``: |∂L/∂σ_k|.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.subspaces import Triplets
        >>> from sap_lightning.functional.triplets import triplet_scores
        >>> triplets = Triplets(torch.eye(2), torch.tensor([3.0, 1.0]), torch.eye(2))
        >>> gradients = triplets.gradients(torch.tensor([[1.0, 2.0], [4.0, -5.0]]))
        >>> for score in ("paper", "code", "gradient"):
        ...     print(score, triplet_scores(triplets, gradients, score).tolist())
        paper [9.0, 15.0]
        code [3.0, 5.0]
        gradient [1.0, 5.0]
    """
    if score == "gradient":
        return gradients.sigma.abs()
    of_u, of_sigma, of_v = ((theta * gradient).abs() for theta, gradient in zip(triplets, gradients, strict=True))
    return of_sigma if score == "code" else of_sigma + of_u.sum(0) + of_v.sum(1)


def highest(scores: Tensor, count: int) -> Tensor:
    """Indices of the highest scores in ascending order; of equal ones the first are taken.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.triplets import highest
        >>> highest(torch.tensor([1.0, 3.0, 2.0, 2.0]), count=2).tolist()
        [1, 2]
    """
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def kept_by_share(shape: tuple[int, int], retain: float) -> int:
    """K = ⌈r·ℓ⌉ of a weight's ℓ = min(d_out, d_in) triplets, as the paper counts.

    Example:
        >>> from sap_lightning.functional.triplets import kept_by_share
        >>> kept_by_share((8, 30), retain=0.1)
        1
    """
    return math.ceil(round(retain * min(shape), 9))  # 0.1·30 is a little above 3


def kept_by_parameters(shape: tuple[int, int], compression: float) -> int:
    """K = ⌊d_out·d_in·(1 − c) / (d_out + d_in)⌋, as the code counts: factors of a share 1 − c of the parameters.

    Example:
        >>> from sap_lightning.functional.triplets import kept_by_parameters
        >>> kept_by_parameters((10, 10), compression=0.2)
        4
    """
    d_out, d_in = shape
    return math.floor(round(d_out * d_in * (1 - compression) / (d_out + d_in), 9))


def kept_by_energy(scores: Tensor, energy: float) -> int:
    """The least K whose highest scores add up to a share t of all, Σ_kept I(Φ_k) ≥ t·Σ I(Φ_k).

    Args:
        scores: of a weight's triplets, none below 0, shape (k,).
        energy: t.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.triplets import kept_by_energy
        >>> [kept_by_energy(torch.tensor([1.0, 5.0, 2.0]), energy) for energy in (0.0, 0.5, 0.75, 1.0)]
        [0, 1, 2, 3]
    """
    sums = scores.double().sort(descending=True).values.cumsum(0)
    return int((sums < energy * sums[-1]).sum()) + int(energy * sums[-1] > 0)


def is_smaller(shape: tuple[int, int], kept: int) -> bool:
    """Whether a weight's two factors have fewer parameters than the weight, K·(d_out + d_in) < d_out·d_in.

    Example:
        >>> from sap_lightning.functional.triplets import is_smaller
        >>> is_smaller((10, 10), 4), is_smaller((10, 10), 5)
        (True, False)
    """
    return kept * sum(shape) < math.prod(shape)


def token_cosines(inputs: Tensor, outputs: Tensor) -> Tensor:
    """cos(h_i,t, h_i+1,t) of every token t, float64: how little a block changes it.

    Args:
        inputs: of the block, shape (…, d).
        outputs: of the block, before any norm that follows, shape (…, d).

    Returns:
        Shape (tokens,).

    Example:
        >>> import torch
        >>> from sap_lightning.functional.triplets import token_cosines
        >>> token_cosines(torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]), torch.tensor([[[2.0, 0.0], [3.0, 4.0]]])).tolist()
        [1.0, 0.8]
    """
    return cosine_similarity(inputs.double(), outputs.double(), dim=-1).flatten()


def angular_distances(states: Tensor, length: int) -> Tensor:
    """arccos(cos(h_i, h_i+L)) / π of every run of L blocks: how far all of them together turn a token.

    Gromov et al. 2024, arXiv:2403.17887, equation 7, of the last token of every sequence.

    Args:
        states: what enters each block, and what leaves the last, shape (blocks + 1, n, d).
        length: L.

    Returns:
        Mean over the n tokens, in half turns and float64, of runs that start at block 0, 1, …; shape (blocks − L + 1,).

    Example:
        >>> import torch
        >>> from sap_lightning.functional.triplets import angular_distances
        >>> states = torch.tensor([[[1.0, 0.0]], [[0.0, 3.0]], [[0.0, 1.0]]])
        >>> angular_distances(states, length=1).tolist(), angular_distances(states, length=2).tolist()
        ([0.5, 0.0], [0.5])
    """
    cosines = cosine_similarity(states[:-length].double(), states[length:].double(), dim=-1)
    return cosines.clamp(-1, 1).arccos().mean(1) / math.pi
