"""A model that wears an update: base + ΔW, and the base again, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sap_lightning.functional.lora import Update, dense
from sap_lightning.models.layers import linear_weight


class Patched:
    """A model whose linear layers can be base + ΔW.

    Args:
        model: in the base's state; changed in place.

    Attributes:
        update: what it wears; empty for the bare base.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.update: dict[str, Update] = {}
        self._base: dict[str, Tensor] = {}

    @torch.inference_mode(False)
    @torch.no_grad()
    def set_update(self, update: Mapping[str, Update]) -> None:
        """The weights become base + ΔW; an empty update gives the base back."""
        for name, weight in self._base.items():
            linear_weight(self.model, name).copy_(weight)
        self._base = {name: linear_weight(self.model, name).cpu().clone() for name in update}
        for name, layer in update.items():
            weight = linear_weight(self.model, name)
            weight.add_(dense(layer).to(weight.device))
        self.update = dict(update)
