"""A LLaVA made of a CLIP and a language model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from places import SHAPES_CLIP
from references import contents
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from sap_lightning.data.instructions import IMAGE, PLAIN_TEMPLATE, batch_of
from sap_lightning.errors import InputError
from sap_lightning.models import pretrain_connector as module
from sap_lightning.models.llava import encoder_of, load_language_base
from sap_lightning.models.pretrain_connector import ConnectorPretraining, Sample, assemble, pretrain_connector

PATCHES = 64
COLOURS = {"red": (220, 30, 30), "blue": (30, 40, 220)}
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} [end] {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def language_model(folder: Path, template: str | None = TEMPLATE, tied: bool = True, spare: int = 0) -> Path:
    """A causal language model of random weights that knows no image; with spare rows of embeddings."""
    words = ["[pad]", "[end]", "[unk]", "user", "assistant", "Describe", "the", "image.", "a", "picture", *COLOURS]
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[pad]", eos_token="[end]", unk_token="[unk]")
    fast.chat_template = template
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words) + spare, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=256, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        tie_word_embeddings=tied, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captions")
    lines = []
    for number in range(12):
        name, colour = f"{number}.png", list(COLOURS)[number % 2]
        Image.new("RGB", (40, 30), tuple(value + number for value in COLOURS[colour])).save(folder / name)
        lines.append(
            json.dumps({"file_name": name, "captions": [f"a {colour} picture", f"the {colour} image."]}) + "\n"
        )
    (folder / "captions.jsonl").write_text("".join(lines))
    return folder / "captions.jsonl"


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return language_model(tmp_path_factory.mktemp("language") / "model")


@pytest.fixture(scope="module")
def made(language, captions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "llava"
    pretrain_connector(SHAPES_CLIP, str(language), captions, folder, epochs=10, batch_size=8, learning_rate=1e-2)
    return folder


def samples(captions: Path) -> list[Sample]:
    return [
        Sample(
            "caption",
            (("<image>\nDescribe the image.", entry["captions"][0]),),
            captions.parent / entry["file_name"],
            "",
        )
        for entry in map(json.loads, captions.read_text().splitlines())
    ]


def test_towers_stay_bit_for_bit_and_the_new_row_is_the_mean_of_the_others(made, language):
    whole = LlavaForConditionalGeneration.from_pretrained(made)
    clip, alone = CLIPModel.from_pretrained(SHAPES_CLIP), AutoModelForCausalLM.from_pretrained(language)
    for name, weight in clip.vision_model.state_dict().items():
        assert torch.equal(whole.model.vision_tower.state_dict()[name], weight), name
    words = len(AutoTokenizer.from_pretrained(language))
    for name, weight in alone.model.state_dict().items():
        now = whole.model.language_model.state_dict()[name]
        if name == "embed_tokens.weight":
            assert now.shape == (words + 1, 16)
            torch.testing.assert_close(now[words], weight.mean(dim=0))
            now = now[:words]
        assert torch.equal(now, weight), name
    assert whole.config.image_token_id == AutoTokenizer.from_pretrained(made).convert_tokens_to_ids(IMAGE) == words
    assert (whole.config.vision_feature_layer, whole.config.vision_feature_select_strategy) == (-2, "default")
    assert whole.lm_head.weight is whole.model.language_model.embed_tokens.weight


def test_transformers_own_processor_and_model_give_the_loss_that_was_trained(made, captions):
    """transformers expands <image> and splices by itself; its chat template is the language model's."""
    some = samples(captions)[:4]
    processor, model = AutoProcessor.from_pretrained(made), LlavaForConditionalGeneration.from_pretrained(made).eval()
    losses = []
    for sample in some:
        asked = [{"role": "user", "content": sample.turns[0][0]}]
        said = [*asked, {"role": "assistant", "content": sample.answer}]
        prompt = processor.apply_chat_template(asked, add_generation_prompt=True)
        with Image.open(sample.image) as image:
            whole = processor(text=processor.apply_chat_template(said), images=image, return_tensors="pt")
            before = processor(text=prompt, images=image, return_tensors="pt").input_ids.shape[1]
        assert int((whole.input_ids == model.config.image_token_id).sum()) == PATCHES
        with torch.no_grad():
            logits = model(**whole).logits[0, before - 1 : -1]
        losses.append(cross_entropy(logits, whole.input_ids[0, before:], reduction="none"))
    base, encoder = load_language_base(str(made)), encoder_of(str(made), 256)
    checkpoint = module.Whole(model, base.language, processor, base.vision, encoder)
    batch = batch_of(some, encoder)
    ours = ConnectorPretraining(checkpoint, some, 4, 1e-3, 0).losses(batch, batch.images)
    torch.testing.assert_close(ours, torch.cat(losses), atol=1e-4, rtol=0)


def test_a_caption_is_told_from_the_image(made, captions):
    base, encoder = load_language_base(str(made)), encoder_of(str(made), 256)
    model = LlavaForConditionalGeneration.from_pretrained(made).eval()
    some = samples(captions)
    trained = ConnectorPretraining(module.Whole(model, base.language, None, base.vision, encoder), some, 12, 1e-3, 0)
    batch = batch_of(some, encoder)
    with torch.no_grad():
        right = trained.losses(batch, batch.images).mean()
        other = trained.losses(batch, (*batch.images[1:], batch.images[0])).mean()
    assert other > right + 0.1


