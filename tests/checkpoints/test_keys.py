"""Keys of one model found in another that calls its weights otherwise."""

from __future__ import annotations

import pytest
from llamas import llama
from transformers import CLIPConfig, CLIPModel

from sap_lightning.checkpoints.keys import matched

KEYS = list(llama().state_dict())


@pytest.mark.parametrize("prefix", ["", "language_model.", "base.language_model."])
def test_keys_are_found_behind_another_prefix(prefix: str) -> None:
    others = [prefix + key for key in KEYS]
    assert matched(KEYS, others) == {key: prefix + key for key in KEYS}
    assert matched(others, KEYS) == {prefix + key: key for key in KEYS}


def test_a_model_without_head_has_the_rest() -> None:
    bare = [key.removeprefix("model.") for key in KEYS if key.startswith("model.")]
    assert matched(KEYS, bare) == {f"model.{key}": key for key in bare}


def test_two_towers_whose_blocks_are_called_alike_are_told_apart() -> None:
    tower = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    clip = CLIPModel(CLIPConfig(text_config=tower, vision_config=tower))
    keys = list(clip.state_dict())
    assert matched(keys, [f"clip.{key}" for key in keys]) == {key: f"clip.{key}" for key in keys}
    vision = [key.removeprefix("vision_model.") for key in keys if key.startswith("vision_model.")]
    found = matched(vision, keys)
    assert {key for key in vision if key not in found} == set()
    assert all(found[key] == f"vision_model.{key}" for key in vision if "post_layernorm" in key)


def test_strangers_have_nothing_in_common() -> None:
    assert matched(KEYS, ["encoder.layer.0.attention.weight", "pooler.weight"]) == {}
