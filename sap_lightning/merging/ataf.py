"""ATAF: task vectors aligned to one of them, then mixed in as far as predictions stay consistent.

Reference code: Harris-X/DGSM, merge/ATAF (stage 2 aligns, stage 3 fuses); we found no paper under this name.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.special import entr

from sap_lightning.console import track
from sap_lightning.errors import InputError, check_at_least
from sap_lightning.functional.consensus import weighted_sum
from sap_lightning.functional.lora import LoRALayer, Update
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.clients import client_layers
from sap_lightning.merging.distances import squared_distances
from sap_lightning.merging.method import MergeMethod, Prepared, PreparedLayers, required
from sap_lightning.models.probe import AnchorProbe

log = logging.getLogger(__name__)
Side = Literal["input", "output"]


@dataclass(frozen=True)
class ATAF(MergeMethod):
    """(1 − α)·ΔW_r + α·Σ_{k≠r} w_k·ΔW_k·P_k·Λ_k, layer by layer, with the others' weights w_k of sum 1.

    P_k is the rotation of the inputs that brings ΔW_k nearest to ΔW_r (orthogonal Procrustes, Schönemann 1966), UVᵀ of
    ΔW_kᵀ·ΔW_r = UΣVᵀ, on the directions where both are. Λ_k is the diagonal that scales each column by least squares.
    On the side of the outputs it is the same of the transposed updates, D_k·R_k·ΔW_k. α is the one on an even grid over
    [0, 1] whose predictions for the anchor images, over all their captions, have the least Jensen-Shannon divergence
    from the clients' own, averaged over images and clients; no image's own caption is looked at. Of equal ones the
    smallest α.

    The code fuses two language models, the first of them the reference, at a fixed α; here the reference r is the
    client with the least summed distance to the others over all layers, and the others' aligned updates add up. Where
    ΔW_kᵀ·ΔW_r has no direction its rotation is left to chance there and nothing is here; and it bounds the squared norm
    of a column from below by 1e-8, which is more than a column of a LoRA update may have.

    Args:
        steps: number of α that are tried, 0 and 1 among them.
        side: what is rotated and scaled: inputs, as in the code, or outputs.

    Raises:
        InputError: when there are fewer than two adapters.
    """

    name = "ataf"
    needs_anchors = True

    steps: int = 11
    side: Side = "input"

    def __post_init__(self) -> None:
        check_at_least("merge.method.steps", self.steps, 2)

    def prepare(
        self, adapters: Sequence[Adapter], weights: Sequence[float], anchors: AnchorProbe | None = None
    ) -> Prepared:
        probe = required(anchors, self)
        if len(adapters) < 2:
            raise InputError("merge.method ataf aligns clients to one another; give at least 2 adapters")
        mixture = Mixture.of(adapters, weights, self.side)
        alpha = self._most_consistent(mixture, [predictions(adapter.layers, probe) for adapter in adapters], probe)
        findings = {"reference": adapters[mixture.reference].name, "alpha": alpha}
        return PreparedLayers(list(mixture.layers), lambda name: mixture.layer(name, alpha), findings, self.name)

    @property
    def least_clients(self) -> int:
        return 2

    def _most_consistent(self, mixture: Mixture, wanted: Sequence[Tensor], probe: AnchorProbe) -> float:
        grid = [step / (self.steps - 1) for step in range(self.steps)]
        clients = torch.stack(list(wanted))
        divergences = [
            float(divergence(predictions(mixture.at(alpha), probe), clients).mean())
            for alpha in track(grid, f"{self.name}: alphas")
        ]
        least = min(divergences)
        alpha = grid[divergences.index(least)]
        log.info("ataf: alpha %g has the least divergence from the clients, %.3e", alpha, least)
        return alpha


@dataclass(frozen=True)
class Mixture:
    """Clients aligned to one of them, to be mixed in.

    Attributes:
        layers: every client's, aligned, by name.
        weights: each client's share of the whole.
        reference: which client the others are aligned to.
    """

    layers: Mapping[str, Sequence[LoRALayer]]
    weights: Sequence[float]
    reference: int

    @classmethod
    def of(cls, adapters: Sequence[Adapter], weights: Sequence[float], side: Side = "input") -> Mixture:
        """Aligns to the client with the least summed distance to the others over all layers."""
        distances = squared_distances(adapters).sqrt().sum(1).tolist()
        reference = distances.index(min(distances))
        layers = {}
        for name, clients in track(list(client_layers(adapters).items()), "ataf: layers"):
            nearest = clients[reference]
            layers[name] = [nearest if k == reference else aligned(one, nearest, side) for k, one in enumerate(clients)]
        return cls(layers, weights, reference)

    def at(self, alpha: float) -> dict[str, Update]:
        """The merged update with this share of the aligned clients."""
        return {name: self.layer(name, alpha) for name in self.layers}

    def layer(self, name: str, alpha: float) -> Update:
        """One layer of it."""
        others = sum(self.weights) - self.weights[self.reference]
        shares = [alpha * weight / others for weight in self.weights]
        shares[self.reference] = 1 - alpha
        return weighted_sum(self.layers[name], shares)


def aligned(layer: LoRALayer, reference: LoRALayer, side: Side = "input") -> LoRALayer:
    """ΔW·P·Λ (``input``) or D·R·ΔW (``output``) in factor form, nearest to the reference."""
    if side == "output":
        return _aligned_outputs(layer, reference)
    return _transposed(_aligned_outputs(_transposed(layer), _transposed(reference)))


def _transposed(layer: LoRALayer) -> LoRALayer:
    return LoRALayer(layer.B.T, layer.A.T, layer.scale)


def _aligned_outputs(layer: LoRALayer, reference: LoRALayer) -> LoRALayer:
    """D·R·ΔW in factor form: ΔW rotated, then scaled row by row, to be nearest to the reference.

    R = UVᵀ from the singular triplets of ΔW_ref·ΔWᵀ that are not zero; where the two have nothing in common R is not
    determined, and ΔW is left out there.
    """
    A, B = layer.A.double(), layer.scale * layer.B.double()
    A_ref, B_ref = reference.A.double(), reference.scale * reference.B.double()
    Q, R = torch.linalg.qr(B)
    Q_ref, R_ref = torch.linalg.qr(B_ref)
    U, sigma, V = torch.linalg.svd(R_ref @ (A_ref @ A.T) @ R.T, full_matrices=False)
    common = sigma > len(sigma) * torch.finfo(sigma.dtype).eps * sigma.norm()
    rotated = Q_ref @ U[:, common] @ (V[common] @ Q.T @ B)
    along = (rotated @ (A @ A_ref.T) * B_ref).sum(1)
    size = (rotated @ (A @ A.T) * rotated).sum(1)
    scale = torch.where(size > 0, along / size, 0)
    return LoRALayer(layer.A, (scale[:, None] * rotated).float())


def predictions(update: Mapping[str, Update], probe: AnchorProbe) -> Tensor:
    """Softmax over the captions for every anchor image at base + update, shape (images, captions), float64."""
    return probe.logits(update).double().softmax(-1)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats of distributions over the last dimension."""
    return (entr((p + q) / 2) - (entr(p) + entr(q)) / 2).sum(-1)
