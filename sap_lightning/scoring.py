"""Saliency of an adapter from one forward and backward pass over the anchors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sap_lightning.functional.saliency import Reduction, SaliencySum, alignment_loss
from sap_lightning.functional.spaces import Parameters, Space


class AnchorScores(NamedTuple):
    """What the anchors say of an adapter: a saliency for every parameter, and the mean alignment loss."""

    saliency: dict[str, Parameters]
    loss: float


def score(
    tower: nn.Module,
    image_features: Callable[[Tensor], Tensor],
    spaces: Mapping[str, Space],
    anchors: Iterable[tuple[Tensor, Tensor]],
    reduction: Reduction,
    sum_over_processes: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> AnchorScores:
    """Runs the anchors through a tower that wears the adapter (weights W + ΔW, frozen) and gathers saliency.

    Autograd never forms a weight gradient: hooks see each adapted layer's inputs and output gradients, from which
    every space's gradients follow.

    Args:
        tower: the vision tower with the adapter added to its weights.
        image_features: normalised images (n, 3, h, w) to features (n, d) through that tower.
        spaces: each adapted layer, by name, as parameters to be scored, on the tower's device.
        anchors: batches of images (n, 3, h, w) and caption features (n, d); this process's share of them.
        reduction: how the anchors' gradients become one score.
        sum_over_processes: adds up a tensor over all processes that score together.
    """
    sums = {name: SaliencySum(space, reduction) for name, space in spaces.items()}
    loss = torch.zeros(2)
    with ExitStack() as hooks:
        for name, layer_sum in sums.items():
            hooks.callback(tower.get_submodule(name).register_forward_hook(_gather(layer_sum)).remove)
        for images, captions in anchors:
            # Every weight is frozen: the images carry the graph.
            losses = alignment_loss(image_features(images.detach().requires_grad_()).float(), captions)
            losses.sum().backward()
            loss += torch.tensor([losses.sum().item(), len(losses)])
    total, count = sum_over_processes(loss).tolist()
    for layer_sum in sums.values():
        layer_sum.sums = tuple(sum_over_processes(tensor) for tensor in layer_sum.sums)
    return AnchorScores({name: layer_sum.scores(count) for name, layer_sum in sums.items()}, total / count)


def _gather(layer_sum: SaliencySum) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
    def on_forward(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        x = _by_token(inputs[0].detach())
        output.register_hook(lambda gradient: layer_sum.add(x, _by_token(gradient)))

    return on_forward


def _by_token(tensor: Tensor) -> Tensor:
    """Shape (n, T, d) in float32; the visual projection sees only the class token, (n, d)."""
    return tensor.float().reshape(len(tensor), -1, tensor.shape[-1])
