"""StatsMerging of whole models (Merugu et al. 2025, arXiv:2506.04567)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sap_lightning.checkpoints.examples import Examples
from sap_lightning.checkpoints.keys import names_in
from sap_lightning.checkpoints.method import Seen, WholeMethod
from sap_lightning.checkpoints.sources import Part, Sources
from sap_lightning.console import track
from sap_lightning.functional.consensus import weighted_sum
from sap_lightning.functional.lora import dense
from sap_lightning.functional.weight_statistics import weight_statistics
from sap_lightning.merging.stats_merging import Learner, StatsMerging

ALPHAS = "alphas."
"""What stands before a weight's key in what was seen."""


@dataclass(frozen=True)
class WholeStatsMerging(StatsMerging, WholeMethod):
    """W_C + Σ α_k·(W_k − W_C), weight by weight, with coefficients α of sum 1 that a small network learns.

    It is `merging.StatsMerging` for whole models: the network sees statistics of the models' weights, and the fused
    model is to say at unlabelled examples what each model itself says there. One example is looked at in a step, in
    turn, and steps are few, as 500 of a language model take hours on a CPU.

    Args:
        steps: of Adam, an example each.
        rate: Adam's learning rate.
        hidden: width of the network's two hidden layers.
        seed: of the network's first weights.
    """

    name = "stats_merging"
    needs_base = True
    most_models = None

    steps: int = 32
    rate: float = 0.01
    hidden: int = 16
    seed: int = 0

    def look(self, sources: Sources, examples: Examples) -> Seen:
        answers = [_answers(examples, one.folder) for one in sources.models]
        model = examples.load(sources.first.folder)
        keys = [key for key in sources.first.stated if key not in sources.kept]
        parameters = dict(model.named_parameters())  # of tied ones the first
        found = names_in(model, sources.first, keys)
        names = {key: name for key, name in found.items() if name in parameters}
        parts = {key: sources.whole(key) for key in track(list(names), f"{self.name}: weights")}
        learner = self.learner(torch.stack([_statistics(part) for part in parts.values()]))
        mixture = Mixture(model, {names[key]: part for key, part in parts.items()})
        alphas, losses = self._learned(mixture, learner, answers, examples)
        return {"losses": losses, **{f"{ALPHAS}{key}": alpha for key, alpha in zip(parts, alphas, strict=True)}}

    @torch.enable_grad()
    def _learned(
        self, mixture: Mixture, learner: Learner, answers: Sequence[Sequence[Tensor]], examples: Examples
    ) -> tuple[Tensor, Tensor]:
        """α of each weight and model, shape (weights, K), and the loss before every step."""
        losses = []
        for number in track(list(islice(cycle(range(len(examples))), self.steps)), f"{self.name}: steps"):
            mixture.take_on(learner.alphas())
            logits = examples.logits(mixture.model, number)
            loss = torch.stack([cross_entropy(logits, of_one[number]) for of_one in answers]).sum()
            learner.step(mixture.gradients(loss))
            losses.append(float(loss.detach()))
        return learner.alphas(), torch.tensor(losses)

    def kept(self, sources: Sources, seen: Seen) -> dict[str, str]:
        left = (key for key in sources.first.stated if f"{ALPHAS}{key}" not in seen)
        return dict.fromkeys(left, f"{self.name} leaves it") | sources.kept

    def fused(self, key: str, part: Part, seen: Seen) -> Tensor:
        return _mixed(part, seen[f"{ALPHAS}{key}"])

    def findings(self, seen: Seen) -> dict[str, Any]:
        alphas = torch.stack([alpha for name, alpha in seen.items() if name.startswith(ALPHAS)])
        return {"mean_alphas": alphas.mean(0).tolist(), "losses": seen["losses"].tolist()}


class Mixture:
    """A model whose weights are mixed from others'.

    Args:
        model: wears the mixture.
        parts: by the names of its parameters, the weights of the base and of the others.
    """

    def __init__(self, model: nn.Module, parts: Mapping[str, Part]) -> None:
        self.model = model
        self._parts = list(parts.values())
        self._weights = [model.get_parameter(name).requires_grad_() for name in parts]

    @torch.no_grad()
    def take_on(self, alphas: Tensor) -> None:
        """Takes on the mixture with these coefficients, shape (weights, K)."""
        for weight, part, alpha in zip(self._weights, self._parts, alphas, strict=True):
            weight.copy_(_mixed(part, alpha).view(weight.shape))

    def gradients(self, loss: Tensor) -> Tensor:
        """∂L/∂α_k = ⟨∂L/∂W, W_k − W_C⟩ of every weight and model, shape (weights, K)."""
        by_weight = torch.autograd.grad(loss, self._weights, allow_unused=True, materialize_grads=True)
        return torch.stack(
            [
                torch.stack([(gradient.view(delta.shape) * delta).sum() for delta in _deltas(part)])
                for gradient, part in zip(by_weight, self._parts, strict=True)
            ]
        )


def _deltas(part: Part) -> list[Tensor]:
    return [delta for change in part.changes for delta in change.layers.values()]


def _mixed(part: Part, alpha: Tensor) -> Tensor:
    return part.base + dense(weighted_sum(_deltas(part), alpha.tolist()))


@torch.no_grad()
def _answers(examples: Examples, folder: Path) -> list[Tensor]:
    """What a model finds most probable, at each position of each example."""
    model = examples.load(folder)
    return [examples.logits(model, number).argmax(-1) for number in range(len(examples))]


def _statistics(part: Part) -> Tensor:
    """Those of every model's weight, shape (K, 6)."""
    return torch.stack([weight_statistics(change.stored.float()) for change in part.changes])
