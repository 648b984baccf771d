"""The plain average of the updates (model soups, Wortsman et al. 2022, arXiv:2203.05482)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sap_lightning.functional.consensus import weighted_sum
from sap_lightning.functional.lora import Update
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.clients import client_layers
from sap_lightning.merging.method import LayerwiseMethod, PreparedLayers


@dataclass(frozen=True)
class Average(LayerwiseMethod):
    """Σ w_k·ΔW_k: exact, of the products ΔW and not of A and B apart."""

    name = "average"
    by_element = True
    takes_any_weights = True
    merges_prompts = True

    def merge_layer(self, layers: Sequence[Update], weights: Sequence[float]) -> Update:
        return weighted_sum(layers, weights)


def averaged(
    adapters: Sequence[Adapter], weights: Sequence[float], findings: Mapping[str, Any], title: str
) -> PreparedLayers:
    """The average of adapters that a method has chosen or weighted, and what it found."""
    layers = client_layers(adapters)
    return PreparedLayers(list(layers), lambda name: weighted_sum(layers[name], weights), findings, title)
