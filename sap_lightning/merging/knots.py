"""KnOTS: TIES in a basis that the clients share (Stoica et al., ICLR 2025, arXiv:2410.19735).

Reference code: gstoica27/KnOTS, task_merger.py and masking_ops.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sap_lightning.console import track
from sap_lightning.errors import check_share
from sap_lightning.functional.consensus import Consensus, ElectedMean, Majority
from sap_lightning.functional.lora import LoRALayer, Update, in_factors, left_singular_vectors
from sap_lightning.functional.spaces import Parameters, Space, magnitudes
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.clients import Source, client_layers
from sap_lightning.merging.pruning import Pruning, PruningMethod
from sap_lightning.models.probe import AnchorProbe, Answer

_LEAST_SINGULAR_VALUE = 1e-5


@dataclass(frozen=True)
class KnOTS(PruningMethod):
    """λ·U·TIES(Uᵀ·ΔW_1, …, Uᵀ·ΔW_K) with U the left singular vectors of [ΔW_1 … ΔW_K], layer by layer.

    TIES trims with one threshold over all layers of a client. It differs from the reference code as ``ties`` does
    from its own, and in that ΔW has the scale α / r, which the code leaves out.

    Args:
        sparsity: ρ, the share that is trimmed; 0.8 keeps the authors' 20 %.
        scale: λ; the authors search it for each benchmark.
        majority: the sign of the larger sum (total) or of more clients (frequency).
    """

    name = "knots"
    merges_weights = False  # its bases are those of all clients' layers
    scope = "global"

    sparsity: float = 0.8
    scale: float = 1.0
    majority: Majority = "total"

    def __post_init__(self) -> None:
        check_share("merge.method.sparsity", self.sparsity)

    def prepare(
        self, adapters: Sequence[Adapter], weights: Sequence[float], anchors: AnchorProbe | None = None
    ) -> Pruning:
        layers = client_layers(adapters)
        bases = {name: shared_basis(layers[name]) for name in track(list(layers), "knots: bases")}
        return Pruning(self, adapters, weights, lambda name, layer: AlignedSpace(in_factors(layer), bases[name]))

    def scores(self, source: Source, spaces: Mapping[str, Space], answer: Answer) -> dict[str, Parameters]:
        return magnitudes(spaces)

    def factor(self, clients: int) -> float:
        return self.scale

    def new_consensus(self) -> Consensus:
        return AlignedElection(self.majority)


class AlignedSpace(Space):
    """θ: the elements of Uᵀ·ΔW, shape (k, d_in). ∂L/∂θ = UᵀG."""

    def __init__(self, layer: LoRALayer, U: Tensor) -> None:
        self.U = U
        self.parameters = (layer.scale * (U.T @ layer.B) @ layer.A,)

    def gradients(self, x: Tensor, g: Tensor) -> Parameters:
        return ((g @ self.U).T @ x,)

    def update(self, parameters: Parameters) -> LoRALayer:
        return LoRALayer(parameters[0], self.U)


class AlignedElection(Consensus):
    """TIES' sign election and mean of θ from updates U·θ."""

    U: Tensor

    def __init__(self, majority: Majority) -> None:
        self.election = ElectedMean(majority)

    def add(self, update: Update, weight: float) -> None:
        theta, self.U, scale = update
        self.election.add(scale * theta, weight)

    def result(self) -> LoRALayer:
        return LoRALayer(self.election.result(), self.U)


def shared_basis(layers: Iterable[LoRALayer]) -> Tensor:
    """U of the thin SVD of [ΔW_1 … ΔW_K], shape (d_out, k), computed in float64 without the dense ΔW.

    With A_kᵀ = Q_k·R_k, ΔW_k = (s·B_k·R_kᵀ)·Q_kᵀ has the U and σ of its first factor. Singular values up to 1e-5 are
    left out, as in the reference code, but never all.
    """
    blocks = (layer.scale * layer.B.double() @ torch.linalg.qr(layer.A.double().T, mode="r").R.T for layer in layers)
    U, sigma = left_singular_vectors(blocks)
    return U[:, : max(1, int((sigma > _LEAST_SINGULAR_VALUE).sum()))].float()
