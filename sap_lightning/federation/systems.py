"""Ways to train instruction models together: whose connector and whose LoRA a client goes on from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.ata import ATA, aggregation_weights
from sap_lightning.merging.distances import squared_distances
from sap_lightning.modules.vlm_lora import Stage

Text = Literal["own", "mean", "ata"]


@dataclass(frozen=True)
class System:
    """One way, by what becomes of the clients' uploads between two turns.

    Attributes:
        first: the connector of the first turn.
        later: that of the turns after it.
        text: a client goes on from its own LoRA, from all clients' mean by samples (A and B apart, FedIT), or from its
            own and its neighbours' (Pilot's ATA).
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
    "pilot": System("task", "mixed", "ata"),
    "pilot_without_difference": System("task", "mixed", "ata", difference=False),
    "pilot_without_mixture": System("task", "task", "ata"),
    "pilot_with_mean": System("task", "mixed", "mean"),
}
"""Nothing is sent; FedIT with one connector for all (Zhang et al. 2023, arXiv:2305.05644); Pilot (Xiong et al. 2025,
arXiv:2501.13985), and the paper's ablations of it."""


def text_weights(text: Text, adapters: Sequence[Adapter]) -> Tensor:
    """What each client's next LoRA takes of every client's, shape (K, K), of rows with sum 1, float64.

    Args:
        text: the way.
        adapters: the clients' own, each of which says its number of samples.
    """
    samples = torch.tensor([one.num_samples for one in adapters], dtype=torch.float64)
    if text == "own":
        return torch.eye(len(adapters), dtype=torch.float64)
    if text == "mean":
        return (samples / samples.sum()).expand(len(adapters), -1)
    return aggregation_weights(squared_distances(adapters).sqrt(), samples, ATA().neighbours)


def task_weights(task: str, tasks: Sequence[str], adapters: Sequence[Adapter]) -> list[float]:
    """What the connector of a task takes of every client's: by samples, of the clients of that task alone."""
    samples = [float(one.num_samples or 0) * (of == task) for of, one in zip(tasks, adapters, strict=True)]
    return [share / sum(samples) for share in samples]
