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
from sap_lightning.errors import InputError, check_share
from sap_lightning.functional.consensus import weighted_sum
from sap_lightning.functional.lora import Update, dense
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.clients import ClientLayers, client_layers
from sap_lightning.merging.method import MergeMethod, Prepared, PreparedLayers, required
from sap_lightning.models.probe import AnchorProbe

# Directions of a Gram matrix of float32 inputs below this share of the largest are rounding errors.
NOISE = 1e-6
_DAMPING = 5e-5
STEPS = 16
"""In which a system is solved that has such directions."""


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
        return PreparedLayers(list(problems), lambda name: nearest(problems[name]), {}, self.name)


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


def nearest(problem: Regression) -> Tensor:
    """Of the ΔW that minimise the squares the one nearest to the average."""
    average = dense(problem.average).double()
    residual = problem.product - average @ problem.gram
    basis = _columns(problem.clients)
    return (average + basis @ Solver(problem.gram).solve(basis.T @ residual)).float()


def _columns(clients: ClientLayers) -> Tensor:
    """Orthonormal columns that span those of all clients' updates, shape (d_out, m); few clients have few."""
    found: list[Tensor] = []
    for layer in clients:
        found.append(layer.B.double())
        if sum(B.shape[1] for B in found) >= clients.shape[0]:
            return torch.eye(clients.shape[0], dtype=torch.float64)
    return torch.linalg.qr(torch.cat(found, dim=1))[0]


def shrunk(gram: Tensor, off_diagonal: float) -> Tensor:
    """G with its off-diagonal elements multiplied by a factor."""
    return off_diagonal * gram + (1 - off_diagonal) * gram.diag().diag()


class Solver:
    """Z with Z·C = R for a Gram matrix C, by Cholesky's method and none of its eigenvalues.

    Inputs are brought to one size first, since a few of CLIP's are hundreds of times larger than the rest: with
    D² = diag(C), what follows is of C̃ = D⁻¹·C·D⁻¹ and Z·D. If C̃ − 1e-6·‖C̃‖·1 is positive definite, norms being
    Frobenius', no direction is noise, and Z = R·C⁻¹. Else Z goes from 0 to Z + (R − Z·C)·(C + ε·D²)⁻¹ in each of 16
    steps, ε = 5e-5·‖C̃‖: where R = Z·C has solutions, it nears the one of least ‖Z·D‖, which is R times the
    pseudo-inverse, in the direction of an eigenvalue λ of C̃ as far as 1 − (ε / (λ + ε))¹⁶: up to 1e-6 of it where
    λ > 1.4·ε, and up to 1e-12 where λ > 5·ε. Directions that no input has stay 0.

    Args:
        gram: C, shape (n, n), float64.

    Raises:
        InputError: when it is not finite.
    """

    def __init__(self, gram: Tensor) -> None:
        self.gram = gram
        sizes = gram.diag().clamp(min=0).sqrt()
        missing = (sizes == 0).double()
        self._sizes = sizes + missing
        scaled = gram / self._sizes.outer(self._sizes) + missing.diag()
        norm = float(torch.linalg.matrix_norm(scaled))
        self.is_regular = _cholesky(scaled, -NOISE * norm) is not None
        # Where inputs are of less precision than float32, more may be needed.
        added = [0.0] if self.is_regular else [_DAMPING * norm * 10.0**power for power in range(6)]
        factors = (_cholesky(scaled, more) for more in added)
        found = next((factor for factor in factors if factor is not None), None)
        if found is None:
            raise InputError(
                "a layer's inputs are not finite on the anchors; leave out the adapter that is far too large"
            )
        self._factor = found

    def solve(self, right: Tensor, steps: int = STEPS) -> Tensor:
        """Z, shape (m, n), from R, shape (m, n), in float64; of a matrix that is regular in one step."""
        Z = self._step(right)
        for _ in range(0 if self.is_regular else steps - 1):
            Z = Z + self._step(right - Z @ self.gram)
        return Z

    def _step(self, right: Tensor) -> Tensor:
        return torch.cholesky_solve((right / self._sizes).T, self._factor).T / self._sizes


def _cholesky(matrix: Tensor, added: float) -> Tensor | None:
    """Cholesky's factor of a matrix with something added to its diagonal, if there is one."""
    moved = matrix.clone()
    moved.diagonal().add_(added)
    factor, failed = torch.linalg.cholesky_ex(moved)
    return None if int(failed) else factor


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)
