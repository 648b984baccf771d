"""Model Breadcrumbs: masks that drop the smallest and the largest elements (Davari & Belilovsky, ECCV 2024).

arXiv:2312.06795; reference code: rezazzr/breadcrumbs, src/task_vectors.py, TaskVectorMiddleKeep.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sap_lightning.functional.masking import keep_middle
from sap_lightning.functional.spaces import Parameters, Space, magnitudes
from sap_lightning.merging.clients import Source
from sap_lightning.merging.pruning import PruningMethod, check_both_ends
from sap_lightning.models.probe import Answer


@dataclass(frozen=True)
class Breadcrumbs(PruningMethod):
    """α·Σ K·w_k·m_k⊙ΔW_k, where m_k drops the negligible elements of ΔW_k and its outliers.

    Shares are rounded to the nearest number of elements, where mergekit and the authors' code round down. The authors
    search ρ, the share at the upper end and α on a few tasks; the defaults are those their search starts from.

    Args:
        sparsity: ρ, the share dropped altogether, at both ends; the authors keep 15 %.
        largest: the share dropped at the upper end, a part of ρ; at a lower ρ no more than that.
        scale: α.
        scope: one mask for each layer, as the paper says and mergekit does, or for each row, as the authors' code does.

    Raises:
        InputError: when a share does not lie in [0, 1], or more is to be dropped at the upper end than altogether.
    """

    name = "breadcrumbs"

    sparsity: float = 0.85
    largest: float = 0.006
    scale: float = 0.2
    scope: Literal["layer", "row"] = "layer"  # type: ignore[assignment]  # no other method prunes row by row

    def __post_init__(self) -> None:
        check_both_ends(self.sparsity, self.largest)

    def scores(self, source: Source, spaces: Mapping[str, Space], answer: Answer) -> dict[str, Parameters]:
        return magnitudes(spaces)

    def masks(self, scores: Mapping[str, Parameters], sparsity: float) -> dict[str, Parameters]:
        rows = self.scope == "row"
        return {
            name: tuple(keep_middle(score, sparsity, self.largest, rows) for score in layer)
            for name, layer in scores.items()
        }

    def factor(self, clients: int) -> float:
        return self.scale * clients
