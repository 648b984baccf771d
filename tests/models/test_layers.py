"""The linear layers of CLIP's tower, by name."""

from __future__ import annotations

from copy import deepcopy

import torch
from places import SHAPES_CLIP
from probes import tower
from torch import nn

from sap_lightning.models.clip import load_base
from sap_lightning.models.layers import block_of, blocks_of, layer_shapes, linear_weight


def test_the_shapes_are_those_of_every_linear_layer() -> None:
    shapes = layer_shapes(tower())
    layer = "vision_model.encoder.layers.1"
    expected = {f"{layer}.self_attn.{part}_proj": (32, 32) for part in ("q", "k", "v", "out")}
    expected |= {f"{layer}.mlp.fc1": (64, 32), f"{layer}.mlp.fc2": (32, 64), "visual_projection": (16, 32)}
    assert expected.items() <= shapes.items()
    assert len(shapes) == 2 * 6 + 1, "the patch embedding and the norms are no linear layers"


def test_a_linear_weight_is_changed_in_place() -> None:
    changed = deepcopy(tower())
    linear_weight(changed, "visual_projection").zero_()
    assert not changed.visual_projection.weight.any()
    assert tower().visual_projection.weight.any()


def test_a_linear_weight_of_a_trainable_model_is_changed_beside_its_graph() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    linear_weight(model, "0").fill_(2.0)
    assert model[0].weight.requires_grad and torch.equal(model[0].weight, torch.full((2, 3), 2.0))


def test_the_block_of_a_layer_is_the_last_numbered_one_in_its_name():
    tower = load_base(SHAPES_CLIP).tower
    layers = list(layer_shapes(tower))
    assert {block_of(layer) for layer in layers} == {None, 0, 1, 2, 3}
    assert [layer for layer in layers if block_of(layer) is None] == ["visual_projection"]
    assert block_of("tower.base_model.model.vision_model.encoder.layers.11.mlp.fc1.lora_A.default.weight") == 11
    blocks = blocks_of(tower, [layer for layer in layers if "layers.2" in layer or "visual" in layer])
    assert blocks == {2: tower.vision_model.encoder.layers[2]}
