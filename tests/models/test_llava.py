"""A LLaVA checkpoint taken apart gives what the whole of it gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from llava import FEATURES, conversations, tiny_language_model, tiny_llava
from transformers import LlavaForConditionalGeneration

from sap_lightning.data.instructions import read_samples
from sap_lightning.errors import InputError
from sap_lightning.models import llava
from sap_lightning.models.llava import embedded, encoder_of, frozen_vision, load_language_base, sees

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("llava") / "base")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = conversations(tmp_path_factory.mktemp("conversations"), {"vqa_a": "vqa"})
    return [sample.image for sample in read_samples(root / "vqa_a/train.jsonl") if sample.image]


def pixels(base: Path, images: list[Path]) -> torch.Tensor:
    from PIL import Image
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(base, backend="pil")
    return processor([Image.open(image) for image in images], return_tensors="pt")["pixel_values"]


def test_its_logits_are_those_of_the_whole(base, images):
    whole = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32).eval()
    ids = torch.tensor([[2, *[4] * FEATURES, 7, 3, 8], [2, *[4] * FEATURES, 9, 3, 10]])
    parts = load_language_base(str(base))
    assert parts.connector is not None and parts.vision is not None and parts.image_token == 4
    with torch.no_grad():
        expected = whole(input_ids=ids, pixel_values=pixels(base, images[:2])).logits
        inputs = embedded(parts.language, ids, 4, parts.connector(parts.vision(images[:2], CPU)))
        assert torch.allclose(parts.language(inputs_embeds=inputs).logits, expected, atol=1e-5)


def test_the_splice_is_rows_in_place_of_rows(base):
    parts = load_language_base(str(base))
    ids, images = torch.tensor([[2, 4, 4, 7], [4, 2, 4, 8]]), torch.randn(2, 2, 16)
    found = embedded(parts.language, ids, 4, images)
    table = parts.language.get_input_embeddings().weight
    for row in range(2):
        features = iter(images[row])
        for place, id in enumerate(ids[row].tolist()):
            assert torch.equal(found[row, place], next(features) if id == 4 else table[id])


def test_features_are_of_the_layer_before_the_last_without_the_class_token(base, images):
    whole = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        hidden = whole.model.vision_tower(pixels(base, images[:3]), output_hidden_states=True).hidden_states[-2]
    vision = frozen_vision(str(base))
    assert vision.features == FEATURES
    assert torch.allclose(vision(images[:3], CPU), hidden[:, 1:], atol=1e-6)


def test_an_image_is_looked_at_once(base, images, monkeypatch):
    frozen_vision.cache_clear()
    vision = frozen_vision(str(base))
    first = vision(images, CPU)
    monkeypatch.setattr(vision, "pixels", lambda image: pytest.fail(f"{image} again"))
    assert torch.equal(vision(images[::-1], CPU), first.flip(0))


def test_images_beyond_the_memory_are_looked_at_anew(base, images, monkeypatch):
    frozen_vision.cache_clear()
    vision = frozen_vision(str(base))
    one = FEATURES * 12 * 4
    monkeypatch.setattr(llava, "MAX_REMEMBERED", 2 * one)
    found = vision(images, CPU)
    assert len(vision._seen) == 2
    assert torch.equal(vision(images, CPU), found)


def test_what_is_no_image_is_named(base, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"a.png: cannot be read as an image"):
        frozen_vision(str(base))([tmp_path / "a.png"], CPU)


def test_the_language_model_has_the_names_that_it_has_alone(base, tmp_path):
    alone = load_language_base(str(tiny_language_model(tmp_path / "alone")))
    assert not sees(str(tmp_path / "alone")) and alone.connector is None
    assert load_language_base(str(base)).language.state_dict().keys() == alone.language.state_dict().keys()


@pytest.mark.parametrize("part", ["vision_tower", "multi_modal_projector", "language_model"])
def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path, part):
    base = tiny_llava(tmp_path / "base")
    weights = safetensors.torch.load_file(base / "model.safetensors")
    kept = {name: value for name, value in weights.items() if part not in name}
    assert len(kept) < len(weights)
    safetensors.torch.save_file(kept, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"no whole LLaVA checkpoint: [0-9]+ weights are missing"):
        load_language_base(str(base))


def test_a_language_model_that_lacks_weights_is_refused(tmp_path):
    base = tiny_language_model(tmp_path / "base")
    weights = safetensors.torch.load_file(base / "model.safetensors")
    name = next(name for name in weights if "q_proj" in name)
    del weights[name]
    safetensors.torch.save_file(weights, base / "model.safetensors", {"format": "pt"})
    lacking = f"1 weights are missing or of another shape than config.json says, the first is {name}"
    with pytest.raises(InputError, match=f"no whole causal language model: {lacking}"):
        load_language_base(str(base))


def test_the_fingerprint_is_of_language_connector_and_tower(base, tmp_path):
    tower = tiny_llava(tmp_path / "tower")
    weights = safetensors.torch.load_file(tower / "model.safetensors")
    name = next(name for name in weights if "vision_tower" in name and name.endswith("q_proj.weight"))
    safetensors.torch.save_file({**weights, name: weights[name] + 1}, tower / "model.safetensors", {"format": "pt"})
    assert load_language_base(str(base)).fingerprint != load_language_base(str(tower)).fingerprint
    other = tiny_llava(tmp_path / "other", seed=1)
    assert load_language_base(str(base)).fingerprint == load_language_base(str(base)).fingerprint
    assert load_language_base(str(base)).fingerprint != load_language_base(str(other)).fingerprint


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    base = tiny_llava(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    key = "image_token_id" if "image_token_id" in config else "image_token_index"
    (base / "config.json").write_text(json.dumps({**config, key: 9}))
    with pytest.raises(InputError, match="id of <image> is 4, its config's 9"):
        encoder_of(str(base), 64)


def test_what_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(InputError, match="no checkpoint could be loaded"):
        load_language_base(str(tmp_path))


def test_features_of_several_layers_are_refused(tmp_path):
    base = tiny_llava(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "vision_feature_layer": [-2, -1]}))
    with pytest.raises(InputError, match="takes features of several layers"):
        frozen_vision(str(base))
