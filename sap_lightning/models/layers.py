"""The layers of a model, by name, and what is told of what passes through them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack

from torch import Tensor, nn

Hook = Callable[..., None]
"""Of a module, its inputs, those by name where they are asked for, and its output."""
_BLOCK = re.compile(r"(.+\.layers\.(\d+))\.")


def block_of(layer: str) -> int | None:
    """The number of the transformer block that a layer of a tower is in, from 0; None of one that is in no block."""
    found = _BLOCK.match(layer)
    return int(found[2]) if found else None


def blocks_of(tower: nn.Module, layers: Iterable[str]) -> dict[int, nn.Module]:
    """The transformer blocks of a tower that these layers of it are in, by number."""
    found = filter(None, map(_BLOCK.match, layers))
    return {int(block[2]): tower.get_submodule(block[1]) for block in found}


def layer_shapes(tower: nn.Module) -> dict[str, tuple[int, ...]]:
    """Weight shape (d_out, d_in) of every linear layer of a module, by name."""
    return {name: tuple(layer.weight.shape) for name, layer in tower.named_modules() if isinstance(layer, nn.Linear)}


def linear_weight(model: nn.Module, layer: str) -> Tensor:
    """The weight of a linear layer by its module name, shape (d_out, d_in), to be changed in place."""
    weight = model.get_submodule(layer).weight
    assert isinstance(weight, Tensor)
    return weight.data


def hooked(hooks: Iterable[tuple[nn.Module, Hook]], with_kwargs: bool = False) -> ExitStack:
    """Forward hooks on modules, until it is left."""
    handles = ExitStack()
    for module, hook in hooks:
        handles.callback(module.register_forward_hook(hook, with_kwargs=with_kwargs).remove)
    return handles
