"""Iso-C: isotropic merging in the common subspace (Marczak et al., ICML 2025, arXiv:2502.04959).

Reference code: danielm1405/iso-merging, src/utils/iso.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sap_lightning.functional.lora import LoRALayer, Update
from sap_lightning.functional.rescaling import norm
from sap_lightning.functional.subspaces import Triplets, leading_triplets, sum_of, summands
from sap_lightning.merging.method import LayerwiseMethod


@dataclass(frozen=True)
class IsoC(LayerwiseMethod):
    """λ·σ̄·U·V from the SVD of the sum of the ΔW: every singular value becomes their mean σ̄.

    The sum is Σ K·w_k·ΔW_k, plain where the clients count alike. One client does not come back as it was: its spectrum
    is flattened too.

    Where we deviate: the mean goes over the singular values that are not 0. The authors merge updates of full rank and
    divide by min(d_out, d_in). A sum of LoRAs has at most Σ r_k singular values, and dividing by min(d_out, d_in) would
    shrink them by the share of the layer that nobody touched, and spread that over directions which are arbitrary.

    Args:
        scale: λ; the authors search it for each benchmark.
    """

    name = "iso_c"
    needs_matrices = True

    scale: float = 1.0

    def merge_layer(self, layers: Sequence[Update], weights: Sequence[float]) -> Update:
        return isotropic(common_triplets(summands(layers, weights)), self.scale)


def common_triplets(parts: Sequence[Update]) -> Triplets:
    """The singular triplets of the sum, but for what is left of clients that cancel out."""
    size = max(norm(part, 2) for part in parts)
    return leading_triplets(sum_of(parts), size=size)


def isotropic(triplets: Triplets, scale: float) -> LoRALayer:
    """λ times the update with all σ replaced by their mean."""
    U, sigma, V = triplets
    return Triplets(U, (scale * sigma.mean()).expand_as(sigma), V).layer()
