"""What public conversations say of a language model with an update added to it: gradients of their answers' loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from sap_lightning.errors import InputError
from sap_lightning.functional.lora import Update
from sap_lightning.functional.saliency import AnchorLoss, GradientSum, Reduction
from sap_lightning.functional.spaces import Space
from sap_lightning.models.language import answer_losses
from sap_lightning.models.layers import hooked
from sap_lightning.models.patched import Patched
from sap_lightning.models.probe import Answer, Memory, Recalling, on_gradient


class Embedded(NamedTuple):
    """Conversations as a language model reads them.

    Attributes:
        inputs: embeddings of tokens and images, shape (n, length, C).
        attention: shape (n, length).
        labels: shape (n, length); IGNORED where nothing is judged.
    """

    inputs: Tensor
    attention: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class InstructionProbe(Recalling):
    """Puts updates on a language model and looks at public conversations through it.

    A conversation's loss is the mean of −log p over its answers' tokens, and methods that prune ask for its gradients
    as they ask anchors for those of image and caption.

    Args:
        patched: the frozen language model, which wears what is asked about.
        batches: gives the conversations.
        fingerprint: of them and of how they are embedded.
        memory: what was answered before, to go on with.
    """

    patched: Patched
    batches: Callable[[], Iterable[Embedded]]
    fingerprint: str
    memory: Memory = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the language model is; spaces to be scored must be there too."""
        return next(self.patched.model.parameters()).device

    @torch.inference_mode(False)
    @torch.enable_grad()
    def gradients(
        self,
        update: Mapping[str, Update],
        spaces: Mapping[str, Space],
        reduction: Reduction,
        loss: AnchorLoss = "cosine",
    ) -> Answer:
        """∂L/∂θ of every parameter of these spaces at base + update, reduced over the conversations.

        Args:
            update: what the language model wears.
            spaces: each layer, by name, as parameters, on the model's device.
            reduction: how the conversations' gradients become one.
            loss: of a pair of image and caption; conversations have their own in its place.

        Raises:
            InputError: another loss of images and captions is asked for.
        """
        if loss != "cosine":
            raise InputError(f"prune.loss {loss} is of images and captions; conversations have a loss of their own")
        self.patched.set_update(update)
        sums = {name: GradientSum(space, reduction) for name, space in spaces.items()}
        total, count = 0.0, 0
        hooks = {name: on_gradient(layer_sum.add, self.device) for name, layer_sum in sums.items()}
        with hooked((self.patched.layer(name), hook) for name, hook in hooks.items()):
            for batch in self.batches():
                losses = self._losses(batch)
                losses.sum().backward()
                total += float(losses.detach().sum())
                count += len(losses)
        return Answer({name: layer_sum.mean(count) for name, layer_sum in sums.items()}, total / count)

    def _losses(self, batch: Embedded) -> Tensor:
        """The loss of each conversation, shape (n,)."""
        # Every weight is frozen: the embeddings carry the graph.
        inputs = batch.inputs.detach().requires_grad_()
        losses, answered = answer_losses(self.patched.model, inputs, batch.attention, batch.labels)
        return losses.sum(1) / answered.sum(1)
