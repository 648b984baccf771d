"""What goes into the linear layers of a model and what comes out of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sap_lightning.functional.matching import in_fields
from sap_lightning.models.layers import hooked

Look = Callable[[str, Tensor, Tensor], None]
"""Is told a layer's name, its inputs (n, d_in) and its outputs (n, d_out), n positions at a time."""
MOST_POSITIONS = 16
"""Of an example that are kept one by one."""


def watched(model: nn.Module, look: Look) -> ExitStack:
    """Has a look at every linear layer of a model, whenever something passes through it, until it is left."""
    linear = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear))
    return hooked((layer, partial(_told, look, name)) for name, layer in linear)


def _told(look: Look, name: str, _: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
    look(name, given[0].flatten(0, -2), made.flatten(0, -2))


class Means:
    """Mean inputs and outputs of layers over all positions that they are told of."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}
        self._positions: dict[str, int] = {}

    def __call__(self, layer: str, inputs: Tensor, outputs: Tensor) -> None:
        new = inputs.double().sum(0), outputs.double().sum(0)
        old = self._sums.get(layer)
        self._sums[layer] = new if old is None else (old[0] + new[0], old[1] + new[1])
        self._positions[layer] = self._positions.get(layer, 0) + len(inputs)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """X̄ of each layer by name, shape (d_in,)."""
        return {layer: (given / self._positions[layer]).float() for layer, (given, _) in self._sums.items()}

    @property
    def outputs(self) -> dict[str, Tensor]:
        """Ȳ of each layer by name, shape (d_out,)."""
        return {layer: (made / self._positions[layer]).float() for layer, (_, made) in self._sums.items()}


class Activity(NamedTuple):
    """What a layer was given and what it made of that, at positions of the examples.

    Attributes:
        inputs: shape (n, d_in).
        outputs: shape (n, d_out).
    """

    inputs: Tensor
    outputs: Tensor


class Responses:
    """Inputs and outputs of layers at some positions of every example, and in fields of it.

    Attributes:
        positions: of each layer how many positions every example had.
    """

    def __init__(self) -> None:
        self.positions: dict[str, list[int]] = defaultdict(list)
        self._spread: dict[str, list[Activity]] = defaultdict(list)
        self._fields: dict[str, list[Activity]] = defaultdict(list)

    def __call__(self, layer: str, inputs: Tensor, outputs: Tensor) -> None:
        spread = torch.linspace(0, len(inputs) - 1, min(len(inputs), MOST_POSITIONS)).long()
        self.positions[layer].append(len(inputs))
        self._spread[layer].append(Activity(inputs[spread].clone(), outputs[spread].clone()))
        self._fields[layer].append(Activity(in_fields(inputs), in_fields(outputs)))

    def at_positions(self) -> dict[str, Activity]:
        """Each layer's at no more than `MOST_POSITIONS` of every example."""
        return {layer: Activity(*map(torch.cat, zip(*parts, strict=True))) for layer, parts in self._spread.items()}

    def by_fields(self) -> dict[str, Activity]:
        """Each layer's in `in_fields` of every example."""
        return {layer: Activity(*map(torch.cat, zip(*parts, strict=True))) for layer, parts in self._fields.items()}
