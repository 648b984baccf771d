"""StatsMerging: coefficients that are learned from statistics of weights (Merugu et al. 2025, arXiv:2506.04567).

Reference code: statsmerging/statsmerging, src/train-8-models-stats-merge.py and src/statsmergingPP.py.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sap_lightning.console import track
from sap_lightning.errors import check_at_least, check_positive, check_seed
from sap_lightning.functional.consensus import weighted_sum
from sap_lightning.functional.lora import LoRALayer, Update
from sap_lightning.functional.weight_statistics import scaled_over_all, weight_statistics
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.adamerging import MixtureSpace
from sap_lightning.merging.clients import client_layers
from sap_lightning.merging.method import MergeMethod, Prepared, PreparedLayers, required
from sap_lightning.models.probe import AnchorProbe

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StatsMerging(MergeMethod):
    """Σ α_kˡ·ΔW_kˡ with coefficients of sum 1 in every layer, which a small network learns from statistics of the ΔW.

    The network sees six statistics of a client's layer (mean, variance, norm, three largest singular values), scaled
    over all layers and clients, and gives a number; the softmax of it over the clients is α. It learns by Adam to have
    the merged model say of the anchors' images what each client's own model says, its most probable caption of all, by
    cross-entropy summed over the clients. No image's own caption is looked at.

    Where we deviate: the paper has unlabelled images of each task's own, and here all clients are asked about the
    anchors, all of them in every step. Its statistics are those of a client's weights, in which a LoRA would drown in
    the base, which is in all of them; here they are the update's. Its code merges without gradients, so that its
    coefficients cannot learn; it trains on true labels, and one of its variants lets the base take a part of the
    softmax. Its 500 steps at 1e-3 take hours on a CPU.

    Args:
        steps: of Adam.
        rate: Adam's learning rate.
        hidden: width of the network's two hidden layers.
        seed: of the network's first weights.
    """

    name = "stats_merging"
    needs_anchors = True
    uses_weights = False

    steps: int = 10
    rate: float = 0.05
    hidden: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least("merge.method.steps", self.steps, 1)
        check_at_least("merge.method.hidden", self.hidden, 1)
        check_positive("merge.method.rate", self.rate)
        check_seed("merge.method.seed", self.seed)

    def prepare(
        self, adapters: Sequence[Adapter], weights: Sequence[float], anchors: AnchorProbe | None = None
    ) -> Prepared:
        probe = required(anchors, self)
        layers = client_layers(adapters)
        alphas, losses = self._descend(layers, taught(probe, adapters))
        log.info("stats_merging: loss on %d anchors from %.4f to %.4f", len(probe.pairs), losses[0], losses[-1])
        chosen = dict(zip(layers, alphas.tolist(), strict=True))
        findings = {"coefficients": chosen, "losses": losses}
        return PreparedLayers(list(layers), lambda name: weighted_sum(layers[name], chosen[name]), findings, self.name)

    @torch.inference_mode(False)  # in which validation runs
    @torch.enable_grad()
    def _descend(self, layers: Mapping[str, Sequence[LoRALayer]], probe: AnchorProbe) -> tuple[Tensor, list[float]]:
        """α of every layer and client, shape (layers, K), and the loss before each step and after the last."""
        spaces = {
            name: MixtureSpace([one.to(probe.device) for one in of], [0.0] * len(of)) for name, of in layers.items()
        }
        learner = self.learner(
            torch.stack([torch.stack([weight_statistics(one) for one in of]) for of in layers.values()])
        )

        def update() -> dict[str, Update]:
            rows = learner.alphas().to(probe.device)
            return {name: space.update((row,)) for (name, space), row in zip(spaces.items(), rows, strict=True)}

        losses = []
        for _ in track(range(self.steps), f"{self.name}: steps"):
            gradients, loss = probe.gradients(update(), spaces, "mean_then_abs", "contrastive")
            learner.step(torch.stack([gradients[name][0] for name in spaces]).cpu())
            losses.append(loss)
        return learner.alphas(), [*losses, probe.loss(update(), "contrastive")]

    def learner(self, statistics: Tensor) -> Learner:
        """What learns coefficients of weights with these statistics, shape (weights, K, 6)."""
        return Learner(statistics, self.hidden, self.seed, self.rate)


class Learner:
    """The network that gives coefficients, and how it learns.

    Args:
        statistics: of every weight and model, shape (weights, K, 6).
        hidden: width of its hidden layers.
        seed: of its first weights.
        rate: Adam's learning rate.
    """

    def __init__(self, statistics: Tensor, hidden: int, seed: int, rate: float) -> None:
        self._seen = scaled_over_all(statistics)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers = [nn.Linear(6, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
            # In float64: Adam takes as long a step along a gradient that is but rounding errors as along any other.
            self._network = nn.Sequential(*layers, nn.Linear(hidden, 1)).double()
        self._adam = torch.optim.Adam(self._network.parameters(), lr=rate)

    def alphas(self) -> Tensor:
        """The coefficients as they are now, shape (weights, K)."""
        return self._alphas().detach().float()

    def step(self, gradients: Tensor) -> None:
        """Goes down the gradients of a loss by the coefficients, shape (weights, K)."""
        self._adam.zero_grad()
        self._alphas().backward(gradients.double())
        self._adam.step()

    def _alphas(self) -> Tensor:
        return torch.softmax(self._network(self._seen).squeeze(-1), -1)


def taught(probe: AnchorProbe, adapters: Sequence[Adapter]) -> AnchorProbe:
    """Anchors whose images are of the captions that each client's own model finds most probable."""
    targets = torch.zeros(len(probe.captions), len(adapters), dtype=torch.long)
    targets[list(probe.pairs)] = torch.stack([probe.logits(adapter.layers).argmax(1) for adapter in adapters], 1)
    return replace(probe, targets=targets.to(probe.device))
