"""RegMean: dataless knowledge fusion by merging weights (Jin et al., ICLR 2023, arXiv:2212.09849).

Reference code: bloomberg/dataless-model-merging, src/model_merge/avg_merger.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sap_lightning.console import track
from sap_lightning.errors import check_share
from sap_lightning.functional.consensus import weighted_sum
from sap_lightning.functional.lora import Update, dense
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.clients import ClientLayers, client_layers
from sap_lightning.merging.method import MergeMethod, Prepared, PreparedLayers, required
from sap_lightning.models.probe import AnchorProbe

# Directions of a Gram matrix of float32 inputs below this share of the largest are rounding errors.
_NOISE = 1e-6


@dataclass(frozen=True)
class RegMean(MergeMethod):
    """(Σ w_k·ΔW_k·G_k)(Σ w_k·G_k)⁻¹: the ΔW whose outputs are the nearest to every client's own.

    It minimises Σ w_k·‖(ΔW − ΔW_k)·X_kᵀ‖² with G_k = X_kᵀX_k / tokens the Gram matrix of the layer's inputs through
    client k's model, off-diagonal elements shrunk.

    Where we deviate: X_k are the anchors and not the client's own images, which the server lacks. Few anchors leave
    Σ G_k singular, where the authors' inverse fails; of all minimisers we take the one nearest to the plain average
    Σ w_k·ΔW_k, so what the anchors do not reach is averaged. A client without a layer has ΔW = 0 there, and a G all
    the same.

    Args:
        off_diagonal: factor in [0, 1] of the off-diagonal elements of G_k.
    """

    name = "regmean"
    needs_anchors = True

    off_diagonal: float = 0.9

    def __post_init__(self) -> None:
        check_share("merge.method.off_diagonal", self.off_diagonal)

    def prepare(
        self, adapters: Sequence[Adapter], weights: Sequence[float], anchors: AnchorProbe | None = None
    ) -> Prepared:
        problems = regressions(adapters, weights, required(anchors, self), self.off_diagonal, self.name)
        return PreparedLayers(list(problems), lambda name: nearest(problems[name], self.off_diagonal), {}, self.name)


class Regression(NamedTuple):
    """What the least squares of one layer are made of.

    Attributes:
        clients: the layer of every client.
        weights: each client's share of the whole, w.
        product: N = Σ w_k·ΔW_k·G_k, shape (d_out, d_in), float64.
        gram: C = Σ w_k·G_k, shape (d_in, d_in), float64.
    """

    clients: ClientLayers
    weights: Sequence[float]
    product: Tensor
    gram: Tensor

    @property
    def average(self) -> Update:
        """Σ w_k·ΔW_k, where the anchors say nothing."""
        return weighted_sum(self.clients, self.weights)


def regressions(
    adapters: Sequence[Adapter], weights: Sequence[float], probe: AnchorProbe, off_diagonal: float, title: str
) -> dict[str, Regression]:
    """The least-squares problem of every layer, from one pass over the anchors for each client."""
    problems = {
        name: Regression(clients, weights, _zeros(*clients.shape), _zeros(clients.shape[1], clients.shape[1]))
        for name, clients in client_layers(adapters).items()
    }
    for client, weight in enumerate(track(weights, f"{title}: clients")):
        update = {name: problem.clients[client] for name, problem in problems.items()}
        for name, gram in probe.grams(update).items():
            A, B, scale = update[name]
            weighted = weight * shrunk(gram.double(), off_diagonal)
            problems[name].product.addmm_(B.double(), A.double() @ weighted, alpha=scale)
            problems[name].gram.add_(weighted)
    return problems


def nearest(problem: Regression, off_diagonal: float) -> Tensor:
    """Of the ΔW that minimise the squares the one nearest to the average."""
    average = dense(problem.average).double()
    residual = problem.product - average @ problem.gram
    return (average + residual @ inverse(problem.gram, off_diagonal)).float()


def shrunk(gram: Tensor, off_diagonal: float) -> Tensor:
    """G with its off-diagonal elements multiplied by a factor."""
    return off_diagonal * gram + (1 - off_diagonal) * gram.diag().diag()


def inverse(gram: Tensor, off_diagonal: float = 1.0) -> Tensor:
    """G⁻¹ of a float64 Gram matrix; a generalised inverse where directions are missing.

    Inputs are brought to one size first, since a few of CLIP's are hundreds of times larger than the rest. Of a matrix
    that is shrunk, no eigenvalue is then below 1 − ``off_diagonal``, and Cholesky's method finds the same inverse
    without any of them.

    Args:
        gram: G, shape (n, n).
        off_diagonal: what its off-diagonal elements were multiplied by.
    """
    sizes = gram.diag().clamp(min=0).sqrt()
    missing = (sizes == 0).double()
    outer = (sizes + missing).outer(sizes + missing)
    if 1 - off_diagonal > _NOISE * len(gram):  # the largest eigenvalue is at most n
        factor = torch.linalg.cholesky(gram / outer + missing.diag())
        return (torch.cholesky_inverse(factor) - missing.diag()) / outer
    return torch.linalg.pinv(gram / outer, rtol=_NOISE, hermitian=True) / outer


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)
