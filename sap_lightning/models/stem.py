"""The first layers of a vision tower, gone through once where nothing in them changes."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor, nn


def first_changed(tower: nn.Module, layers: Iterable[str]) -> int:
    """Number of the first encoder layer that these linear layers are in; the depth of the tower when in none."""
    found = [re.search(r"^vision_model\.encoder\.layers\.(\d+)\.", name) for name in layers]
    return min((int(number[1]) for number in found if number), default=len(encoder_layers(tower)))


def encoder_layers(tower: nn.Module) -> nn.ModuleList:
    """The encoder layers of a vision tower."""
    vision: Any = tower.vision_model
    return cast(nn.ModuleList, vision.encoder.layers)


class StemCache:
    """Features of batches whose way through the tower before one encoder layer is gone once only.

    Both ways share the tower's modules, so weights that change from that layer on count.

    Args:
        tower: a vision tower whose weights before the layer stay as they are.
        first: number of that encoder layer.
    """

    def __init__(self, tower: nn.Module, first: int) -> None:
        self.tower = tower
        self.first = first
        self.hidden: dict[int, Tensor] = {}
        self._rest = _without_stem(tower, first)

    def embed(self, batch: int, images: Tensor) -> Tensor:
        """The tower's output features, shape (n, d), of batch number ``batch``; its images (n, 3, h, w)."""
        if batch in self.hidden:
            return self._rest(self.hidden[batch]).image_embeds

        def remember(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.hidden[batch] = inputs[0]

        with encoder_layers(self.tower)[self.first].register_forward_pre_hook(remember):
            return self.tower(images).image_embeds


class _AsTheyAre(nn.Module):
    """Stands where the embeddings were: hidden states come in and go out."""

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        return hidden


def _without_stem(tower: nn.Module, first: int) -> nn.Module:
    vision: Any = tower.vision_model
    encoder = _with_modules(vision.encoder, layers=encoder_layers(tower)[first:])
    vision = _with_modules(vision, embeddings=_AsTheyAre(), pre_layrnorm=nn.Identity(), encoder=encoder)
    return _with_modules(tower, vision_model=vision)


def _with_modules(module: nn.Module, **others: nn.Module) -> nn.Module:
    """The same module with some of its parts exchanged; the given one keeps its own."""
    changed = copy.copy(module)
    changed._modules = {**module._modules, **others}
    return changed
