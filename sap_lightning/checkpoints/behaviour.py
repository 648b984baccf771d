"""How a transformer behaves: what its blocks read, compute and write, as far as they are built as Llama's or CLIP's."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sap_lightning.checkpoints.activations import Activity, Responses, watched
from sap_lightning.checkpoints.examples import Examples
from sap_lightning.errors import InputError
from sap_lightning.io.peft_config import in_text_tower

SPACES = {
    "self_attn.q_proj": ("queries", "stream"),
    "self_attn.k_proj": ("keys", "stream"),
    "self_attn.v_proj": ("values", "stream"),
    "self_attn.o_proj": ("stream", "heads"),
    "self_attn.out_proj": ("stream", "heads"),
    "mlp.gate_proj": ("hidden", "stream"),
    "mlp.up_proj": ("hidden", "stream"),
    "mlp.down_proj": ("stream", "hidden"),
    "mlp.fc1": ("hidden", "stream"),
    "mlp.fc2": ("stream", "hidden"),
}
"""The spaces of a layer's outputs and inputs by its name in a block. Layers of one space share its dimensions: the
stream is that of all blocks, the others are a block's own."""
READ = ("self_attn.q_proj", "mlp.fc1", "mlp.gate_proj")
"""Layers whose inputs are what a block reads of the stream."""
_LAYER = re.compile(rf"(?P<blocks>.*?)(?P<number>\d+)\.(?P<role>{'|'.join(map(re.escape, SPACES))})")


@dataclass(frozen=True)
class Heads:
    """How attention is divided.

    Attributes:
        queries: heads.
        values: heads of keys and values, each of which serves as many of the queries.
        turned: whether queries and keys are turned by their position (RoPE), which their dimensions decide.
    """

    queries: int
    values: int
    turned: bool


@dataclass(frozen=True)
class Behaviour:
    """What a model made of examples.

    Attributes:
        layers: names of the layers of each block by what they are called in it.
        heads: how attention is divided.
        responses: of the layers by name.
    """

    layers: Sequence[Mapping[str, str]]
    heads: Heads
    responses: Responses

    @classmethod
    def of(cls, model: Any, examples: Examples, name: str) -> Behaviour:
        """Shows a model the examples; of a CLIP model only the vision tower counts.

        Raises:
            InputError: when it has no blocks as Llama's or CLIP's.
        """
        responses = Responses()
        with watched(model, responses):
            examples.show(model)
        found: dict[int, dict[str, str]] = defaultdict(dict)
        for layer in responses.positions:
            if (part := _LAYER.fullmatch(layer)) and not in_text_tower(layer):
                found[int(part["number"])][part["role"]] = layer
        blocks = [found[number] for number in sorted(found)]
        if not blocks or any(len({space for role in block for space in SPACES[role]}) < 6 for block in blocks):
            raise InputError(
                f"{name}: its blocks have no layers {', '.join(SPACES)}, by which neurons are known; give a model whose"
                " blocks are as Llama's or CLIP's"
            )
        return cls(blocks, _heads_of(model.config), responses)


def _heads_of(config: Any) -> Heads:
    inner = getattr(config, "vision_config", config)
    queries = inner.num_attention_heads
    values = getattr(inner, "num_key_value_heads", None) or queries
    return Heads(queries, values, getattr(inner, "rope_parameters", None) is not None)


def activities(behaviours: Sequence[Behaviour]) -> list[list[dict[str, Activity]]]:
    """Of each model, block and layer what went in and came out, at the same positions of the same examples.

    Where models divide an example into other positions, as towers of other patches do, it is in fields of the image.
    """
    first, *others = ({tuple(one) for one in behaviour.responses.positions.values()} for behaviour in behaviours)
    alike = all(one == first for one in others)
    found = []
    for behaviour in behaviours:
        by_layer = behaviour.responses.at_positions() if alike else behaviour.responses.by_fields()
        found.append([{role: by_layer[layer] for role, layer in block.items()} for block in behaviour.layers])
    return found


def responses_of(space: str, block: Mapping[str, Activity]) -> Tensor:
    """What the dimensions of a block's space said: what came out of the layers that make it, or else went in."""
    if space in ("heads", "hidden"):
        return next(one.inputs for role, one in block.items() if SPACES[role][1] == space)
    return next(one.outputs for role, one in block.items() if SPACES[role][0] == space)


def read_by(block: Mapping[str, Activity]) -> list[Tensor]:
    """What a block reads of the stream, before its attention and before its MLP."""
    return [one.inputs for role, one in block.items() if role in READ]
