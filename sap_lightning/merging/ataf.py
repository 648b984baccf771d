"""ATAF: task vectors aligned to one of them, then mixed in as far as predictions stay consistent.

Reference code: Harris-X/DGSM, merge/ATAF (stage 2 aligns, stage 3 fuses); we found no paper under this name.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sap_lightning.console import track
from sap_lightning.errors import InputError, check_at_least, check_share
from sap_lightning.functional.agreement import divergence
from sap_lightning.functional.consensus import weighted_sum
from sap_lightning.functional.lora import Update
from sap_lightning.functional.procrustes import Side, aligned
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.clients import Source, client_layers
from sap_lightning.merging.distances import squared_distances
from sap_lightning.merging.method import MergeMethod, Prepared, PreparedLayers, refuse_unused, required
from sap_lightning.models.probe import AnchorProbe

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ATAF(MergeMethod):
    """(1 − α)·ΔW_r + α·Σ_{k≠r} w_k·ΔW_k·P_k·Λ_k, layer by layer, with the others' weights w_k of sum 1.

    P_k is the rotation of the inputs that brings ΔW_k nearest to ΔW_r (orthogonal Procrustes, Schönemann 1966), UVᵀ of
    ΔW_kᵀ·ΔW_r = UΣVᵀ, on the directions where both are. Λ_k is the diagonal that scales each column by least squares.
    On the side of the outputs it is the same of the transposed updates, D_k·R_k·ΔW_k. α is the one on an even grid over
    [0, 1] whose predictions for the anchor images, over all their captions, have the least Jensen-Shannon divergence
    from the clients' own, averaged over images and clients; no image's own caption is looked at. Of equal ones the
    smallest α.

    The code fuses two language models, the first of them the reference, at a fixed α; here the reference r is the
    client with the least summed distance to the others over all layers, and the others' aligned updates add up. Where
    ΔW_kᵀ·ΔW_r has no direction its rotation is left to chance there and nothing is here; and it bounds the squared norm
    of a column from below by 1e-8, which is more than a column of a LoRA update may have.

    Of whole models the first is the reference, as in the code. Matrices of the blocks (whose names have a number) are
    aligned, their biases mixed as they are, and all else is the first model's: norms, embeddings, heads. The code does
    so in a language model and leaves its vision tower alone; here all towers are alike.

    Args:
        steps: number of α that are tried, 0 and 1 among them.
        side: what is rotated and scaled: inputs, as in the code, or outputs.
        alpha: α, for which then nothing is looked at; the code's demo has 0.2.

    Raises:
        InputError: when there are fewer than two adapters.
    """

    name = "ataf"
    merges_weights = True

    steps: int = 11
    side: Side = "input"
    alpha: float | None = None

    def __post_init__(self) -> None:
        check_at_least("merge.method.steps", self.steps, 2)
        if self.alpha is not None:
            check_share("merge.method.alpha", self.alpha)
            refuse_unused(self, ["steps"], "alpha")

    @property
    def needs_anchors(self) -> bool:  # type: ignore[override]  # to find α
        return self.alpha is None

    @property
    def grid(self) -> list[float]:
        """The α that are tried."""
        return [step / (self.steps - 1) for step in range(self.steps)]

    def prepare(
        self, adapters: Sequence[Adapter], weights: Sequence[float], anchors: AnchorProbe | None = None
    ) -> Prepared:
        probe = required(anchors, self) if self.needs_anchors else None
        if len(adapters) < 2:
            raise InputError("merge.method ataf aligns clients to one another; give at least 2 adapters")
        mixture = Mixture.of(adapters, weights, self.side)
        alpha = self._most_consistent(mixture, adapters, probe) if probe else self.alpha
        assert alpha is not None
        findings = {"reference": adapters[mixture.reference].name, "alpha": alpha}
        return PreparedLayers(list(mixture.layers), lambda name: mixture.layer(name, alpha), findings, self.name)

    @property
    def least_clients(self) -> int:
        return 2

    def keeps(self, name: str, shape: Sequence[int]) -> bool:
        return self.alpha == 0 or not is_mixed(name, shape)

    def merge_weight(self, name: str, models: Sequence[Source], weights: Sequence[float]) -> Update:
        assert self.alpha is not None
        first, *others = (model.layers[name] for model in models)
        if not name.endswith("bias"):
            others = [aligned(update, first, self.side) for update in others]
        return Mixture({name: [first, *others]}, weights, 0).layer(name, self.alpha)

    def _most_consistent(self, mixture: Mixture, adapters: Sequence[Adapter], probe: AnchorProbe) -> float:
        clients = torch.stack([predictions(adapter.layers, probe) for adapter in adapters])
        divergences = [
            float(divergence(predictions(mixture.at(alpha), probe), clients).mean())
            for alpha in track(self.grid, f"{self.name}: alphas")
        ]
        least = min(divergences)
        alpha = self.grid[divergences.index(least)]
        log.info("ataf: alpha %g has the least divergence from the clients, %.3e", alpha, least)
        return alpha


def is_mixed(name: str, shape: Sequence[int]) -> bool:
    """Whether a weight of a whole model is a matrix or a bias of its blocks, and of no norm in them."""
    in_block = any(part.isdecimal() for part in name.split("."))
    mixed = len(shape) == 2 or (len(shape) == 1 and name.endswith("bias"))
    return in_block and mixed and not ("norm" in name or "ln_" in name)


@dataclass(frozen=True)
class Mixture:
    """Clients aligned to one of them, to be mixed in.

    Attributes:
        layers: every client's, aligned, by name.
        weights: each client's share of the whole.
        reference: which client the others are aligned to.
    """

    layers: Mapping[str, Sequence[Update]]
    weights: Sequence[float]
    reference: int

    @classmethod
    def of(cls, adapters: Sequence[Adapter], weights: Sequence[float], side: Side = "input") -> Mixture:
        """Aligns to the client with the least summed distance to the others over all layers."""
        distances = squared_distances(adapters).sqrt().sum(1).tolist()
        reference = distances.index(min(distances))
        layers: dict[str, Sequence[Update]] = {}
        for name, clients in track(list(client_layers(adapters).items()), "ataf: layers"):
            nearest = clients[reference]
            layers[name] = [nearest if k == reference else aligned(one, nearest, side) for k, one in enumerate(clients)]
        return cls(layers, weights, reference)

    def at(self, alpha: float) -> dict[str, Update]:
        """The merged update with this share of the aligned clients."""
        return {name: self.layer(name, alpha) for name in self.layers}

    def layer(self, name: str, alpha: float) -> Update:
        """One layer of it.

        Raises:
            InputError: when all others have weight 0, of which there are no shares.
        """
        others = sum(weight for number, weight in enumerate(self.weights) if number != self.reference)
        if not others:
            raise InputError(
                f"weights {list(self.weights)}: ataf mixes the others into number {self.reference + 1}, and they weigh"
                " 0; give one of them another weight"
            )
        shares = [alpha * weight / others for weight in self.weights]
        shares[self.reference] = 1 - alpha
        return weighted_sum(self.layers[name], shares)


def predictions(update: Mapping[str, Update], probe: AnchorProbe) -> Tensor:
    """Softmax over the captions for every anchor image at base + update, shape (images, captions), float64."""
    return probe.logits(update).double().softmax(-1)
