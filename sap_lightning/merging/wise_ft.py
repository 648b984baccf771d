"""WiSE-FT: robust fine-tuning by weight interpolation (Wortsman et al., CVPR 2022, arXiv:2109.01903).

Reference code: mlfoundations/wise-ft, src/wise_ft.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sap_lightning.errors import check_share
from sap_lightning.functional.consensus import weighted_sum
from sap_lightning.functional.lora import Update
from sap_lightning.merging.method import LayerwiseMethod


@dataclass(frozen=True)
class WiSEFT(LayerwiseMethod):
    """λ·Σ w_k·ΔW_k: the point (1 − λ)·W + λ·(W + Σ w_k·ΔW_k) between the base and the clients' average.

    The authors interpolate between the base and one fine-tuned model, here with one client, or with the average of
    several (their model soups). Their α is our λ.

    Args:
        scale: λ in [0, 1]; 0 is the base, 1 the average. The authors recommend 0.5 where nothing can be tuned.
    """

    name = "wise_ft"
    by_element = True

    scale: float = 0.5

    def __post_init__(self) -> None:
        check_share("merge.method.scale", self.scale)

    def merge_layer(self, layers: Sequence[Update], weights: Sequence[float]) -> Update:
        return weighted_sum(layers, [self.scale * weight for weight in weights])
