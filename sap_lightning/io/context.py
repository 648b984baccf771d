"""The context of class prompts as a layer among others, so that what merges layers merges contexts."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from sap_lightning.functional.lora import LoRALayer

ClassPosition = Literal["front", "middle", "end"]
"""Where in its prompt a class's name stands: before the context, between its halves, or after it."""
_LAYERS: dict[str, ClassPosition] = {
    f"text_model.context.class_{position}": position for position in get_args(ClassPosition)
}


def context_layer(class_position: ClassPosition) -> str:
    """The name of the layer that a context with the class's name there is."""
    return f"text_model.context.class_{class_position}"


def class_position_of(layer: str) -> ClassPosition | None:
    """Where the class's name stands; None for a layer that is no context."""
    return _LAYERS.get(layer)


def as_layer(context: Tensor) -> LoRALayer:
    """A context v, shape (M, width), in factor form: I·v, which is v to the bit."""
    return LoRALayer(A=context, B=torch.eye(len(context)))
