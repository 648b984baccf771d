"""FedIT: plain FedAvg of the factors (Zhang et al. 2023, arXiv:2305.05644).

Reference code: JayZhang42/FederatedGPT-Shepherd, fed_utils/model_aggregation.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sap_lightning.functional.consensus import FactorSum
from sap_lightning.functional.lora import LoRALayer, Update
from sap_lightning.merging.method import LayerwiseMethod


@dataclass(frozen=True)
class FedAvg(LayerwiseMethod):
    """(Σ w_k·B_k)·(Σ w_k·A_k): A and B averaged apart, so it has cross terms B_j·A_k that the exact average has not.

    Each client's scale s_k goes into both factors by its root, which for scales that are equal is the authors'
    s·mean(B)·mean(A). PEFT's ``linear`` puts the root of the weight there too, so it gives the same with weights w_k²
    (1 / K² for K clients that count alike). Clients of lower rank are padded with zeros, as in HetLoRA (Cho et al.
    2024, arXiv:2401.06432).
    """

    name = "fedavg"
    needs_factors = True

    def merge_layer(self, layers: Sequence[Update], weights: Sequence[float]) -> LoRALayer:
        mean = FactorSum()
        for layer, weight in zip(layers, weights, strict=True):
            mean.add(layer, weight)
        return mean.result()
