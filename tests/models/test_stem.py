"""The first layers of the shipped tower, gone through once."""

from __future__ import annotations

import pytest
import torch
from places import SHAPES_CLIP
from references import randn
from transformers import CLIPVisionModelWithProjection

from sap_lightning.models.clip import load_base
from sap_lightning.models.layers import linear_weight
from sap_lightning.models.stem import StemCache, encoder_layers, first_changed

LAYER = "vision_model.encoder.layers.{}.self_attn.q_proj"


@pytest.fixture
def tower() -> CLIPVisionModelWithProjection:
    """The shipped checkpoint's, to be changed."""
    return load_base(SHAPES_CLIP).tower


def pixels(seed: int) -> torch.Tensor:
    return randn(seed, 3, 3, 64, 64)


def test_the_first_changed_layer_is_the_lowest_in_number(tower: CLIPVisionModelWithProjection) -> None:
    depth = len(tower.vision_model.encoder.layers)
    assert len(encoder_layers(tower)) == depth
    assert first_changed(tower, [LAYER.format(3), LAYER.format(2), "visual_projection"]) == 2
    assert first_changed(tower, [LAYER.format(10), LAYER.format(9)]) == 9, "numbers, not texts"
    assert first_changed(tower, ["visual_projection"]) == first_changed(tower, []) == depth


@pytest.mark.parametrize("first", [1, 2, 3])
@torch.no_grad()
def test_a_stem_that_is_gone_through_once_gives_the_same_bits(tower: CLIPVisionModelWithProjection, first: int) -> None:
    cache = StemCache(tower, first)
    batches = [pixels(seed) for seed in range(2)]
    for _ in range(2):
        for number, images in enumerate(batches):
            assert torch.equal(cache.embed(number, images), tower(images).image_embeds)
    before = tower(batches[0]).image_embeds
    linear_weight(tower, LAYER.format(first)).mul_(1.5)
    linear_weight(tower, "visual_projection").add_(0.01)
    changed = tower(batches[0]).image_embeds
    assert not torch.equal(changed, before)
    assert torch.equal(cache.embed(0, batches[0]), changed), "weights from that layer on count"


@torch.no_grad()
def test_a_stem_is_not_gone_through_again_and_leaves_the_tower_as_it_was(tower: CLIPVisionModelWithProjection) -> None:
    names = [name for name, _ in tower.named_modules()]
    calls: list[int] = []
    tower.vision_model.encoder.layers[0].register_forward_hook(lambda *_: calls.append(1))
    cache = StemCache(tower, 2)
    first, other = pixels(0), pixels(1)
    expected = cache.embed(0, first)
    assert torch.equal(cache.embed(0, other), expected), "a batch is known by its number"
    assert len(calls) == 1
    assert not torch.equal(cache.embed(1, other), expected)
    assert len(calls) == 2
    assert [name for name, _ in tower.named_modules()] == names
    assert not any(layer._forward_pre_hooks for layer in tower.vision_model.encoder.layers)
