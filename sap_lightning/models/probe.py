"""What the anchors say of the base with an update added to it: gradients, Gram matrices, features, alignment."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from sap_lightning.functional.lora import Update
from sap_lightning.functional.saliency import (
    AnchorLoss,
    GradientSum,
    Reduction,
    alignment_loss,
    contrastive_loss,
    entropy_loss,
)
from sap_lightning.functional.spaces import Parameters, Space
from sap_lightning.models.layers import linear_weight
from sap_lightning.models.patched import Patched

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]
T = TypeVar("T")
Memory = dict[tuple[str, str, str], Any]
"""Answers by the anchors' fingerprint, the question and the adapter's sha256."""
Hook = Callable[[nn.Module, tuple[Tensor], Tensor], None]


class Answer(NamedTuple):
    """What anchors say of a model: a value for every parameter by layer, such as its gradient; and their mean loss."""

    of: Mapping[str, Parameters]
    loss: float


@dataclass(frozen=True, eq=False)
class AnchorProbe:
    """Puts updates on the vision tower and looks at the anchors through it; each question is one pass over them.

    Autograd never forms a weight gradient: hooks see each adapted layer's inputs and output gradients, from which
    every space's gradients follow.

    Args:
        patched: the frozen vision tower, which wears what is asked about.
        batches: this process's batches of normalised images (n, 3, h, w) and of their pairs' numbers.
        captions: normalised caption features of all m pairs, shape (m, d).
        logit_scale: the base's inverse temperature.
        precision: the context in which images go through the tower.
        sum_over_processes: adds up a tensor over all processes that look together.
        chosen: numbers of the pairs to look at; all if not given.
        images: tells these images from others with the same captions.
        memory: what was answered before, to go on with; see ``recall``.
    """

    patched: Patched
    batches: Batches
    captions: Tensor
    logit_scale: float
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext
    sum_over_processes: Callable[[Tensor], Tensor] = lambda tensor: tensor
    chosen: Sequence[int] | None = None
    images: str = ""
    memory: Memory = field(default_factory=dict)

    @cached_property
    def pairs(self) -> Sequence[int]:
        """Numbers of the pairs that are looked at."""
        return range(len(self.captions)) if self.chosen is None else self.chosen

    @property
    def device(self) -> torch.device:
        """Where the tower is; spaces to be scored must be there too."""
        return self.captions.device

    @cached_property
    def fingerprint(self) -> str:
        """Tells one set of anchors from another."""
        features = self.captions.detach().float().cpu().numpy().tobytes()
        return hashlib.sha256(features + f"{list(self.pairs)} {self.images}".encode()).hexdigest()

    def recall(self, question: str, adapter: str, ask: Callable[[], T]) -> T:
        """The answer to a question about an adapter: what was answered before, else asks, and remembers.

        Args:
            question: names what is asked.
            adapter: its sha256.
            ask: gives the answer.
        """
        key = self.fingerprint, question, adapter
        if key not in self.memory:
            self.memory[key] = ask()
        answer: T = self.memory[key]
        return answer

    def halves(self) -> tuple[AnchorProbe, AnchorProbe]:
        """Two probes that share the tower and the memory, and look at every other pair each."""
        return replace(self, chosen=self.pairs[::2]), replace(self, chosen=self.pairs[1::2])

    def weight(self, layer: str) -> Tensor:
        """The tower's present weight of a layer, shape (d_out, d_in), on the CPU."""
        return linear_weight(self.patched.model, layer).cpu()

    # Validation runs in inference mode; gradients need an ordinary one.
    @torch.inference_mode(False)
    @torch.enable_grad()
    def gradients(
        self,
        update: Mapping[str, Update],
        spaces: Mapping[str, Space],
        reduction: Reduction,
        loss: AnchorLoss = "cosine",
    ) -> Answer:
        """∂L/∂θ of every parameter of these spaces at base + update, reduced over the anchors.

        Args:
            update: what the tower wears.
            spaces: each layer, by name, as parameters, on the tower's device.
            reduction: how the anchors' gradients become one.
            loss: 1 − cos of a pair, InfoNCE from image to text, or the entropy of an image over all captions.
        """
        self.patched.set_update(update)
        sums = {name: GradientSum(space, reduction) for name, space in spaces.items()}
        total = torch.zeros(())
        with self._hooked({name: _on_gradient(layer_sum.add) for name, layer_sum in sums.items()}):
            for images, indices in self._chosen_batches():
                # Every weight is frozen: the images carry the graph.
                features = self._image_features(images.detach().requires_grad_()).float()
                losses = self._losses(features, indices, loss)
                losses.sum().backward()
                total += losses.detach().sum().cpu()
        for layer_sum in sums.values():
            layer_sum.sums = tuple(self.sum_over_processes(tensor) for tensor in layer_sum.sums)
        count = len(self.pairs)
        gradients = {name: layer_sum.mean(count) for name, layer_sum in sums.items()}
        return Answer(gradients, float(self.sum_over_processes(total)) / count)

    @torch.inference_mode(False)
    @torch.no_grad()
    def grams(self, update: Mapping[str, Update]) -> dict[str, Tensor]:
        """XᵀX / tokens of the inputs X of every layer that the update changes, shape (d_in, d_in), on the CPU."""
        self.patched.set_update(update)
        # A process that has no anchor gives zeros.
        sums = {name: _GramSum(layer.shape[1], self.device) for name, layer in update.items()}
        with self._hooked({name: gram.on_forward for name, gram in sums.items()}):
            for images, _ in self._chosen_batches():
                self._image_features(images)
        tokens = {name: self.sum_over_processes(torch.tensor(float(gram.tokens))) for name, gram in sums.items()}
        return {name: (self.sum_over_processes(gram.total) / tokens[name]).cpu() for name, gram in sums.items()}

    @torch.inference_mode(False)
    @torch.no_grad()
    def features(self, update: Mapping[str, Update]) -> Tensor:
        """Normalised image features at base + update in the order of the pairs, shape (n, d)."""
        self.patched.set_update(update)
        features = torch.zeros_like(self.captions)
        for images, indices in self._chosen_batches():
            features[indices] = self._image_features(images).float()
        return self.sum_over_processes(features)[list(self.pairs)]

    def logits(self, update: Mapping[str, Update]) -> Tensor:
        """Logits of every image for all captions at base + update, shape (n, m), on the CPU."""
        return (self.logit_scale * self.features(update) @ self.captions.T).cpu()

    def loss(self, update: Mapping[str, Update], loss: AnchorLoss = "cosine") -> float:
        """Mean loss over the pairs at base + update."""
        indices = torch.tensor(list(self.pairs), device=self.device)
        return float(self._losses(self.features(update), indices, loss).mean())

    def _image_features(self, images: Tensor) -> Tensor:
        with self.precision():
            return normalize(self.patched.model(images).image_embeds, dim=-1)

    def _losses(self, features: Tensor, indices: Tensor, loss: AnchorLoss) -> Tensor:
        if loss == "contrastive":
            return contrastive_loss(features, self.captions, indices, self.logit_scale)
        if loss == "entropy":
            return entropy_loss(features, self.captions, self.logit_scale)
        return alignment_loss(features, self.captions[indices])

    def _chosen_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        chosen = torch.tensor(list(self.pairs), device=self.device)
        for images, indices in self.batches():
            looked_at = torch.isin(indices, chosen)
            if looked_at.any():
                yield images[looked_at], indices[looked_at]

    def _hooked(self, hooks: Mapping[str, Hook]) -> ExitStack:
        handles = ExitStack()
        for name, hook in hooks.items():
            handles.callback(self.patched.model.get_submodule(name).register_forward_hook(hook).remove)
        return handles


class _GramSum:
    def __init__(self, d_in: int, device: torch.device) -> None:
        self.total = torch.zeros(d_in, d_in, device=device)
        self.tokens = 0

    def on_forward(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        x = _by_token(inputs[0]).flatten(0, 1)
        self.total += x.T @ x
        self.tokens += len(x)


def _on_gradient(add: Callable[[Tensor, Tensor], None]) -> Hook:
    def on_forward(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        x = _by_token(inputs[0].detach())
        output.register_hook(lambda gradient: add(x, _by_token(gradient)))

    return on_forward


def _by_token(tensor: Tensor) -> Tensor:
    """Shape (n, T, d) in float32; the visual projection sees only the class token, (n, d)."""
    return tensor.float().reshape(len(tensor), -1, tensor.shape[-1])
