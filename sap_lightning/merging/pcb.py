"""PCB-Merging: parameter competition balancing (Du et al., NeurIPS 2024, arXiv:2410.02396).

Reference code: duguodong7/pcb-merging, pcb-merging.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sap_lightning.console import track
from sap_lightning.errors import check_share
from sap_lightning.functional.lora import LoRALayer, Update
from sap_lightning.functional.masking import smallest
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.clients import ClientLayers, client_layers
from sap_lightning.merging.method import MergeMethod, Prepared
from sap_lightning.models.probe import AnchorProbe

_TAIL = 1e-4
"""Share of a client's magnitudes that is clipped at each end."""
_LEAST_COEFFICIENT = 1e-12


@dataclass(frozen=True)
class PCB(MergeMethod):
    """λ·Σ c_k⊙ΔW_k / Σ c_k with a coefficient for every element of every client, to the letter of the authors' code.

    With norm(x) what takes a client's smallest x to 0 and its largest to 1, over all layers together,

        β_k = exp(K·norm(|ΔW_k|)²) ⊙ tanh(ΔW_k ⊙ Σ_j ΔW_j)    intra-balancing, within a client ⊙ inter-balancing
        c_k = K·w_k·norm(max(β_k, its ρ-quantile))             drop and rescale

    and |ΔW_k| clipped to its quantiles 0.0001 and 0.9999, in the mean too. The paper has softmax in both: the sums
    below the first one's fraction cancel in norm, and in place of the second one, over normalised products, the code
    has tanh, a straight line for trained updates (|ΔW| ≪ 1): those may all be multiplied by a number, large ones not.
    The code knows no weights w of clients. A client that lacks a layer has zeros there, which count in its quantiles.

    The authors search λ for each client by evolution in [0.8, 1.3] around 1, and keep 5 to 20 %.

    Args:
        sparsity: ρ, the share of a client's elements whose coefficient is zero; 0.9 is the code's default.
        scale: λ, one for all clients.
    """

    name = "pcb"

    sparsity: float = 0.9
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_share("merge.method.sparsity", self.sparsity)

    def prepare(
        self, adapters: Sequence[Adapter], weights: Sequence[float], anchors: AnchorProbe | None = None
    ) -> Prepared:
        layers = client_layers(adapters)
        totals = {name: total_of(clients) for name, clients in layers.items()}
        bounds = [
            clipping_bounds(torch.cat([clients[k].delta().abs().flatten() for clients in layers.values()]))
            for k in track(range(len(adapters)), "pcb: clipping")
        ]
        return Competition(self, layers, weights, totals, bounds)


class Bounds(NamedTuple):
    """The smallest and largest values that are told apart."""

    low: float
    high: float

    def clip(self, values: Tensor) -> Tensor:
        """The values within the bounds, else the nearer bound."""
        return values.clamp(self.low, self.high)

    def normalised(self, values: Tensor) -> Tensor:
        """The clipped values from 0, the lower bound, to 1, the upper one; 0 where there is nothing between."""
        return (self.clip(values) - self.low) / (self.high - self.low or 1.0)


@dataclass(frozen=True)
class Competition(Prepared):
    """Clients whose coefficients wait for a sparsity.

    Attributes:
        method: the method.
        layers: of all clients, by name.
        weights: each client's share of the whole.
        totals: Σ ΔW_j by layer.
        bounds: each client's, of its magnitudes.
    """

    method: PCB
    layers: Mapping[str, ClientLayers]
    weights: Sequence[float]
    totals: Mapping[str, Tensor]
    bounds: Sequence[Bounds]

    def apply(self, sparsity: float | None = None) -> dict[str, Update]:
        sparsity = self.method.sparsity if sparsity is None else sparsity
        kept = [self._kept(k, sparsity) for k in track(range(len(self.weights)), "pcb: clients")]
        return {name: self._merge_layer(name, kept) for name in track(list(self.layers), "pcb: layers")}

    def _kept(self, k: int, sparsity: float) -> Bounds:
        """The ρ-quantile of a client's β and the largest."""
        balances = torch.cat(
            [self._balance(k, clients[k].delta(), self.totals[name]).flatten() for name, clients in self.layers.items()]
        )
        rank = min(int(sparsity * len(balances)), len(balances) - 1)
        return Bounds(smallest(balances, rank + 1), float(balances.max()))

    def _merge_layer(self, name: str, kept: Sequence[Bounds]) -> Tensor:
        total = self.totals[name]
        merged, coefficients = torch.zeros_like(total), torch.zeros_like(total)
        for k, layer in enumerate(self.layers[name]):
            delta = layer.delta()
            coefficient = len(kept) * self.weights[k] * kept[k].normalised(self._balance(k, delta, total))
            merged += coefficient * delta.sign() * self.bounds[k].clip(delta.abs())
            coefficients += coefficient
        return self.method.scale * merged / coefficients.clamp(min=_LEAST_COEFFICIENT)

    def _balance(self, k: int, delta: Tensor, total: Tensor) -> Tensor:
        return balance(delta, total, self.bounds[k], len(self.weights))


def total_of(layers: Sequence[LoRALayer]) -> Tensor:
    """Σ ΔW_j of one layer, in which opposite updates leave exactly nothing; what they left would decide otherwise."""
    total = torch.zeros(layers[0].shape)
    for layer in layers:
        total += layer.delta()
    return total


def balance(delta: Tensor, total: Tensor, bounds: Bounds, clients: int) -> Tensor:
    """β of some elements of one client, divided by exp(K) lest it overflow; the factor cancels in the coefficients."""
    importance = bounds.normalised(delta.abs()).square()
    return torch.exp(clients * (importance - 1)) * torch.tanh(delta * total)


def clipping_bounds(magnitudes: Tensor) -> Bounds:
    """The quantiles of a flat tensor beyond which the code clips."""
    count = len(magnitudes)
    low, high = int(_TAIL * count), max(int((1 - _TAIL) * count - 1), 0)
    return Bounds(smallest(magnitudes, low + 1), smallest(magnitudes, high + 1))
