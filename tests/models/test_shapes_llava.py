"""The shapes world's own small LLaVA, as it is shipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from places import SHAPES_LLAVA
from transformers import LlavaForConditionalGeneration

from sap_lightning.data.anchors import captioned_images
from sap_lightning.data.instructions import Sample, batch_of
from sap_lightning.data.questions import DESCRIBE
from sap_lightning.errors import InputError
from sap_lightning.models.llava import encoder_of, load_language_base
from sap_lightning.models.pretrain_connector import ConnectorPretraining, Whole
from sap_lightning.models.shapes_llava import draw_pictures, pretrain

SEED = 1000
"""No picture of this seed was trained on."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held_out") / "pictures"
    draw_pictures(folder, 48, SEED)
    return folder / "captions.jsonl"


def test_it_is_small():
    assert sum(path.stat().st_size for path in Path(SHAPES_LLAVA).iterdir()) < 4_000_000


def test_captions_of_unseen_pictures_are_told_from_the_pictures(pictures):
    base, encoder = load_language_base(SHAPES_LLAVA), encoder_of(SHAPES_LLAVA, 512)
    samples = [Sample("caption", ((DESCRIBE, said[0]),), image, "") for image, said in captioned_images(pictures)]
    llava = LlavaForConditionalGeneration.from_pretrained(SHAPES_LLAVA)
    shown = ConnectorPretraining(Whole(llava, base.language, None, base.vision, encoder), samples, 48, 1e-3, 0)
    batch = batch_of(samples, encoder)
    with torch.no_grad():
        right = float(shown.losses(batch, batch.images).mean())
        other = float(shown.losses(batch, (*batch.images[1:], batch.images[0])).mean())
    assert right < 0.7 * other


def test_pictures_are_the_same_for_the_same_seed(tmp_path):
    for name, seed in (("first", 1), ("second", 1), ("other", 2)):
        draw_pictures(tmp_path / name, 3, seed)
    first, second, other = ((tmp_path / name / "captions.jsonl").read_text() for name in ("first", "second", "other"))
    assert first == second != other
    assert len(list((tmp_path / "first").glob("*.png"))) == 3


def test_bad_input_is_refused_before_anything_is_learned(tmp_path):
    with pytest.raises(InputError, match="already exists"):
        pretrain(tmp_path)
    with pytest.raises(InputError, match="seed"):
        pretrain(tmp_path / "model", seed=-1)
