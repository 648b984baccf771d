from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path

import places
import pytest
import torch
from references import randn
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize
from transformers import AutoTokenizer, CLIPModel, CLIPVisionModelWithProjection

from sap_lightning.errors import InputError
from sap_lightning.models.clip import Base, load_base, load_clip, vision_tower

SHAPES_CLIP = Path(places.SHAPES_CLIP)
CLASSES = ["star", "moon", "house"]
TEMPLATES = ["a photo of a {}.", "{}", "a sketch of a {} and a {}"]


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(str(SHAPES_CLIP))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A checkpoint to spoil."""
    return Path(shutil.copytree(SHAPES_CLIP, tmp_path / "copy"))


@cache
@torch.no_grad()
def text_feature(text: str) -> torch.Tensor:
    """By transformers' own model, one text at a time."""
    tokens = AutoTokenizer.from_pretrained(SHAPES_CLIP)([text], return_tensors="pt")
    return CLIPModel.from_pretrained(SHAPES_CLIP).eval().get_text_features(**tokens).pooler_output[0]


def test_text_features_are_clip_s_own_normalised(base: Base) -> None:
    texts = ["a star", "a drawing of a moon above a house"]
    expected = torch.stack([text_feature(text) / text_feature(text).norm() for text in texts])
    torch.testing.assert_close(base.texts(texts), expected, atol=1e-5, rtol=0)


def test_a_class_feature_is_the_mean_of_its_normalised_prompts(base: Base) -> None:
    expected = []
    for name in CLASSES:
        prompts = [f"a photo of a {name}.", name, f"a sketch of a {name} and a {name}"]
        features = [text_feature(prompt) / text_feature(prompt).norm() for prompt in prompts]
        expected.append(normalize(sum(features) / 3, dim=0))
    torch.testing.assert_close(base.texts.class_features(CLASSES, TEMPLATES), torch.stack(expected), atol=1e-5, rtol=0)


def test_a_text_longer_than_the_tower_is_cut(base: Base) -> None:
    long = " ".join(["star"] * base.texts.max_length)
    torch.testing.assert_close(base.texts([long]), base.texts([f"{long} {long}"]), atol=0, rtol=0)


def test_text_features_can_be_trained_against_even_when_made_during_inference(base: Base) -> None:
    with torch.inference_mode():
        features = base.texts(["a star"])
    assert not features.is_inference()
    assert not features.requires_grad


@pytest.mark.parametrize("templates", [["a photo of a {}.", "a photo"], []])
def test_a_template_without_a_place_for_the_class_is_refused(base: Base, templates: list[str]) -> None:
    with pytest.raises(InputError, match=r"model\.templates must be prompts with \{\}"):
        base.texts.class_features(CLASSES, templates)


def test_the_tower_is_the_checkpoint_s_frozen_and_in_eval_mode(base: Base) -> None:
    plain = CLIPVisionModelWithProjection.from_pretrained(SHAPES_CLIP).eval()
    torch.testing.assert_close(dict(base.tower.state_dict()), dict(plain.state_dict()), atol=0, rtol=0)
    images = randn(0, 2, 3, 64, 64)
    torch.testing.assert_close(base.tower(images).image_embeds, plain(images).image_embeds, atol=0, rtol=0)
    assert not any(parameter.requires_grad for parameter in base.tower.parameters())
    assert not any(module.training for module in base.tower.modules())


def test_the_logit_scale_is_the_checkpoint_s(base: Base) -> None:
    stored = load_file(SHAPES_CLIP / "model.safetensors")["logit_scale"]
    assert base.logit_scale == pytest.approx(float(stored.exp()))


def test_the_tower_shares_its_weights_with_the_whole_model() -> None:
    clip = load_clip(str(SHAPES_CLIP))
    tower = vision_tower(clip)
    shared = dict(clip.named_parameters())
    assert all(parameter is shared[name] for name, parameter in tower.named_parameters())
    assert not any(parameter.is_meta for parameter in tower.parameters())
    assert not any(buffer.is_meta for buffer in tower.buffers())


def test_a_half_precision_checkpoint_is_loaded_in_float32(copy: Path) -> None:
    model = CLIPModel.from_pretrained(copy).half()
    model.save_pretrained(copy)
    assert load_file(copy / "model.safetensors")["visual_projection.weight"].dtype == torch.float16
    base = load_base(str(copy))
    assert {parameter.dtype for parameter in base.tower.parameters()} == {torch.float32}
    torch.testing.assert_close(base.tower.visual_projection.weight, model.visual_projection.weight.float())
    assert base.texts(["a star"]).dtype == torch.float32


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def spoil_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def forget_the_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def lack_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def be_of_another_size(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["visual_projection.weight"] = weights["visual_projection.weight"][:-1].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def have_the_tokenizer_of_another(folder: Path) -> None:
    model = CLIPModel.from_pretrained(folder)
    model.text_model.resize_token_embeddings(100)
    model.config.text_config.vocab_size = 100
    model.save_pretrained(folder)


@pytest.mark.parametrize(
    "spoil",
    [
        remove_config,
        remove_weights,
        cut_weights,
        spoil_config,
        forget_the_tokenizer,
        have_the_tokenizer_of_another,
        lack_a_weight,
        be_of_another_size,
    ],
)
def test_a_faulty_checkpoint_is_refused_in_one_line_with_its_name(copy: Path, spoil) -> None:
    spoil(copy)
    with pytest.raises(InputError) as refused:
        load_base(str(copy))
    assert str(copy) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_checkpoint_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match=r"model\.base '/nowhere'"):
        load_base("/nowhere")
