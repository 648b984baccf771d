"""Task arithmetic: the sum of the updates times λ (Ilharco et al., ICLR 2023, arXiv:2212.04089).

Reference code: mlfoundations/task_vectors, src/task_vectors.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sap_lightning.functional.consensus import weighted_sum
from sap_lightning.functional.lora import Update
from sap_lightning.merging.method import LayerwiseMethod


@dataclass(frozen=True)
class TaskArithmetic(LayerwiseMethod):
    """λ·Σ K·w_k·ΔW_k: λ times the plain sum where the K clients count alike.

    Args:
        scale: λ; 1 / K gives the average.
    """

    name = "task_arithmetic"
    by_element = True
    takes_any_weights = True

    scale: float = 0.3

    def merge_layer(self, layers: Sequence[Update], weights: Sequence[float]) -> Update:
        return weighted_sum(layers, [self.scale * len(layers) * weight for weight in weights])
