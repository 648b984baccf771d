"""What a model is shown to find out what of it matters: texts or anchors, its losses on them and their gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sap_lightning.compression.blocks import Blocks
from sap_lightning.compression.low_rank import weight_of
from sap_lightning.errors import InputError
from sap_lightning.functional.saliency import GradientSum, alignment_loss
from sap_lightning.functional.spaces import DeltaSpace
from sap_lightning.functional.triplets import angular_distances, token_cosines
from sap_lightning.models.layers import Hook, hooked
from sap_lightning.models.probe import on_gradient

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Calibration:
    """What a model is shown, and its losses.

    Attributes:
        tower: the model, whose weights are frozen.
        batches: what it is shown.
        losses: of the model on a batch, shape (n,).
        answer: place in a sequence of the token that the model's answer is read from: the last of a text, the first,
            CLIP's class token, of an image.
    """

    tower: nn.Module
    batches: Sequence[Batch]
    losses: Callable[[nn.Module, Batch], Tensor]
    answer: int = -1

    @torch.no_grad()
    def loss(self) -> float:
        """The mean.

        Raises:
            InputError: when it is not finite.
        """
        mean = float(torch.cat([self.losses(self.tower, batch) for batch in self.batches]).double().mean())
        if not math.isfinite(mean):
            raise InputError(
                f"{type(self.tower).__name__}: its loss on what it is shown is {mean}; look for weights that are too"
                " large"
            )
        return mean

    @torch.no_grad()
    def answers(self) -> Tensor:
        """What the model says of the first batch: logits of the next token (n, vocabulary) or features (n, d)."""
        said: list[Any] = []
        with hooked([(self.tower, lambda module, args, output: said.append(output))]):
            self.losses(self.tower, self.batches[0])
        answers: Tensor = said[0].logits[:, -1] if "logits" in said[0] else said[0].image_embeds
        return answers

    @torch.enable_grad()
    def gradients(self, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        """G = ∂L/∂W of the mean loss for the weights of linear layers, shape (d_out, d_in) each, by the same names."""
        sums = {name: GradientSum(DeltaSpace(weight_of(layer)), "mean_then_abs") for name, layer in layers.items()}
        device = next(self.tower.parameters()).device
        with hooked((layer, on_gradient(sums[name].add, device)) for name, layer in layers.items()):
            for batch in self.batches:
                self.losses(self.tower, batch).sum().backward()
        shown = sum(len(batch[0]) for batch in self.batches)
        return {name: total.mean(shown)[0] for name, total in sums.items()}

    def redundancy(self, blocks: Blocks) -> list[float]:
        """How little each block changes: the mean over all tokens of its input's cosine with its output."""
        cosines: list[list[Tensor]] = [[] for _ in blocks]
        self._watch(blocks, lambda number, *states: cosines[number].append(token_cosines(*states)))
        return [float(torch.cat(found).mean()) for found in cosines]

    def angular_distances(self, blocks: Blocks, length: int) -> list[float]:
        """How far every run of so many blocks turns the answer's token, see `angular_distances` of `functional`."""
        states: list[list[Tensor]] = [[] for _ in range(len(blocks.numbers) + 1)]

        def see(number: int, entering: Tensor, leaving: Tensor) -> None:
            states[number].append(entering[:, self.answer])
            if number == len(blocks.numbers) - 1:
                states[-1].append(leaving[:, self.answer])

        self._watch(blocks, see)
        return angular_distances(torch.stack([torch.cat(found) for found in states]), length).tolist()

    @torch.no_grad()
    def _watch(self, blocks: Blocks, see: Callable[[int, Tensor, Tensor], None]) -> None:
        """Shows the model all, and of every block by its place what enters and what leaves it, (n, tokens, d) each."""

        def watch(number: int) -> Hook:
            def on_forward(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                entering = args[0] if args else kwargs["hidden_states"]
                leaving = output[0] if isinstance(output, tuple) else output
                see(number, entering, leaving)

            return on_forward

        with hooked(((block, watch(number)) for number, block in enumerate(blocks)), with_kwargs=True):
            for batch in self.batches:
                self.losses(self.tower, batch)


def next_token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Mean negative log-likelihood of every row's tokens but its first, shape (n,), from token ids (n, length)."""
    (tokens,) = batch
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    return cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)


def caption_losses(tower: nn.Module, batch: Batch) -> Tensor:
    """1 − cos of every image with its caption, shape (n,), from normalised images (n, 3, h, w) and features (n, d)."""
    images, captions = batch
    return alignment_loss(tower(images).image_embeds, captions)
