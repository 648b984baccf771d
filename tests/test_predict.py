"""Classifying a folder of images by the command, against CLIP's own arithmetic."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import lightning as L
import pytest
import torch
from peft import PeftModel
from PIL import Image
from places import SHAPES_CLIP
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from sap_lightning.data.folder import ImageFolderDataModule
from sap_lightning.errors import InputError
from sap_lightning.io.context import as_layer, context_layer
from sap_lightning.io.prompt import write_prompt
from sap_lightning.modules.evaluator import CLIPEvaluator

NAMES = ["boat", "car", "cup"]
MOODS = ["bright", "dark"]
PROMPT = '--model.templates=["a photo of a {}."]'


@pytest.fixture
def photos(world, tmp_path) -> Path:
    folder = tmp_path / "photos"
    for name in NAMES:
        (folder / "mixed").mkdir(parents=True, exist_ok=True)
        file = min((world / "domains" / "photo" / name).iterdir())
        (folder / "mixed" / f"{name}{file.suffix}").write_bytes(file.read_bytes())
    (folder / "notes.txt").write_text("no image")
    return folder


def predicted(run, photos: Path, output: Path, *options: str, names: list[str] = NAMES) -> list[dict[str, str]]:
    classes = f"--data.class_names=[{','.join(names)}]"
    run("predict", f"--predict.images={photos}", classes, f"--predict.output={output}", *options)
    with output.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@torch.no_grad()
def clip_logits(adapter: Path | None, photos: Path, names: list[str] = NAMES) -> torch.Tensor:
    """By transformers and PEFT alone, images in the order of their paths."""
    clip, tokenizer = CLIPModel.from_pretrained(SHAPES_CLIP).eval(), AutoTokenizer.from_pretrained(SHAPES_CLIP)
    if adapter is not None:
        clip = PeftModel.from_pretrained(clip, adapter).eval()
    processor = AutoImageProcessor.from_pretrained(SHAPES_CLIP, backend="pil")
    images = [Image.open(path).convert("RGB") for path in sorted(photos.rglob("*.*")) if path.suffix != ".txt"]
    texts = tokenizer([f"a photo of a {name}." for name in names], padding=True, return_tensors="pt")
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    return clip(pixel_values=pixels, **texts).logits_per_image


def clip_probabilities(adapter: Path | None, photos: Path) -> torch.Tensor:
    return clip_logits(adapter, photos).softmax(-1)


def assert_agrees(rows: list[dict[str, str]], probabilities: torch.Tensor) -> None:
    assert [row["image"] for row in rows] == sorted(row["image"] for row in rows)
    assert len(rows) == len(probabilities) == len(NAMES)
    for row, expected in zip(rows, probabilities, strict=True):
        assert row["class"] == NAMES[int(expected.argmax())]
        assert float(row["probability"]) == pytest.approx(float(expected.max()), abs=2e-4)


def test_the_bare_base_predicts_what_clip_does(run, photos, tmp_path):
    rows = predicted(run, photos, tmp_path / "out.csv", '--model.templates=["a photo of a {}."]')
    assert_agrees(rows, clip_probabilities(None, photos))


def test_a_merged_model_predicts_what_clip_does_with_its_weights(run, finished, photos, tmp_path):
    merged = finished / "merged" / "photo" / "sap"
    options = [f"--uploads={merged}", '--model.templates=["a photo of a {}."]']
    assert_agrees(predicted(run, photos, tmp_path / "out.csv", *options), clip_probabilities(merged, photos))


def test_an_upload_changes_the_prediction(run, finished, photos, tmp_path):
    plain = predicted(run, photos, tmp_path / "plain.csv")
    worn = predicted(run, photos, tmp_path / "worn.csv", f"--uploads={finished / 'uploads' / 'sketch'}")
    assert [row["image"] for row in worn] == [row["image"] for row in plain]
    assert worn != plain


def test_a_folder_without_images_is_refused(run, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: no images"):
        predicted(run, tmp_path / "empty", tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


def test_a_picture_that_is_none_is_refused_by_name(run, photos, tmp_path):
    (photos / "broken.jpg").write_bytes(b"not a jpeg")
    with pytest.raises(InputError, match=r"broken\.jpg"):
        predicted(run, photos, tmp_path / "out.csv")


@pytest.mark.parametrize("names", ["[boat]", "[boat,boat]"])
def test_fewer_than_two_different_classes_are_refused(run, photos, tmp_path, names):
    with pytest.raises(InputError, match="at least two classes, each once"):
        output = f"--predict.output={tmp_path / 'out.csv'}"
        run("predict", f"--predict.images={photos}", f"--data.class_names={names}", output)


def test_a_folder_that_is_not_there_is_named(run, tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder; give one with images"):
        predicted(run, tmp_path / "nowhere", tmp_path / "out.csv")


@pytest.mark.parametrize("option", ["--predict.images=", "--predict.output=", "--uploads=", "--uploads  a"])
def test_a_variable_of_the_shell_that_is_not_set_does_not_stand_for_this_folder(run, photos, tmp_path, option):
    name = option[2:].replace("=", " ").split()[0]
    with pytest.raises(InputError, match=f"{name} is empty; give it a value"):
        predicted(run, photos, tmp_path / "out.csv", *option.split(" "))


def test_classes_that_the_text_tower_cannot_tell_apart_are_refused(run, photos, tmp_path):
    long = "dog " * 40
    with pytest.raises(InputError, match=r"classes 'dog .*' and 'dog .*' are one to the text tower"):
        predicted(run, photos, tmp_path / "out.csv", names=[f"{long}x", f"{long}y"])
    assert not (tmp_path / "out.csv").exists()


def test_one_name_is_no_list_of_letters(photos):
    with pytest.raises(InputError, match="class_names 'dog': is one name; give a list of them"):
        ImageFolderDataModule(photos, "dog", SHAPES_CLIP)


@pytest.mark.parametrize("command", ["predict", "test"])
def test_templates_beside_a_prompt_are_not_ignored(run, photos, tmp_path, command):
    write_prompt(tmp_path / "prompt", {context_layer("end"): as_layer(torch.zeros(2, 64))})
    classes, output = f"--data.class_names=[{','.join(NAMES)}]", f"--predict.output={tmp_path / 'out.csv'}"
    own = {"predict": [f"--predict.images={photos}", classes, output], "test": ["--data.domain=photo"]}[command]
    with pytest.raises(InputError, match=r"--model.templates: .*prompt is a prompt, which stands in their place"):
        run(command, *own, PROMPT, f"--uploads={tmp_path / 'prompt'}")
    run(command, *own, f"--uploads={tmp_path / 'prompt'}")


def test_a_standing_file_is_not_overwritten(run, photos, tmp_path):
    (tmp_path / "out.csv").write_text("mine")
    with pytest.raises(InputError, match="not overwritten"):
        predicted(run, photos, tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text() == "mine"


def test_an_output_in_a_folder_that_is_not_there_is_refused_at_once(run, photos, tmp_path):
    with pytest.raises(InputError, match=r"nowhere/out\.csv: there is no such folder"):
        predicted(run, photos, tmp_path / "nowhere" / "out.csv")


def test_classes_that_are_not_named_are_asked_for(run, photos, tmp_path):
    with pytest.raises(InputError, match=r"data\.class_names is not set; name the classes to choose from"):
        run("predict", f"--predict.images={photos}", f"--predict.output={tmp_path / 'out.csv'}")


def test_two_uploads_are_to_be_merged_first(run, finished, photos, tmp_path):
    uploads = [str(finished / "uploads" / domain) for domain in ("photo", "sketch")]
    with pytest.raises(InputError, match="--uploads: predict takes one, got 2; merge them first"):
        predicted(run, photos, tmp_path / "out.csv", "--uploads", *uploads)


# Groups of classes


def grouped(groups: dict[str, list[str]]) -> str:
    return f"--predict.class_groups={json.dumps(groups)}"


def test_every_group_has_its_own_softmax_and_says_one_class(run, finished, photos, tmp_path):
    merged, names = finished / "merged" / "photo" / "sap", ["boat", "bright", "car", "dark", "cup"]
    groups = {"things": NAMES, "moods": MOODS}
    rows = predicted(run, photos, tmp_path / "out.csv", f"--uploads={merged}", PROMPT, grouped(groups), names=names)
    logits = clip_logits(merged, photos, names).double()
    assert [row["group"] for row in rows] == ["things", "moods"] * len(logits)
    for row, of_image in zip(rows, logits.repeat_interleave(2, dim=0), strict=True):
        scores = {name: float(of_image[names.index(name)]) for name in groups[row["group"]]}
        best = max(scores, key=scores.__getitem__)
        share = 1 / sum(math.exp(score - scores[best]) for score in scores.values())
        assert row["class"] == best and float(row["probability"]) == pytest.approx(share, abs=2e-4)


def test_one_group_is_no_group_bit_for_bit(photos):
    trainer = L.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    found = []
    for groups in (None, {"things": ["cup", "boat", "car"]}):
        data = ImageFolderDataModule(photos, NAMES, str(SHAPES_CLIP), class_groups=groups)
        found.append(torch.cat(trainer.predict(CLIPEvaluator(str(SHAPES_CLIP)), datamodule=data)))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ({"things": ["boat", "car"], "moods": MOODS}, "class cup is in no group; put each class into one group"),
        ({"things": NAMES, "moods": [*MOODS, "cup"]}, "class cup is in things and in moods; put each class into one"),
        ({"things": [*NAMES, "cup"], "moods": MOODS}, "class cup is in things and in things; put each"),
        ({"things": NAMES, "moods": [*MOODS, "grim"]}, "'grim' of moods is none of the classes"),
        ({"things": [*NAMES, "bright"], "moods": ["dark"]}, "moods has fewer than two classes; name what"),
        ({"things": NAMES, " ": MOODS}, "group ' ': a name has printable characters only"),
        ({}, "class boat is in no group"),
    ],
)  # fmt: skip
def test_a_class_that_is_not_in_one_group_is_refused(run, photos, tmp_path, groups, said):
    with pytest.raises(InputError, match=f"class_groups: {said}"):
        predicted(run, photos, tmp_path / "out.csv", grouped(groups), names=[*NAMES, *MOODS])
    assert not (tmp_path / "out.csv").exists()
