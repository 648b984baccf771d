"""ATA of Pilot: adaptive aggregation by distance between text adapters (Xiong et al., AAAI 2025, arXiv:2501.13985).

The authors' code was not published when we looked; formulas are the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sap_lightning.errors import InputError, check_at_least
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.average import averaged
from sap_lightning.merging.distances import squared_distances
from sap_lightning.merging.method import MergeMethod, Prepared
from sap_lightning.models.probe import AnchorProbe

_LEAST_DISTANCE = 1e-12


@dataclass(frozen=True)
class ATA(MergeMethod):
    """Each client's model is its own, weighted by its samples, with its neighbours', weighted by their nearness.

    Θ_k ← (n_k·Θ_k + Σ_{i∈N_k} Θ_i / d_ki) / (n_k + Σ_{i∈N_k} 1 / d_ki) with n_k the number of client k's training
    images and N_k the other clients nearest to it.

    Where we deviate: d_ki = ‖ΔW_k − ΔW_i‖ over all layers, where the paper measures between the parameters
    themselves; A and B have a gauge, so that equal updates can have factors far apart. The paper sends each client
    its own model; the global model is the clients' weighted average of those.

    Args:
        neighbours: how many others a client listens to, all of them if there are fewer.
        client: name of the one whose model is wanted; the global model if not given.

    Raises:
        InputError: when an upload does not say its number of samples, or no upload has the client's name.
    """

    name = "ata"
    needs_manifests = True

    neighbours: int = 3
    client: str | None = None

    def __post_init__(self) -> None:
        check_at_least("merge.method.neighbours", self.neighbours, 1)

    def prepare(
        self, adapters: Sequence[Adapter], weights: Sequence[float], anchors: AnchorProbe | None = None
    ) -> Prepared:
        by_client = aggregation_weights(squared_distances(adapters).sqrt(), _samples(adapters), self.neighbours)
        shares = (self._shares(adapters, weights) @ by_client).tolist()
        names = [adapter.name for adapter in adapters]
        return averaged(adapters, shares, {"weights": dict(zip(names, shares, strict=True))}, self.name)

    def _shares(self, adapters: Sequence[Adapter], weights: Sequence[float]) -> Tensor:
        if self.client is None:
            return torch.tensor(weights, dtype=torch.float64)
        names = [adapter.name for adapter in adapters]
        if self.client not in names:
            raise InputError(f"merge.method.client {self.client!r}: no such client, there are {', '.join(names)}")
        shares = torch.zeros(len(names), dtype=torch.float64)
        shares[names.index(self.client)] = 1
        return shares


def aggregation_weights(distances: Tensor, samples: Tensor, neighbours: int) -> Tensor:
    """What each client's model takes of every client, shape (K, K), of rows with sum 1.

    Args:
        distances: d, shape (K, K); below 1e-12 they count as that.
        samples: n, shape (K,).
        neighbours: how many of the nearest others count; of equally near ones the first do.
    """
    others = distances.double().clamp(min=_LEAST_DISTANCE).fill_diagonal_(torch.inf)
    nearest = others.argsort(dim=1, stable=True)[:, :neighbours]
    nearness = torch.zeros_like(others).scatter_(1, nearest, 1 / others.gather(1, nearest))
    weights = nearness + samples.double().diag()
    return weights / weights.sum(1, keepdim=True)


def _samples(adapters: Sequence[Adapter]) -> Tensor:
    for adapter in adapters:
        if adapter.num_samples is None:
            raise InputError(
                f"merge.method ata: upload {adapter.name!r} has no manifest that says its number of samples;"
                " upload it with one"
            )
    return torch.tensor([adapter.num_samples for adapter in adapters], dtype=torch.float64)
