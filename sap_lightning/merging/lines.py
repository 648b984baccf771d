"""LiNeS: layers scaled by their depth (Wang, Dimitriadis et al., ICLR 2025, arXiv:2410.17146).

Reference code: wang-kee/LiNeS, src/eval/eval.py.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sap_lightning.errors import check_at_least
from sap_lightning.functional.consensus import weighted_sum
from sap_lightning.functional.lora import Update, scaled
from sap_lightning.functional.rescaling import norm
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.clients import client_layers
from sap_lightning.merging.method import MergeMethod, Prepared
from sap_lightning.merging.on_top import Changed, OnTop
from sap_lightning.models.probe import AnchorProbe

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LiNeS(OnTop):
    """(α + β·(l − 1) / (L − 1))·ΔW_l in block l of L, of another method's ΔW: shallow blocks stay near the base.

    The authors' α for a merge, ‖Σ ΔW_k‖₁ / (K·‖ΔW‖₁) over the whole model, gives the shallowest block the length of
    the plain average whatever the method; here that average has the clients' weights. For the method ``average`` α is
    1, where the authors write 1 / K, as they scale the sum. They search β for each benchmark, from 0.1 to 1.5 for TIES
    as here; up to 1 for the sum, which is up to K for our average.

    A layer's block is the first number in its name, such as 7 in ``vision_model.encoder.layers.7.mlp.fc1``. As in the
    reference code, layers outside of the blocks, before them or after (CLIP's ``visual_projection``), are scaled by α.
    The code knows the L of each vision tower; here the blocks of one name before the number, of a tower, end with the
    deepest that a client adapts. Of a single block the factor is α.

    Args:
        method: a method, or the name of one at its default settings.
        alpha: α, at least 0; the authors' if not given. To edit one fine-tuned model, they have α + β = 1.
        beta: β, at least 0.
    """

    name = "lines"

    method: MergeMethod | str = "average"
    alpha: float | None = None
    beta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None:
            check_at_least("merge.method.alpha", self.alpha, 0)
        check_at_least("merge.method.beta", self.beta, 0)

    @property
    def uses_weights(self) -> bool:  # type: ignore[override]  # the authors' α is that of a weighted average
        return self.alpha is None or self.inner.uses_weights

    def prepare(
        self, adapters: Sequence[Adapter], weights: Sequence[float], anchors: AnchorProbe | None = None
    ) -> Prepared:
        prepared = self.inner.prepare(adapters, weights, anchors)
        average = length_of_average(adapters, weights) if self.alpha is None else 0.0
        return Changed(prepared, lambda update: self._graded(update, average))

    def _graded(self, update: Mapping[str, Update], average: float) -> dict[str, Update]:
        alpha = factor_to(average, update) if self.alpha is None else self.alpha
        log.info("lines: factors from %.3f in the shallowest block to %.3f in the deepest", alpha, alpha + self.beta)
        depth = depths(update)
        return {name: scaled(layer, alpha + self.beta * depth[name]) for name, layer in update.items()}


def length_of_average(adapters: Sequence[Adapter], weights: Sequence[float]) -> float:
    """‖Σ w_k·ΔW_k‖₁ over all layers."""
    return sum(norm(weighted_sum(layers, weights), 1) for layers in client_layers(adapters).values())


def factor_to(average: float, update: Mapping[str, Update]) -> float:
    """By what an update is as long as the average, in ‖ΔW‖₁ over all layers; 1 where it is zero."""
    length = sum(norm(layer, 1) for layer in update.values())
    return average / length if length else 1.0


def depths(names: Iterable[str]) -> dict[str, float]:
    """(l − 1) / (L − 1) of each layer's block in its tower, from 0 in the first to 1 in the deepest; 0 outside."""
    places = {name: _place(name) for name in names}
    deepest: dict[str, int] = defaultdict(int)
    for tower, block in places.values():
        deepest[tower] = max(deepest[tower], block)
    return {name: block / deepest[tower] if deepest[tower] else 0.0 for name, (tower, block) in places.items()}


def _place(name: str) -> tuple[str, int]:
    """What a layer's name has before its first number, and that number; 0 where it has none."""
    parts = name.split(".")
    at = next((index for index, part in enumerate(parts) if part.isdecimal()), None)
    return (name, 0) if at is None else (".".join(parts[:at]), int(parts[at]))
