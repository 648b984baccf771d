"""Anchors as each model's own preprocessor has them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from places import SHAPES_CLIP
from torch.testing import assert_close
from transformers import AutoTokenizer, CLIPModel

from sap_lightning.checkpoints.checkpoint import Checkpoint
from sap_lightning.checkpoints.pairs import Pairs
from sap_lightning.data.anchors import AnchorDataModule
from sap_lightning.errors import InputError


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """The shipped CLIP, whose images are to be half as bright."""
    folder = Path(shutil.copytree(SHAPES_CLIP, tmp_path / "other"))
    changed(folder, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 1.0, 2.0])
    return folder


def changed(folder: Path, **settings: object) -> None:
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def anchors_in(world: Path) -> AnchorDataModule:
    return AnchorDataModule(str(world / "anchors"), 4, SHAPES_CLIP, cache=False)


def test_a_model_is_shown_images_as_its_own_preprocessor_says(world, other) -> None:
    pairs = Pairs(anchors_in(world), Path(SHAPES_CLIP))
    (found,) = pairs.predictions(pairs.load(other))
    own = AnchorDataModule(str(world / "anchors"), 4, str(other), cache=False)
    captions = AutoTokenizer.from_pretrained(SHAPES_CLIP)(own.captions, return_tensors="pt", padding=True)
    with torch.inference_mode():
        logits = CLIPModel.from_pretrained(other)(pixel_values=own.images(), **captions).logits_per_image
    assert_close(found, logits.softmax(-1), atol=1e-5, rtol=0)
    (first,) = pairs.predictions(pairs.load(Path(SHAPES_CLIP)))
    assert not torch.allclose(found, first, atol=1e-3)
    (other / "preprocessor_config.json").unlink()
    assert_close(pairs.predictions(pairs.load(other))[0], first, atol=1e-6, rtol=0)


def test_a_preprocessor_for_images_of_another_size_is_refused(world, other) -> None:
    changed(other, size={"shortest_edge": 40}, crop_size={"height": 40, "width": 40})
    pairs = Pairs(anchors_in(world), Path(SHAPES_CLIP))
    with pytest.raises(InputError, match=r"preprocessor_config.json: makes images of 40 pixels, the model takes \d+"):
        pairs.load(other)
    config = json.loads((other / "config.json").read_text())
    config["vision_config"]["image_size"] *= 2
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"fuse.models"):
        pairs.load(other)


def test_what_it_says_is_a_part_of_what_decides_a_fusion(other) -> None:
    before = Checkpoint(str(other)).fingerprint
    changed(other, image_mean=[0.0, 0.0, 0.0])
    assert Checkpoint(str(other)).fingerprint != before
