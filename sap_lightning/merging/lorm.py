"""LoRM: closed-form merging of low-rank factors (Salami et al., ICLR 2025, arXiv:2410.17961).

Reference code: aimagelab/fed-mammoth, _models/lorm.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sap_lightning.errors import check_at_least, check_share
from sap_lightning.functional.lora import LoRALayer
from sap_lightning.functional.rounds import brought_down
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.method import MergeMethod, Prepared, PreparedLayers, required
from sap_lightning.merging.regmean import NOISE, STEPS, Regression, Solver, regressions
from sap_lightning.models.probe import AnchorProbe


@dataclass(frozen=True)
class LoRM(MergeMethod):
    """RegMean among updates of low rank: BA that minimises Σ w_k·‖(BA − ΔW_k)·X_kᵀ‖².

    With C = Σ w_k·G_k and N = Σ w_k·ΔW_k·G_k, G_k as in RegMean, the authors' closed forms are
    B = N·Aᵀ(A·C·Aᵀ)⁺ when all clients share A, and A = (BᵀB)⁺Bᵀ·N·C⁺ when all share B.

    Where we deviate: the authors train one factor in each round and share the other. Adapters trained on their own
    share neither, so the two forms are applied in turn, from the leading right singular vectors of the average. The
    objective never rises, and nears that of the best update of this rank as power iteration does. Where
    Σ G_k is singular each form gives the solution nearest to the factor before it. The G_k are means over the anchors
    and weighted by client; the authors add up sums over the clients' own images.

    Args:
        rank: of the merged update; the largest client's in each layer if not given.
        sweeps: how often both factors are solved for.
        off_diagonal: factor in [0, 1] of the off-diagonal elements of G_k; 1 leaves them as they are.
    """

    name = "lorm"
    needs_anchors = True

    rank: int | None = None
    sweeps: int = 10
    off_diagonal: float = 1.0

    def __post_init__(self) -> None:
        check_share("merge.method.off_diagonal", self.off_diagonal)
        if self.rank is not None:
            check_at_least("merge.method.rank", self.rank, 1)
        check_at_least("merge.method.sweeps", self.sweeps, 1)

    def prepare(
        self, adapters: Sequence[Adapter], weights: Sequence[float], anchors: AnchorProbe | None = None
    ) -> Prepared:
        problems = regressions(adapters, weights, required(anchors, self), self.off_diagonal, self.name)
        return PreparedLayers(list(problems), lambda name: self._merge_layer(problems[name]), {}, self.name)

    def _merge_layer(self, problem: Regression) -> LoRALayer:
        rank = self.rank or max(layer.rank for layer in problem.clients)
        # Its rows of A are orthonormal, also where ΔW = 0 is ΔW₁ − ΔW₁.
        return alternate(brought_down(problem.average, rank), problem.product, problem.gram, self.sweeps)


def alternate(start: LoRALayer, product: Tensor, gram: Tensor, sweeps: int) -> LoRALayer:
    """Solves for B with A fixed, then for A with B fixed, this many times.

    Args:
        start: factors to begin with.
        product: N, shape (d_out, d_in), float64.
        gram: C, shape (d_in, d_in), float64.
        sweeps: how often.
    """
    A, B = start.A.double(), start.B.double()
    inputs = Solver(gram)
    for _ in range(sweeps):
        # Orthonormal rows of A make A·C·Aᵀ no worse conditioned than C.
        Q, R = torch.linalg.qr(A.T)
        A, B = Q.T, B @ R.T
        B = B + (product - B @ (A @ gram)) @ A.T @ _inverse(A @ gram @ A.T)
        # A sweep goes on where the one before has left off, so that all of them share the steps of a single system.
        A = A + inputs.solve(torch.linalg.pinv(B) @ (product - B @ (A @ gram)), math.ceil(STEPS / sweeps))
    return LoRALayer(A.float(), B.float())


def _inverse(gram: Tensor) -> Tensor:
    """Of a matrix as small as a rank, its rows brought to one size; a generalised one where directions are missing."""
    sizes = gram.diag().clamp(min=0).sqrt()
    sizes = sizes + (sizes == 0).double()
    outer = sizes.outer(sizes)
    return torch.linalg.pinv(gram / outer, rtol=NOISE, hermitian=True) / outer
