"""Classifying a folder of images by the command, against CLIP's own arithmetic."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from PIL import Image
from places import SHAPES_CLIP
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from sap_lightning.errors import InputError

NAMES = ["boat", "car", "cup"]


@pytest.fixture
def photos(world, tmp_path) -> Path:
    folder = tmp_path / "photos"
    for name in NAMES:
        (folder / "mixed").mkdir(parents=True, exist_ok=True)
        file = min((world / "domains" / "photo" / name).iterdir())
        (folder / "mixed" / f"{name}{file.suffix}").write_bytes(file.read_bytes())
    (folder / "notes.txt").write_text("no image")
    return folder


def predicted(run, photos: Path, output: Path, *options: str) -> list[dict[str, str]]:
    names = f"--data.class_names=[{','.join(NAMES)}]"
    run("predict", f"--predict.images={photos}", names, f"--predict.output={output}", *options)
    with output.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@torch.no_grad()
def clip_probabilities(adapter: Path | None, photos: Path) -> torch.Tensor:
    """By transformers and PEFT alone, images in the order of their paths."""
    clip, tokenizer = CLIPModel.from_pretrained(SHAPES_CLIP).eval(), AutoTokenizer.from_pretrained(SHAPES_CLIP)
    if adapter is not None:
        clip = PeftModel.from_pretrained(clip, adapter).eval()
    processor = AutoImageProcessor.from_pretrained(SHAPES_CLIP, backend="pil")
    images = [Image.open(path).convert("RGB") for path in sorted(photos.rglob("*.*")) if path.suffix != ".txt"]
    texts = tokenizer([f"a photo of a {name}." for name in NAMES], padding=True, return_tensors="pt")
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    return clip(pixel_values=pixels, **texts).logits_per_image.softmax(-1)


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
