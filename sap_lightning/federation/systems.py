"""Ways to train instruction models together: whose connector and whose LoRA a client goes on from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from sap_lightning.functional.lora import LoRALayer, stack
from sap_lightning.functional.rounds import brought_down, mean_factors
from sap_lightning.io.adapter import Adapter
from sap_lightning.io.instruction_upload import ReadUpload
from sap_lightning.merging.ata import ATA, aggregation_weights
from sap_lightning.merging.distances import squared_distances
from sap_lightning.modules.connector import mean_connector
from sap_lightning.modules.vlm_lora import Stage

Text = Literal["own", "mean", "exact", "ata"]
Mean = Callable[[Sequence[LoRALayer], Sequence[float]], LoRALayer]
ALL = ""
"""The task of a connector that serves all."""


@dataclass(frozen=True)
class System:
    """One way, by what becomes of the clients' uploads between two turns.

    Attributes:
        first: the connector of the first turn.
        later: that of the turns after it.
        text: a client goes on from its own LoRA, from all clients' mean by samples (A and B apart, as FedIT's, or the
            exact mean of the ΔW in the best LoRA of their rank), or from its own and its neighbours' (Pilot's ATA).
        difference: whether a task's features are kept apart from a client's own.
    """

    first: Stage = "shared"
    later: Stage = "shared"
    text: Text = "mean"
    difference: bool = True

    @property
    def is_alone(self) -> bool:
        """Whether nothing is sent."""
        return self.text == "own"

    @property
    def by_task(self) -> bool:
        """Whether there is a connector for each task, and not one for all."""
        return self.first != "shared"

    def stage(self, number: int) -> Stage:
        """The connector of a turn."""
        return self.first if number == 0 else self.later


SYSTEMS = {
    "local": System(text="own"),
    "fedit": System(),
    "fedit_exact": System(text="exact"),
    "pilot": System("task", "mixed", "ata"),
    "pilot_without_difference": System("task", "mixed", "ata", difference=False),
    "pilot_without_mixture": System("task", "task", "ata"),
    "pilot_with_mean": System("task", "mixed", "mean"),
}
"""Nothing is sent; FedIT with one connector for all (Zhang et al. 2023, arXiv:2305.05644), and with the exact mean of
FlexLoRA (Bai et al. 2024, arXiv:2402.11505); Pilot (Xiong et al. 2025, arXiv:2501.13985), and the paper's ablations."""


@dataclass(frozen=True)
class Server:
    """What a server has for clients that begin a turn.

    Attributes:
        layers: the LoRA that each client goes on from.
        connectors: parameters of each task's connector; where nothing is sent, of each client's.
    """

    layers: Mapping[str, Mapping[str, LoRALayer]] = field(default_factory=dict)
    connectors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)


def aggregated(system: System, server: Server, uploads: Sequence[ReadUpload], tasks: Mapping[str, str]) -> Server:
    """What clients go on from after these uploads; one that has sent nothing has what it had.

    Args:
        system: the way.
        server: what it was before.
        uploads: in any order.
        tasks: of all clients.
    """
    uploads = sorted(uploads, key=lambda one: one.sha256)
    adapters = [one.adapter for one in uploads]
    names = [adapter.name for adapter in adapters]
    rows = [tuple(row) for row in text_weights(system.text, adapters).tolist()]
    mean_of = _exact_mean if system.text == "exact" else mean_factors
    means = {row: _mean_layers(adapters, row, mean_of) for row in dict.fromkeys(rows)}
    layers = {client: means[row] for client, row in zip(names, rows, strict=True)}
    if system.text in ("mean", "exact"):
        layers = dict.fromkeys(tasks, means[rows[0]])
    return Server({**server.layers, **layers}, {**server.connectors, **connectors_of(system, uploads, tasks)})


def _mean_layers(adapters: Sequence[Adapter], weights: Sequence[float], mean_of: Mean) -> dict[str, LoRALayer]:
    return {name: mean_of([one.layers[name] for one in adapters], weights) for name in adapters[0].layers}


def _exact_mean(layers: Sequence[LoRALayer], weights: Sequence[float]) -> LoRALayer:
    return brought_down(stack(layers, weights), layers[0].rank)


def connectors_of(
    system: System, uploads: Sequence[ReadUpload], tasks: Mapping[str, str]
) -> dict[str, Mapping[str, Tensor]]:
    """The mean connector of each task of which there is an upload, of all, or where nothing is sent each client's.

    Args:
        system: the way.
        uploads: sorted, so that their order changes no bit.
        tasks: of all clients.
    """
    if not uploads[0].connector:
        return {}
    if system.is_alone:
        return {one.adapter.name: one.connector for one in uploads}
    of = [tasks[one.adapter.name] if system.by_task else ALL for one in uploads]
    adapters = [one.adapter for one in uploads]
    connectors = [one.connector for one in uploads]
    return {task: mean_connector(connectors, task_weights(task, of, adapters)) for task in sorted(set(of))}


def text_weights(text: Text, adapters: Sequence[Adapter]) -> Tensor:
    """What each client's next LoRA takes of every client's, shape (K, K), of rows with sum 1, float64.

    Args:
        text: the way.
        adapters: the clients' own, each of which says its number of samples.
    """
    samples = torch.tensor([one.num_samples for one in adapters], dtype=torch.float64)
    if text == "own":
        return torch.eye(len(adapters), dtype=torch.float64)
    if text in ("mean", "exact"):
        return (samples / samples.sum()).expand(len(adapters), -1)
    return aggregation_weights(squared_distances(adapters).sqrt(), samples, ATA().neighbours)


def task_weights(task: str, tasks: Sequence[str], adapters: Sequence[Adapter]) -> list[float]:
    """What the connector of a task takes of every client's: by samples, of the clients of that task alone."""
    samples = [float(one.num_samples or 0) * (of == task) for of, one in zip(tasks, adapters, strict=True)]
    return [share / sum(samples) for share in samples]