def test_only_the_connector_is_trained(language, captions):
    whole = assemble(SHAPES_CLIP, str(language), 0)
    trained = ConnectorPretraining(whole, samples(captions), 4, 1e-3, 0)
    batch = batch_of(samples(captions), whole.encoder)
    trained.losses(batch, batch.images).mean().backward()
    learning = {name for name, weight in whole.llava.named_parameters() if weight.grad is not None}
    assert learning == {
        f"model.multi_modal_projector.{layer}.{part}"
        for layer in ("linear_1", "linear_2")
        for part in ("weight", "bias")
    }


def test_same_seed_gives_same_files(language, captions, tmp_path):
    for name, seed in (("first", 1), ("second", 1), ("other", 2)):
        pretrain_connector(SHAPES_CLIP, str(language), captions, tmp_path / name, seed=seed)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    assert contents(tmp_path / "first") != contents(tmp_path / "other")


def test_it_does_not_say_where_its_parts_were(made, language):
    assert language.parent.name not in (made / "config.json").read_text()


def test_rows_that_are_not_tied_both_get_the_mean_and_a_spare_row_is_used(tmp_path):
    whole = assemble(SHAPES_CLIP, str(language_model(tmp_path / "untied", tied=False)), 0)
    for table in (whole.language.get_input_embeddings(), whole.language.get_output_embeddings()):
        torch.testing.assert_close(table.weight[-1], table.weight[:-1].mean(dim=0))
    assert not torch.equal(whole.language.get_input_embeddings().weight, whole.language.get_output_embeddings().weight)
    spare = assemble(SHAPES_CLIP, str(language_model(tmp_path / "spare", spare=5)), 0)
    table = spare.language.get_input_embeddings().weight
    assert len(table) == 17
    torch.testing.assert_close(table[12], table[:12].mean(dim=0))


def test_a_model_without_a_chat_template_gets_llava_s(captions, tmp_path):
    bare = language_model(tmp_path / "bare", template=None)
    pretrain_connector(SHAPES_CLIP, str(bare), captions, tmp_path / "made")
    assert AutoTokenizer.from_pretrained(tmp_path / "made").chat_template == PLAIN_TEMPLATE
    turns = [{"role": "user", "content": "<image> a"}, {"role": "assistant", "content": "b"}]
    said = AutoProcessor.from_pretrained(tmp_path / "made").apply_chat_template(turns)
    assert said == "USER: <image> a ASSISTANT: b[end]"


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"batch_size": 0}, {"learning_rate": 0.0}, {"seed": -1}])
def test_a_number_out_of_range_is_refused_by_name(language, captions, tmp_path, wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        pretrain_connector(SHAPES_CLIP, str(language), captions, tmp_path / "made", **wrong)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_left_alone(language, captions, tmp_path):
    with pytest.raises(InputError, match="already exists"):
        pretrain_connector(SHAPES_CLIP, str(language), captions, tmp_path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"file_name": "none.png", "captions": ["a"]}, "line 1: image 'none.png' is missing"),
        ({"file_name": "0.png", "captions": []}, "line 1: needs a caption"),
        (
            {"file_name": "0.png", "captions": ["a", 3]},
            "line 1: needs a caption, or captions as a list of strings, got 3",
        ),
        ({"file_name": "0.png", "captions": ["a <image>"]}, "the caption 'a <image>' holds <image>"),
        (None, "has no image"),
    ],
)
def test_faulty_captions_are_named(language, tmp_path, line, said):
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    (tmp_path / "captions.jsonl").write_text(json.dumps(line) if line else "")
    with pytest.raises(InputError, match=re.escape(said)):
        pretrain_connector(SHAPES_CLIP, str(language), tmp_path / "captions.jsonl", tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_an_image_that_is_none_is_named(language, tmp_path):
    (tmp_path / "0.png").write_bytes(b"none")
    (tmp_path / "captions.jsonl").write_text(json.dumps({"file_name": "0.png", "captions": ["a"]}))
    with pytest.raises(InputError, match=re.escape(f"{tmp_path / '0.png'}: cannot be read as an image")):
        pretrain_connector(SHAPES_CLIP, str(language), tmp_path / "captions.jsonl", tmp_path / "made")


def test_checkpoints_of_other_kinds_are_refused(language, captions, tmp_path):
    with pytest.raises(InputError, match="no whole CLIP checkpoint"):
        pretrain_connector(str(language), str(language), captions, tmp_path / "made")
    with pytest.raises(InputError, match="no causal language model"):
        pretrain_connector(SHAPES_CLIP, SHAPES_CLIP, captions, tmp_path / "made")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_writing_leaves_nothing_behind(language, captions, tmp_path, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module.LlavaProcessor, "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretrain_connector(SHAPES_CLIP, str(language), captions, tmp_path / "made")
    assert not list(tmp_path.iterdir())


def test_the_command_tells_a_missing_file_in_one_line(language, tmp_path):
    options = {"vision": SHAPES_CLIP, "language": language, "captions": tmp_path / "none", "output": tmp_path / "made"}
    line = [sys.executable, "-m", "sap_lightning.models.pretrain_connector"]
    answer = subprocess.run(
        [*line, *(f"--{name}={value}" for name, value in options.items())], capture_output=True, text=True
    )
    assert answer.returncode == 1
    assert answer.stderr.startswith(f"error: {tmp_path / 'none'}: cannot be read")
    assert len(answer.stderr.splitlines()) == 1


def test_images_of_any_size_are_seen(made):
    processor = AutoProcessor.from_pretrained(made)
    pixels = processor(text=IMAGE, images=Image.fromarray(np.zeros((20, 90, 3), np.uint8)), return_tensors="pt")
    assert pixels.pixel_values.shape == (1, 3, 64, 64)
