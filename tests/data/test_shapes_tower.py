"""The vision tower that learns what is where."""

from __future__ import annotations

import numpy as np
import torch
from places import SHAPES_CLIP
from references import contents
from transformers import CLIPModel

from sap_lightning.data.preprocess import Preprocess
from sap_lightning.data.shapes import pretrain_tower as module
from sap_lightning.data.shapes.arrangement import Arrangement, Item
from sap_lightning.data.shapes.pretrain_tower import HUES, Drawn, labels_of, pretrain_tower
from sap_lightning.data.shapes.world import CLASSES, STYLES


def drawn(number: int) -> list[Drawn]:
    pictures = []
    for seed in range(number):
        thing, colour = CLASSES[seed % 8], ("red", "blue")[seed % 2]
        scene = Arrangement("sketch", "white", (Item(thing, colour, seed % 4),))
        image, boxes = scene.draw(64, np.random.default_rng(seed))
        pictures.append(Drawn(image, scene, boxes))
    return pictures


def test_each_patch_is_what_lies_on_its_centre():
    [one] = drawn(1)
    labels = labels_of(one._replace(boxes=[(0.0, 0.0, 0.5, 0.25)]), 8).view(8, 8, 3)
    there = torch.zeros(8, 8, dtype=torch.bool)
    there[:2, :4] = True
    assert set(labels[there][:, 0].tolist()) == {1 + CLASSES.index("boat")} and set(labels[~there][:, 0].tolist()) == {
        0
    }
    assert set(labels[there][:, 1].tolist()) == {HUES.index("red")}
    assert set(labels[~there][:, 1].tolist()) == {HUES.index("white")}
    assert set(labels[..., 2].flatten().tolist()) == {list(STYLES).index("sketch")}


def test_it_learns_and_writes_the_same_files_for_the_same_seed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "EPOCHS", 3)
    monkeypatch.setattr(module, "BATCH", 8)
    pictures = drawn(24)
    for name in ("first", "second"):
        pretrain_tower(tmp_path / name, pictures, seed=1)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()[:3]]
    assert losses[2] < 0.7 * losses[0]
    before, after = (CLIPModel.from_pretrained(folder).state_dict() for folder in (SHAPES_CLIP, tmp_path / "first"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    # What a LLaVA takes is before the last layer.
    assert changed and all(name.startswith("vision_model.") and ".layers.3." not in name for name in changed)
    assert Preprocess(str(tmp_path / "first")).settings == Preprocess(SHAPES_CLIP).settings
