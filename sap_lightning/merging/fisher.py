"""Fisher merging (Matena & Raffel, NeurIPS 2022, arXiv:2111.09832).

Reference code: mmatena/model_merging, model_merging/merging.py and fisher.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sap_lightning.console import track
from sap_lightning.errors import InputError
from sap_lightning.functional.lora import LoRALayer
from sap_lightning.functional.spaces import DeltaSpace
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.clients import client_layers
from sap_lightning.merging.method import MergeMethod, Prepared, PreparedLayers, required
from sap_lightning.models.probe import AnchorProbe


@dataclass(frozen=True)
class Fisher(MergeMethod):
    """Σ w_k·F_k⊙ΔW_k / Σ w_k·F_k element by element: each client speaks where its loss is sensitive.

    With θ_k = W + ΔW_k merging the θ_k is merging the ΔW_k. F_k, the diagonal of the Fisher information, is of norm 1
    over all layers together, as in the authors' code.

    Where we deviate: the authors take the expected square of log p's gradient over a client's own images and the
    model's own labels; the server has neither, so F_k is the mean over the anchors of the squared gradient of their
    alignment loss at client k's model. The authors floor the target model's F at 1e-6 as it is; anchors' gradients are
    of another size and no client is a target, so each client's F is floored at a share of its largest element. A
    client without a layer has ΔW = 0 there, and an F all the same.

    Args:
        floor: that share, above 0.
    """

    name = "fisher"
    needs_anchors = True

    floor: float = 1e-6

    def __post_init__(self) -> None:
        if not 0 < self.floor <= 1:
            raise InputError(f"merge.method.floor must lie in (0, 1], got {self.floor}")

    def prepare(
        self, adapters: Sequence[Adapter], weights: Sequence[float], anchors: AnchorProbe | None = None
    ) -> Prepared:
        probe = required(anchors, self)
        layers = client_layers(adapters)
        weighted = {name: torch.zeros(clients.shape) for name, clients in layers.items()}
        total = {name: torch.zeros(clients.shape) for name, clients in layers.items()}
        for client, weight in enumerate(track(weights, f"{self.name}: clients")):
            update = {name: clients[client] for name, clients in layers.items()}
            for name, information in normalised(squared_gradients(update, probe), self.floor).items():
                weighted[name] += weight * information * update[name].delta()
                total[name] += weight * information
        return PreparedLayers(list(layers), lambda name: weighted[name] / total[name], {}, self.name)


def squared_gradients(update: Mapping[str, LoRALayer], probe: AnchorProbe) -> dict[str, Tensor]:
    """F of one client: mean over anchors of (∂L/∂ΔW)² at its model, each of its layer's shape, on the CPU."""
    spaces = {name: DeltaSpace(layer.to(probe.device)) for name, layer in update.items()}
    return {name: squares.cpu() for name, (squares,) in probe.gradients(update, spaces, "square").of.items()}


def normalised(squares: Mapping[str, Tensor], floor: float) -> dict[str, Tensor]:
    """F by layer, over all layers of Frobenius norm 1 before it is floored at a share of its largest element.

    An F that is zero all over prefers no element, and is one that is constant.
    """
    largest = max(float(F.max()) for F in squares.values())
    if largest == 0:
        return normalised({name: torch.ones_like(F) for name, F in squares.items()}, floor)
    norm = math.hypot(*(float(torch.linalg.vector_norm(F, dtype=torch.float64)) for F in squares.values()))
    return {name: F.clamp(min=floor * largest) / norm for name, F in squares.items()}
