"""Iso-CTS: isotropic merging in common and task-specific subspaces (Marczak et al., ICML 2025, arXiv:2502.04959).

Reference code: danielm1405/iso-merging, src/utils/iso.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sap_lightning.errors import check_share
from sap_lightning.functional.lora import Update
from sap_lightning.functional.rescaling import norm
from sap_lightning.functional.subspaces import Triplets, leading_triplets, orthogonalised, outside, summands
from sap_lightning.merging.iso_c import common_triplets, isotropic
from sap_lightning.merging.method import LayerwiseMethod


@dataclass(frozen=True)
class IsoCTS(LayerwiseMethod):
    """Iso-C whose weakest directions give way to some of each client's own.

    Of the R singular triplets of the sum, the leading ones span the common space U_c. Each client adds the same number
    of leading triplets of (I − U_c·U_cᵀ)·ΔW_k, so that there are R again; all U and all V are made orthogonal as in
    ``tsv_m``, and every σ becomes the mean of all.

    The sum is Σ K·w_k·ΔW_k: a client's weight counts in the common space and in the mean, not in how many directions
    of its own it has. One client gives Iso-C of it.

    Where we deviate: R is the rank of the sum, where the authors have min(d_out, d_in), for the reason that ``iso_c``
    gives; Tobeginwith/DC-Merge does the same for LoRA (R = K·r). A client with fewer directions of its own
    than its part adds those it has.

    Args:
        share: of R that is common, rounded so that the rest divides by K.
        scale: λ; the authors search it for each benchmark.
    """

    name = "iso_cts"
    needs_matrices = True

    share: float = 0.8
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_share("merge.method.share", self.share)

    def merge_layer(self, layers: Sequence[Update], weights: Sequence[float]) -> Update:
        parts = summands(layers, weights)
        U, sigma, V = common_triplets(parts)
        own = self._own_directions(len(sigma), len(parts))
        cut = len(sigma) - own * len(parts)
        common = Triplets(U[:, :cut], sigma[:cut], V[:cut])
        specific = [leading_triplets(outside(common.U, part), own, size=norm(part, 2)) for part in parts]
        return isotropic(orthogonalised([common, *specific]), self.scale)

    def _own_directions(self, rank: int, clients: int) -> int:
        """How many of the R directions each client has for itself."""
        return min(round((rank - int(self.share * rank)) / clients), rank // clients)
