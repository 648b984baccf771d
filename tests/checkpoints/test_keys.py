"""Keys of one model found in another that calls its weights otherwise."""

from __future__ import annotations

import pytest
from llamas import llama
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

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


TOWER = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 8}


def t5(layers: int) -> T5Config:
    return T5Config(vocab_size=5, d_model=8, d_kv=4, d_ff=8, num_layers=layers, num_decoder_layers=3, num_heads=2)


def clip_and_tower() -> list[nn.Module]:
    return [
        CLIPModel(CLIPConfig(text_config=TOWER, vision_config=TOWER)),
        CLIPVisionModelWithProjection(CLIPVisionConfig(**TOWER)),
    ]


def siglip_and_tower() -> list[nn.Module]:
    whole = SiglipModel(SiglipConfig(text_config=TOWER, vision_config=TOWER))
    return [whole, SiglipVisionModel(SiglipVisionConfig(**TOWER))]


@pytest.mark.parametrize(
    "both",
    [
        lambda: [T5ForConditionalGeneration(t5(2)), T5EncoderModel(t5(2))],
        lambda: [T5ForConditionalGeneration(t5(2)), T5EncoderModel(t5(3))],  # whose third block only the decoder has
        clip_and_tower,
        siglip_and_tower,
    ],
    ids=["T5", "T5, deeper", "CLIP", "SigLIP"],
)
def test_a_tower_that_the_other_model_lacks_does_not_stand_for_the_one_it_has(both) -> None:
    keys, others = (list(model.state_dict()) for model in both())
    prefix = "" if others[0] in keys else "vision_model."
    expected = {prefix + other: other for other in others if prefix + other in keys}
    assert matched(keys, others) == expected and len(expected) > 15
    assert matched(others, keys) == {other: key for key, other in expected.items()}


def test_of_two_towers_that_are_alike_neither_stands_for_the_other_model_s() -> None:
    tower = [f"layers.{number}.weight" for number in range(3)]
    keys = [f"{name}.{key}" for name in ("one", "two") for key in tower]
    assert matched([*keys, "head"], [*tower, "head"]) == {"head": "head"}
    assert matched([*keys, "two.norm"], [*tower, "norm"]) == {f"two.{key}": key for key in [*tower, "norm"]}


def test_strangers_have_nothing_in_common() -> None:
    assert matched(KEYS, ["encoder.layer.0.attention.weight", "pooler.weight"]) == {}
