"""Sens-Merging: sensitivity-guided parameter balancing (Liu et al., Findings of ACL 2025, arXiv:2502.12420).

The authors' code was not published when we looked; formulas as in ZeroNLP/RCP-Merging,
baselines/sensmerge/sens_merging.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sap_lightning.console import track
from sap_lightning.errors import check_positive
from sap_lightning.functional.consensus import weighted_sum
from sap_lightning.functional.lora import LoRALayer
from sap_lightning.functional.spaces import DeltaSpace
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.clients import client_layers
from sap_lightning.merging.method import MergeMethod, Prepared, PreparedLayers, required
from sap_lightning.models.probe import AnchorProbe


@dataclass(frozen=True)
class SensMerging(MergeMethod):
    """λ·Σ_k K·σ_kˡ·ΔW_kˡ: task arithmetic whose coefficients differ by client and layer.

    σ_kˡ is the softmax over clients of α_kˡ·τ_k / temperature. α_kˡ = s_kˡ / ‖s_k‖₂ is how sensitive client k's task
    is to layer l, with s_kˡ = Σ |θ ⊙ g| over the elements of the layer's weight θ = W + ΔW_k, averaged over
    calibration data. τ_k, of sum 1 over clients, is Σ_j of the mean distance ‖logits_k − logits_j‖₂ on the
    calibration data of task j.

    Where we deviate: the server has no client's data, so the anchors stand in for every task's calibration data: g is
    the gradient of their alignment loss, and logits are those of their images for all their captions. A layer is one
    linear layer, where RCP-Merging takes a transformer block's worth of parameters. The σ take the place of the
    clients' weights, which are not used.

    Args:
        scale: λ, above 0; with clients that count alike, task arithmetic's.
        temperature: of the softmax, above 0.
    """

    name = "sens_merging"
    uses_weights = False
    needs_anchors = True

    scale: float = 0.4
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_positive("merge.method.scale", self.scale)
        check_positive("merge.method.temperature", self.temperature)

    def prepare(
        self, adapters: Sequence[Adapter], weights: Sequence[float], anchors: AnchorProbe | None = None
    ) -> Prepared:
        probe = required(anchors, self)
        layers = client_layers(adapters)
        sensitivity, logits = [], []
        for client in track(range(len(adapters)), f"{self.name}: clients"):
            update = {name: clients[client] for name, clients in layers.items()}
            sensitivity.append(layer_sensitivity(update, probe))
            logits.append(probe.logits(update))
        sigma = coefficients(torch.stack(sensitivity), torch.stack(logits), self.temperature)
        factors = dict(zip(layers, (self.scale * len(sigma) * sigma).T.tolist(), strict=True))
        findings = {"sigma": dict(zip(layers, sigma.T.tolist(), strict=True))}
        return PreparedLayers(list(layers), lambda name: weighted_sum(layers[name], factors[name]), findings, self.name)


def layer_sensitivity(update: Mapping[str, LoRALayer], probe: AnchorProbe) -> Tensor:
    """s of one client, shape (layers,), float64: mean over anchors of Σ |(W + ΔW) ⊙ g|."""
    spaces = {name: DeltaSpace(layer.to(probe.device)) for name, layer in update.items()}
    gradients = probe.gradients(update, spaces, "abs_then_mean").of
    # The tower wears the update by now.
    sums = [(probe.weight(name) * gradient.cpu()).abs().sum() for name, (gradient,) in gradients.items()]
    return torch.stack(sums).double()


def coefficients(sensitivity: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """σ, shape (K, layers), of sum 1 over clients.

    Clients that give the same logits count alike, and so do clients whose sensitivity is zero.

    Args:
        sensitivity: s, shape (K, layers).
        logits: shape (K, images, captions).
        temperature: of the softmax.
    """
    alpha = _over(sensitivity.double(), sensitivity.double().norm(dim=1, keepdim=True))
    by_image = logits.double().transpose(0, 1)
    # Exact where logits are equal, which the quicker way by matrix products is not.
    distances = torch.cdist(by_image, by_image, compute_mode="donot_use_mm_for_euclid_dist").mean(0).sum(1)
    tau = _over(distances, distances.sum())
    return torch.softmax(alpha * tau[:, None] / temperature, dim=0)


def _over(values: Tensor, size: Tensor) -> Tensor:
    return torch.where(size > 0, values / size, 0)
