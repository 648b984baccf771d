"""TSV-M: task singular vectors without interference (Gargiulo et al., CVPR 2025, arXiv:2412.00081).

Reference code: AntoAndGar/task_singular_vectors, src/utils/TSVM_utils.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sap_lightning.errors import check_share
from sap_lightning.functional.lora import Update, scaled
from sap_lightning.functional.subspaces import leading_triplets, orthogonalised, rank_of, summands
from sap_lightning.merging.method import LayerwiseMethod


@dataclass(frozen=True)
class TSVM(LayerwiseMethod):
    """λ·U⊥·diag(σ)·V⊥: the clients' leading singular triplets, all U and all V made orthogonal to each other.

    [U_1 … U_K] and [V_1 … V_K] are replaced by the nearest matrices with orthonormal columns (polar factors), so that
    clients interfere neither in what they read nor in what they write. The σ stay: the result is as long as a sum of
    the ΔW, not as their mean. A client's σ are multiplied by K times its share of the whole; where all count alike,
    that is by 1.

    The authors keep ⌊min(d_out, d_in) / K⌋ triplets of each client, as many as the layer has room for. A LoRA has only
    r, so all of it stays as long as K·r fits into the layer.

    Where we deviate: the code fills that room up with directions of σ = 0, which are arbitrary and turn the others; we
    leave them out. Directions that clients share exactly are not split up either (the polar factor is a partial
    isometry there): K copies of a client give that client, where the code adds arbitrary directions.

    Args:
        scale: λ, 1 as in the paper.
        share: of a client's own triplets that stay, at least one; null: the authors' rule above.
    """

    name = "tsv_m"
    needs_matrices = True

    scale: float = 1.0
    share: float | None = None

    def __post_init__(self) -> None:
        if self.share is not None:
            check_share("merge.method.share", self.share)

    def merge_layer(self, layers: Sequence[Update], weights: Sequence[float]) -> Update:
        parts = [leading_triplets(layer, self._rank(layer, len(layers))) for layer in summands(layers, weights)]
        return scaled(orthogonalised(parts).layer(), self.scale)

    def _rank(self, layer: Update, clients: int) -> int:
        if self.share is None:
            return max(1, min(layer.shape) // clients)
        return max(1, round(self.share * rank_of(layer)))
