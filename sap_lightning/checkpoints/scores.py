"""How much every element of what a model has changed matters to a loss, on disk until it is looked at."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from torch import Tensor, nn

from sap_lightning.checkpoints.examples import Examples
from sap_lightning.checkpoints.keys import matched
from sap_lightning.checkpoints.sources import Rows, Sources, bytes_of
from sap_lightning.console import track
from sap_lightning.errors import InputError
from sap_lightning.functional.saliency import Reduction, term
from sap_lightning.io.weights import SafetensorsFile, head_of, matrix_shape
from sap_lightning.merging import SAP

log = logging.getLogger(__name__)
BLOCK = 2**22
"""Elements that are scored at a time."""


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


def write_scores(file: BinaryIO, method: SAP, sources: Sources, index: int, examples: Examples) -> None:
    """Scores what the model of this number has changed of each weight that can be fused.

    The model's weights and one gradient of each are in memory together.

    Raises:
        InputError: when the model is not of the kind that the examples are for, or a score is not finite.
    """
    checkpoint, own = sources.models[index], sources.keys[index]
    gradients = mean_gradients(examples.load(checkpoint.folder), examples, method.reduction)
    names = matched(list(checkpoint.stated), list(gradients))
    keys = [key for key in sources.first.stated if key not in sources.kept]
    file.write(head_of({key: sources.first.stated[key].shape for key in keys}))
    for key in track(keys, f"{method.name}: scores"):
        gradient = gradients.get(names.get(own[key], ""))
        for rows in sources.blocks(key, BLOCK):
            delta = sources.change(index, key, rows).layers[key]
            (score,) = method.score((delta,), (_rows_of(gradient, rows, delta),))
            if not score.isfinite().all():
                raise InputError(f"{checkpoint.name}: its saliency at {key} is not finite; check the model")
            file.write(bytes_of(score))


def mean_gradients(model: nn.Module, examples: Examples, reduction: Reduction) -> Mapping[str, Tensor]:
    """Each parameter's gradients of the examples' losses, as one; none of those that no loss depends on."""
    sums: dict[nn.Parameter, Tensor] = {}

    def add(parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter) and parameter.grad is not None
        gradient, parameter.grad = term(parameter.grad, reduction), None
        sums[parameter] = sums[parameter].add_(gradient) if parameter in sums else gradient

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(add)
    losses = []
    for loss in examples.losses(model):
        loss.backward()
        losses.append(float(loss.detach()))
    if not losses:
        raise InputError("fuse.texts: no text has a second token, which the first could tell; give longer ones")
    log.info("the mean loss of %d examples is %.4f", len(losses), sum(losses) / len(losses))
    for total in sums.values():
        total /= len(losses)
    every = model.named_parameters(remove_duplicate=False)  # a head that is tied has both names
    return {name: sums[parameter] for name, parameter in every if parameter in sums}


def _rows_of(gradient: Tensor | None, rows: Rows, like: Tensor) -> Tensor:
    if gradient is None:
        return like.new_zeros(like.shape)
    return gradient.view(matrix_shape(gradient.shape))[rows.first : rows.last]
