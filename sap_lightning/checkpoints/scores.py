"""How much every element of what a model has changed matters to a loss, on disk until it is looked at."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from sap_lightning.checkpoints.examples import Examples
from sap_lightning.checkpoints.keys import names_in
from sap_lightning.checkpoints.methods.sap import WholeSAP
from sap_lightning.checkpoints.sources import BLOCK, Rows, Sources, bytes_of
from sap_lightning.console import track
from sap_lightning.errors import InputError
from sap_lightning.functional.saliency import Reduction, term
from sap_lightning.io.weights import SafetensorsFile, Stated, head_of, is_finite, matrix_shape

log = logging.getLogger(__name__)


class Scores:
    """The scores of one model's changes.

    Args:
        path: the file in which `write_scores` wrote them.
    """

    def __init__(self, path: Path) -> None:
        self._file = SafetensorsFile.at(path)

    def rows(self, key: str, rows: Rows) -> Tensor:
        """The scores of some rows of a weight."""
        with self._file.opened() as tensors:
            return tensors.rows(key, *rows)


def write_scores(file: BinaryIO, method: WholeSAP, sources: Sources, index: int, examples: Examples) -> None:
    """Scores what the model of this number has changed of each weight that can be fused.

    The model's weights and their gradients are in memory together.

    Raises:
        InputError: when the model is not of the kind that the examples are for, transformers makes weights of it of
            others, or a score is not finite.
    """
    checkpoint, own = sources.models[index], sources.keys[index]
    model = examples.load(checkpoint.folder)
    keys = [key for key in sources.first.stated if key not in sources.kept]
    names = names_in(model, checkpoint, [own[key] for key in keys])
    gradients, loss = mean_gradients(model, examples, method.reduction)
    del model
    log.info("%s: %s has a mean loss of %.4f", method.name, checkpoint.name, loss)
    file.write(head_of({key: Stated(torch.float32, sources.first.stated[key].shape) for key in keys}))
    for key in track(keys, f"{method.name}: scores"):
        gradient = gradients.get(names.get(own[key], ""))  # a weight that the model does not use has none
        for rows in sources.blocks(key, BLOCK):
            delta = sources.change(index, key, rows).layers[key]
            (score,) = method.score((delta,), (_rows_of(gradient, rows, delta),))
            if not is_finite(score):
                raise InputError(f"{checkpoint.name}: its saliency at {key} is not finite; check the model")
            file.write(bytes_of(score))


def mean_gradients(model: nn.Module, examples: Examples, reduction: Reduction) -> tuple[Mapping[str, Tensor], float]:
    """Each parameter's gradients of the examples' losses, as one, and the mean loss."""
    sums = {parameter: torch.zeros_like(parameter, requires_grad=False) for parameter in model.parameters()}

    def add(parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter) and parameter.grad is not None
        sums[parameter] += term(parameter.grad, reduction)
        parameter.grad = None

    losses = []
    with ExitStack() as hooks:  # which would keep the model alive
        for parameter in model.parameters():
            hooks.callback(parameter.register_post_accumulate_grad_hook(add).remove)
        for loss in examples.losses(model):
            loss.backward()
            losses.append(float(loss.detach()))
    if not losses:
        raise InputError("fuse.texts: no text has a second token, which the first could tell; give longer ones")
    for total in sums.values():
        total /= len(losses)
    every = model.named_parameters(remove_duplicate=False)  # a head that is tied has both names
    return {name: sums[parameter] for name, parameter in every}, sum(losses) / len(losses)


def _rows_of(gradient: Tensor | None, rows: Rows, like: Tensor) -> Tensor:
    if gradient is None:
        return like.new_zeros(like.shape)
    return gradient.view(matrix_shape(gradient.shape))[rows.first : rows.last]
