"""The transformer blocks of a model: found, taken apart, changed in place and dropped."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from sap_lightning.errors import InputError

LINEAR = (nn.Linear, Conv1D)
ATTENTION = ("attn", "attention")
"""What the name of a layer of attention has in it."""


class Blocks:
    """The blocks of a model, each by the number that it has in the model at first.

    Args:
        tower: the model; its longest list of modules, by parameters, is its blocks.

    Attributes:
        name: of the list in the model.
        at_first: how many there were.
        numbers: of the blocks that are there.

    Raises:
        InputError: when it has none.
    """

    def __init__(self, tower: nn.Module) -> None:
        lists = {name: found for name, found in tower.named_modules() if isinstance(found, nn.ModuleList)}
        if not lists:
            raise InputError(f"{type(tower).__name__}: has no list of transformer blocks that could be compressed")
        self.tower = tower
        self.name = max(lists, key=lambda name: sum(weight.numel() for weight in lists[name].parameters()))
        self._modules = dict(enumerate(lists[self.name]))
        self.at_first = len(self._modules)

    @property
    def numbers(self) -> list[int]:
        """Of the blocks that are there, in order."""
        return list(self._modules)

    def __getitem__(self, number: int) -> nn.Module:
        return self._modules[number]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._modules.values())

    def linears(self, number: int) -> dict[str, nn.Module]:
        """The linear layers of a block by their names in it.

        Raises:
            InputError: when it has matrices of another kind, naming the first.
        """
        found = {}
        for name, module in self[number].named_modules():
            if type(module) in LINEAR:
                found[name] = module
            elif others := [weight for weight in module.parameters(recurse=False) if weight.ndim > 1]:
                raise InputError(
                    f"{self.name}.{number}.{name}: {type(module).__name__} with a weight of shape"
                    f" {tuple(others[0].shape)} is no linear layer; only blocks of nn.Linear and Conv1D are compressed"
                )
        return found

    def halves(self, number: int) -> list[dict[str, nn.Module]]:
        """The linear layers of a block by their names in it: those of the MLP, and those of attention."""
        linears = self.linears(number)
        attention = {name: layer for name, layer in linears.items() if any(word in name for word in ATTENTION)}
        mlp = {name: layer for name, layer in linears.items() if name not in attention}
        return [half for half in (mlp, attention) if half]

    def replace(self, number: int, layer: str, module: nn.Module) -> None:
        """Puts a module in the place of one of a block."""
        self[number].set_submodule(layer, module)

    def drop(self, numbers: Collection[int]) -> None:
        """Takes blocks out, so that the next follow on those before."""
        before = self.numbers
        self._modules = {number: block for number, block in self._modules.items() if number not in numbers}
        kept = [place for place, number in enumerate(before) if number in self._modules]
        self.tower.set_submodule(self.name, nn.ModuleList(self))
        for config in {id(one): one for one in map(_config_of, self.tower.modules()) if one is not None}.values():
            config.num_hidden_layers = len(kept)
            vars(config).update(shortened(vars(config), kept, len(before)))


def shortened(config: Mapping[str, Any], kept: Sequence[int], of: int) -> dict[str, list[Any]]:
    """The lists of a config that say something of each of so many layers, for the layers that are kept.

    They are known by their names, such as ``layer_types`` and ``no_rope_layers``, and their lengths.
    """
    lists = {name: value for name, value in config.items() if "layer" in name and isinstance(value, list)}
    return {name: [value[place] for place in kept] for name, value in lists.items() if len(value) == of}


def _config_of(module: nn.Module) -> Any:
    """The config of a model or of a part of one that says how many blocks there are."""
    config = getattr(module, "config", None)
    return config if hasattr(config, "num_hidden_layers") else None
