"""A model that wears an update: base + ΔW or a context of prompts, and the base again, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sap_lightning.functional.lora import Update, dense
from sap_lightning.io.context import class_position_of
from sap_lightning.io.peft_config import in_text_tower
from sap_lightning.models.layers import linear_weight


class Patched:
    """A model whose linear layers can be base + ΔW.

    Args:
        model: CLIP's vision tower or a language model, in the base's state; changed in place.
        text: CLIP's text tower, likewise; without it no update may change that.

    Attributes:
        update: what it wears; empty for the bare base.
        text_version: tells one state of the text tower from another.
    """

    def __init__(self, model: nn.Module, text: nn.Module | None = None) -> None:
        self.model = model
        self.text = text
        self.update: dict[str, Update] = {}
        self.text_version = 0
        self._base: dict[str, Tensor] = {}

    @property
    def changes_text(self) -> bool:
        """Whether what it wears changes the text tower."""
        return any(map(in_text_tower, self.update))

    @torch.inference_mode(False)
    @torch.no_grad()
    def set_update(self, update: Mapping[str, Update]) -> None:
        """The weights become base + ΔW; an empty update gives the base back.

        A context is no weight of the towers: whoever writes class prompts finds it in the update.
        """
        if self.changes_text or any(map(in_text_tower, update)):
            self.text_version += 1
        for name, weight in self._base.items():
            self.weight(name).copy_(weight)
        weights = {name: layer for name, layer in update.items() if class_position_of(name) is None}
        self._base = {name: self.weight(name).cpu().clone() for name in weights}
        for name, layer in weights.items():
            weight = self.weight(name)
            weight.add_(dense(layer).to(weight.device))
        self.update = dict(update)

    @contextmanager
    def with_base_text(self) -> Iterator[None]:
        """Gives the text tower its base back for a while."""
        update = self.update
        if not self.changes_text:
            yield
            return
        self.set_update({})
        try:
            yield
        finally:
            self.set_update(update)

    def layer(self, name: str) -> nn.Module:
        """The linear layer of that name."""
        return self._tower(name).get_submodule(name)

    def weight(self, name: str) -> Tensor:
        """Its present weight, shape (d_out, d_in), to be changed in place."""
        return linear_weight(self._tower(name), name)

    def _tower(self, name: str) -> nn.Module:
        return self.text if self.text is not None and in_text_tower(name) else self.model
