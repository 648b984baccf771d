"""From a frozen tower's image features to a language model's embeddings: connectors for one or several tasks."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sap_lightning.errors import check_at_least, check_choices
from sap_lightning.functional.mixture import Difference, balance_loss, difference_loss, router_z_loss


@dataclass(frozen=True)
class LossWeights:
    """What the losses of connectors count beside that of the answers.

    Args:
        difference: λ0 of the difference between a task's features and a client's own.
        balance: λ1 of a router that uses all tasks' adapters alike; ours, as in Switch Transformer.
        router_z: λ2 of small logits of the router; ours, as in ST-MoE.
        form: of the difference loss.

    Raises:
        InputError: a weight is below 0, or there is no such form.
    """

    difference: float = 0.1
    balance: float = 0.01
    router_z: float = 0.001
    form: Difference = "normalized"

    def __post_init__(self) -> None:
        for name in ("difference", "balance", "router_z"):
            check_at_least(f"model.losses.{name}", getattr(self, name), 0)
        check_choices("model.losses", self)


class Connector(nn.Module, ABC):
    """Makes embeddings of image features, and says what that costs beside the answers.

    Attributes:
        sent: the part that crosses the wire.
    """

    sent: nn.Module

    @abstractmethod
    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings, shape (n, N, C), of image features (n, N, D); and a loss."""

    def kept(self) -> dict[str, Tensor]:
        """What is the client's own and stays at home, by name."""
        received = ("sent.", "others.")
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith(received)}


class SharedConnector(Connector):
    """One connector for all.

    Args:
        start: it starts as a copy of this.
    """

    def __init__(self, start: nn.Module) -> None:
        super().__init__()
        self.sent = copy.deepcopy(start).requires_grad_()

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.sent(features), features.new_zeros(())


class TaskConnector(Connector):
    """Pilot's first stage: x = ψ_t(H) + ψ_s(H), features of the task and of the client, at right angles.

    It starts as the task's alone, since ψ_s ends in zeros.

    Args:
        start: ψ_t starts as a copy of this.
        weights: of the losses.
    """

    def __init__(self, start: nn.Module, weights: LossWeights) -> None:
        super().__init__()
        self.sent = copy.deepcopy(start).requires_grad_()
        self.own = ends_in_zeros(start)
        self._weights = weights

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        task, own = self.sent(features), self.own(features)
        return task + own, self._weights.difference * difference_loss(task, own, self._weights.form)


class MixedConnector(Connector):
    """Pilot's second stage: x = Σ P_i·h_i + ψ_s(H).

    Of the own task h_1 = ψ_1(H), of the others h_i = ψ_i(H) + ψ^c_i(H). The router P = softmax(φ(H)) mixes token by
    token. ψ_i of the others and ψ_s are frozen. It starts as the even mean of what it was given, since φ is zero and
    ψ^c_i end in zeros; how it starts, and that ψ_s stays in the sum, is our reading.

    Args:
        start: ψ_1 of the own task.
        others: ψ_i of the other tasks, by the task's name.
        own: ψ_s of the first stage.
        weights: of the losses.
    """

    def __init__(self, start: nn.Module, others: Mapping[str, nn.Module], own: nn.Module, weights: LossWeights) -> None:
        super().__init__()
        self.sent = copy.deepcopy(start).requires_grad_()
        names = sorted(others)
        self.others = nn.ModuleDict({_key(name): copy.deepcopy(others[name]).requires_grad_(False) for name in names})
        self.corrections = nn.ModuleDict({_key(name): ends_in_zeros(start) for name in names})
        self.own = copy.deepcopy(own).requires_grad_(False)
        self.router = nn.Linear(_first_linear(start).in_features, 1 + len(names))
        nn.init.zeros_(self.router.weight)
        nn.init.zeros_(self.router.bias)
        self._weights = weights

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.router(features)
        shares = logits.softmax(-1)
        of_others = [self.others[name](features) + self.corrections[name](features) for name in self.others]
        experts = torch.stack([self.sent(features), *of_others], -1)
        mixed = (experts * shares[..., None, :]).sum(-1)
        loss = self._weights.balance * balance_loss(shares) + self._weights.router_z * router_z_loss(logits)
        return mixed + self.own(features), loss


def ends_in_zeros(connector: nn.Module) -> nn.Module:
    """A connector of the same layers, drawn anew, which gives 0 until its last one has learned."""
    other = copy.deepcopy(connector)
    layers = [module for module in other.modules() if isinstance(module, nn.Linear)]
    for layer in layers:
        layer.reset_parameters()
    for parameter in layers[-1].parameters():
        nn.init.zeros_(parameter)
    return other.requires_grad_()


def mean_connector(connectors: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """The weighted mean of connectors' tensors, of weights with sum 1, summed in float64."""
    return {
        name: sum(
            (weight * one[name].double() for weight, one in zip(weights, connectors, strict=True)),
            start=torch.zeros((), dtype=torch.float64),
        ).float()
        for name in connectors[0]
    }


def _key(task: str) -> str:
    """A task's name as a module's, which has no dots."""
    return "task_" + task.replace(".", "_dot_")


def _first_linear(connector: nn.Module) -> nn.Linear:
    return next(module for module in connector.modules() if isinstance(module, nn.Linear))
