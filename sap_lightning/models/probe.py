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

from sap_lightning.errors import InputError
from sap_lightning.functional.lora import Update
from sap_lightning.functional.saliency import (
    AnchorLoss,
    GradientSum,
    Reduction,
    alignment_loss,
    caption_margin,
    contrastive_loss,
    entropy_loss,
    symmetric_contrastive_loss,
)
from sap_lightning.functional.spaces import Parameters, Space
from sap_lightning.io.peft_config import in_text_tower
from sap_lightning.models.layers import Hook, hooked
from sap_lightning.models.patched import Patched

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]
T = TypeVar("T")
Memory = dict[tuple[str, str, str], Any]
"""Answers by the anchors' fingerprint, the question and the adapter's sha256."""
LOSS = "loss"
"""The question for the mean alignment loss with an adapter alone."""
MARGIN = "margin"
"""The question for the mean caption margin with an adapter alone."""


class Answer(NamedTuple):
    """What anchors say of a model: a value for every parameter by layer, such as its gradient; and their mean loss."""

    of: Mapping[str, Parameters]
    loss: float


class Recalling:
    """Remembers what it was asked about adapters.

    Attributes:
        memory: what was answered before.
        fingerprint: of what answers.
    """

    memory: Memory
    fingerprint: str

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


@dataclass(frozen=True, eq=False)
class AnchorProbe(Recalling):
    """Puts updates on the towers and looks at the anchors through them; each question is one pass over them.

    Captions go through the text tower anew where an update changes it, else they are looked up.

    Autograd never forms a weight gradient: hooks see each adapted layer's inputs and output gradients, from which
    every space's gradients follow.

    Args:
        patched: the frozen towers, which wear what is asked about.
        batches: this process's batches of normalised images (n, 3, h, w) and of their pairs' numbers.
        captions: normalised caption features of all m pairs by the base, shape (m, d), where the vision tower is.
        logit_scale: the base's inverse temperature.
        precision: the context in which images go through the tower.
        sum_over_processes: adds up a tensor over all processes that look together.
        chosen: numbers of the pairs to look at; all if not given.
        encode: normalised features of the captions of these pairs through the text tower as it is, with gradients.
        images: tells these images from others with the same captions.
        targets: for each pair numbers of captions that InfoNCE takes for its image's, shape (m, n), over which it is
            summed; its own alone if not given.
        memory: what was answered before, to go on with; see ``recall``.
    """

    patched: Patched
    batches: Batches
    captions: Tensor
    logit_scale: float
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext
    sum_over_processes: Callable[[Tensor], Tensor] = lambda tensor: tensor
    chosen: Sequence[int] | None = None
    encode: Callable[[Sequence[int]], Tensor] | None = None
    images: str = ""
    targets: Tensor | None = None
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
    def fingerprint(self) -> str:  # type: ignore[override]  # follows from the rest
        """Tells one set of anchors from another."""
        features = self.captions.detach().float().cpu().numpy().tobytes()
        return hashlib.sha256(features + f"{list(self.pairs)} {self.images}".encode()).hexdigest()

    def halves(self) -> tuple[AnchorProbe, AnchorProbe]:
        """Two probes that share the tower and the memory, and look at every other pair each."""
        return replace(self, chosen=self.pairs[::2]), replace(self, chosen=self.pairs[1::2])

    def weight(self, layer: str) -> Tensor:
        """The present weight of a layer, shape (d_out, d_in), on the CPU."""
        return self.patched.weight(layer).cpu()

    def caption_features(self, pairs: Tensor) -> Tensor:
        """Normalised features of these pairs' captions at what is worn, shape (n, d)."""
        return self._captions(pairs, self.patched.changes_text)

    def _captions(self, pairs: Tensor, anew: bool) -> Tensor:
        if not anew:
            return self.captions[pairs]
        assert self.encode is not None
        return self.encode(pairs.tolist()).float().to(self.device)

    @property
    def _all(self) -> Tensor:
        return torch.arange(len(self.captions), device=self.device)

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
            reduction: how the anchors' gradients become one; ``mean_then_abs`` where the loss is a batch's.
            loss: 1 − cos of a pair, InfoNCE from image to text, the entropy of an image over all captions, or CLIP's
                own of a batch, whose gradients and losses are averaged over the batches.

        Raises:
            InputError: for the loss of a batch where several processes share the batches, or for single anchors'
                gradients of layers of the text tower where every loss looks at all captions.
        """
        self._check_processes(loss)
        text = any(map(in_text_tower, (*update, *spaces)))
        if text and loss in ("contrastive", "entropy") and reduction != "mean_then_abs":
            raise InputError(
                f"prune.loss {loss} with an adapter of the text tower needs prune.reduction mean_then_abs, got"
                f" {reduction}; an anchor's loss looks at all captions"
            )
        self.patched.set_update(update)
        sums = {name: GradientSum(space, reduction) for name, space in spaces.items()}
        total, count = torch.zeros(()), torch.zeros(())
        with self._hooked({name: on_gradient(layer_sum.add, self.device) for name, layer_sum in sums.items()}):
            for images, indices in self._chosen_batches():
                # Every weight is frozen: the images carry the graph.
                features = self._image_features(images.detach().requires_grad_()).float()
                losses = self._losses(features, indices, loss, text)
                losses.sum().backward()
                total += losses.detach().sum().cpu()
                count += len(losses)
        for layer_sum in sums.values():
            layer_sum.sums = tuple(self.sum_over_processes(tensor) for tensor in layer_sum.sums)
        losses_in_all = float(self.sum_over_processes(count))
        gradients = {name: layer_sum.mean(losses_in_all) for name, layer_sum in sums.items()}
        return Answer(gradients, float(self.sum_over_processes(total)) / losses_in_all)

    @torch.inference_mode(False)
    @torch.no_grad()
    def grams(self, update: Mapping[str, Update]) -> dict[str, Tensor]:
        """XᵀX / tokens of the inputs X of every layer that the update changes, shape (d_in, d_in), on the CPU."""
        self.patched.set_update(update)
        # A process that has no anchor gives zeros.
        sums = {name: _GramSum(layer.shape[1], self.device) for name, layer in update.items()}
        with self._hooked({name: gram.on_forward for name, gram in sums.items()}):
            for images, indices in self._chosen_batches():
                self._image_features(images)
                # One by one: what fills up shorter captions of a batch is no input of theirs.
                for index in indices if self.patched.changes_text else ():
                    self.caption_features(index[None])
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

    @torch.inference_mode(False)
    @torch.no_grad()
    def logits(self, update: Mapping[str, Update]) -> Tensor:
        """Logits of every image for all captions at base + update, shape (n, m), on the CPU."""
        features = self.features(update)
        return (self.logit_scale * features @ self.caption_features(self._all).T).cpu()

    @torch.inference_mode(False)
    @torch.no_grad()
    def loss(self, update: Mapping[str, Update], loss: AnchorLoss = "cosine") -> float:
        """Mean loss over the pairs, or over the batches, at base + update."""
        if loss == "contrastive_symmetric":
            return self._batch_loss(update)
        indices = torch.tensor(list(self.pairs), device=self.device)
        features = self.features(update)
        return float(self._losses(features, indices, loss, self.patched.changes_text).mean())

    @torch.inference_mode(False)
    @torch.no_grad()
    def caption_margin(self, update: Mapping[str, Update]) -> float:
        """How much closer an image is to its own caption than to the others, on average, at base + update."""
        features, captions = self.features(update), self.caption_features(self._all)
        return float(caption_margin(features, captions, torch.tensor(list(self.pairs), device=self.device)).mean())

    def _image_features(self, images: Tensor) -> Tensor:
        with self.precision():
            return normalize(self.patched.model(images).image_embeds, dim=-1)

    def _batch_loss(self, update: Mapping[str, Update]) -> float:
        self._check_processes("contrastive_symmetric")
        self.patched.set_update(update)
        losses = [
            self._losses(
                self._image_features(images).float(), indices, "contrastive_symmetric", self.patched.changes_text
            )
            for images, indices in self._chosen_batches()
        ]
        return float(torch.cat(losses).mean())

    def _losses(self, features: Tensor, indices: Tensor, loss: AnchorLoss, text: bool) -> Tensor:
        """A loss for each pair of a batch, or the one of the batch; captions are encoded anew for the text tower."""
        if loss in ("contrastive", "entropy"):
            captions = self._captions(self._all, anew=True) if text else self.captions
            if loss == "entropy":
                return entropy_loss(features, captions, self.logit_scale)
            own = indices[:, None] if self.targets is None else self.targets[indices]
            every = [contrastive_loss(features, captions, one, self.logit_scale) for one in own.unbind(1)]
            return torch.stack(every).sum(0)
        captions = self._captions(indices, text)
        if loss == "contrastive_symmetric":
            return symmetric_contrastive_loss(features, captions, self.logit_scale)[None]
        return alignment_loss(features, captions)

    def _check_processes(self, loss: AnchorLoss) -> None:
        if loss == "contrastive_symmetric" and self.sum_over_processes(torch.ones(())) > 1:
            raise InputError(
                "prune.loss contrastive_symmetric needs the whole of a batch in one process; use --trainer.devices 1"
            )

    def _chosen_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        chosen = torch.tensor(list(self.pairs), device=self.device)
        for images, indices in self.batches():
            looked_at = torch.isin(indices, chosen)
            if looked_at.any():
                yield images[looked_at], indices[looked_at]

    def _hooked(self, hooks: Mapping[str, Hook]) -> ExitStack:
        return hooked((self.patched.layer(name), hook) for name, hook in hooks.items())


class _GramSum:
    def __init__(self, d_in: int, device: torch.device) -> None:
        self.total = torch.zeros(d_in, d_in, device=device)
        self.tokens = 0

    def on_forward(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        x = _by_token(inputs[0]).flatten(0, 1).to(self.total.device)
        self.total += x.T @ x
        self.tokens += len(x)


def on_gradient(add: Callable[[Tensor, Tensor], None], device: torch.device) -> Hook:
    """A forward hook that adds a layer's inputs (n, T, d_in) and, once they are there, its output's gradients."""

    def on_forward(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        x = _by_token(inputs[0].detach()).to(device)
        if not output.requires_grad:  # tokens carry no graph as images do
            output.requires_grad_()
        output.register_hook(lambda gradient: add(x, _by_token(gradient).to(device)))

    return on_forward


def _by_token(tensor: Tensor) -> Tensor:
    """Shape (n, T, d) in float32; the visual projection sees only the class token, (n, d)."""
    return tensor.float().reshape(len(tensor), -1, tensor.shape[-1])
