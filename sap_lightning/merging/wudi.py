"""WUDI: whoever started the interference should end it (Cheng et al., ICML 2025, arXiv:2503.08099).

Reference code: nathanielyvo/WUDI-Merging, vit/coef.py and nlp_roberta/lamassu.py; its closed form and the flow are in
WalkerWorldPeace/MLLMerging, LLaMA-Factory/swudi_aswudi.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sap_lightning.errors import check_positive
from sap_lightning.functional.lora import LoRALayer, Update
from sap_lightning.functional.subspaces import NOISE, Triplets, leading_triplets, sum_of, summands
from sap_lightning.merging.method import LayerwiseMethod


@dataclass(frozen=True)
class WUDI(LayerwiseMethod):
    """The ΔW that acts on the inputs each client learned from as that client does, as far as that goes.

    A client's rows span the inputs that it learned from, so the interference of ΔW with all clients is

        L(ΔW) = Σ K·w_k·‖(ΔW − ΔW_k)·ΔW_kᵀ‖² / ‖ΔW_k‖².

    With C = Σ K·w_k·ΔW_kᵀΔW_k / ‖ΔW_k‖² and N = Σ K·w_k·ΔW_k·ΔW_kᵀΔW_k / ‖ΔW_k‖² the gradient is 2·(ΔW·C − N). From
    the authors' start, the sum S = Σ K·w_k·ΔW_k, the flow dΔW/dt = N − ΔW·C is at time t at
    N·C⁺ + (S − N·C⁺)·exp(−t·C). It never leaves the clients' joint row space, where N·C⁺ is the only minimum; of all
    minima it is the nearest to the sum, and to the average.

    Where we deviate: the authors take 300 steps of Adam at a rate of 1e-5, which depends on the length of the updates
    and goes outside the row space; we take the flow, which does neither and is exact. Three hundred steps are far from
    the minimum, and that is for the better. LoRAs of K·r ≤ d_in can in general all be met, L = 0, whatever the weights,
    but the rows of clients that start from the same A, as ours do, hardly differ, and to tell them apart takes an
    update many times as long as their sum, which ruins the model. The code of vit/ divides by ‖ΔW_k‖, not by its
    square as the paper and the code of nlp_roberta/ do.

    Args:
        time: t, how far to go; null: to the minimum. 2 is about as far as the authors' 300 steps go: of the flow, times
            1 to 3 come nearest to them, tried on the layers of adapters of the built-in world.
    """

    name = "wudi"
    needs_matrices = True

    time: float | None = 2.0

    def __post_init__(self) -> None:
        if self.time is not None:
            check_positive("merge.method.time", self.time)

    def merge_layer(self, layers: Sequence[Update], weights: Sequence[float]) -> Update:
        parts = summands(layers, weights)
        X, Y = interference(parts, [len(layers) * weight for weight in weights])
        P, s, Q = torch.linalg.svd(X, full_matrices=False)
        kept = s > NOISE * s[:1]
        P, s, Q = P[:, kept], s[kept], Q[kept]
        # In the basis P of the joint row space the flow is an exponential for each direction.
        start = applied(sum_of(parts), P)
        done = torch.ones_like(s) if self.time is None else -torch.expm1(-self.time * s.square())
        return Triplets(start * (1 - done) + Y @ Q.T * (done / s), torch.ones_like(s), P.T).layer()


def applied(update: Update, columns: Tensor) -> Tensor:
    """ΔW·X of columns X (d_in, n), shape (d_out, n)."""
    if isinstance(update, LoRALayer):
        return update.scale * update.B @ (update.A @ columns)
    return update @ columns


def interference(parts: Sequence[Update], counts: Sequence[float]) -> tuple[Tensor, Tensor]:
    """X (d_in, n) and Y (d_out, n) with L(ΔW) = ‖ΔW·X − Y‖², so C = X·Xᵀ and N = Y·Xᵀ.

    From ΔW_k = U·diag(σ)·V come the columns √(K·w_k)·Vᵀ·diag(σ) / ‖σ‖ of X and √(K·w_k)·U·diag(σ²) / ‖σ‖ of Y.
    """
    rows, columns = [], []
    for part, count in zip(parts, counts, strict=True):
        U, sigma, V = leading_triplets(part)
        shares = sigma * (count**0.5 / sigma.norm())
        rows.append(V.T * shares)
        columns.append(U * (shares * sigma / count))
    return torch.cat(rows, dim=1), torch.cat(columns, dim=1)
