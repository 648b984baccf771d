"""What a client measures of its adapter after training, compared with the adapter merged into the tower by hand."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from places import SHAPES_CLIP
from torch.nn.functional import normalize

from sap_lightning.callbacks.reach import ReachCallback
from sap_lightning.callbacks.sent_blocks import SentBlocks
from sap_lightning.data.domains import DomainDataModule
from sap_lightning.functional.reach import LENGTHS, MEASURED
from sap_lightning.functional.styles import STYLES
from sap_lightning.models.clip import load_base
from sap_lightning.models.patched import Patched
from sap_lightning.modules.clip_lora import CLIPLoRAModule


def trained(world, **settings) -> tuple[CLIPLoRAModule, DomainDataModule, ReachCallback]:
    data = DomainDataModule(str(world / "domains"), "photo", base=SHAPES_CLIP, batch_size=16, cache=False, **settings)
    module, callback = CLIPLoRAModule(SHAPES_CLIP, rank=4, dropout=0.3), ReachCallback(SentBlocks())
    trainer = L.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, callbacks=[callback],
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return module, data, callback


@pytest.fixture(scope="module")
def parts(world):
    return trained(world)


@torch.no_grad()
def test_it_is_the_mean_probability_of_the_right_class_at_base_and_multiples_of_the_update(parts):
    module, data, callback = parts
    assert list(callback.reach) == list(MEASURED)
    held_out = data.held_out(64)
    base = load_base(SHAPES_CLIP)
    tower = Patched(base.tower)
    for style in ("plain", "grey", "edges"):
        images = held_out.images / 255
        pixels = 255 * (STYLES[style](images) if style != "plain" else images)
        for length in (0.0, 0.75, 1.0):
            tower.set_update(
                {name: layer._replace(scale=length * layer.scale) for name, layer in module.layers().items()}
            )
            features = normalize(tower.model(data._preprocess.normalise(pixels)).image_embeds, dim=-1)
            shares = (base.logit_scale * features @ module.class_features.T).softmax(-1)
            expected = float(shares[torch.arange(len(shares)), held_out.labels].mean())
            assert callback.reach[style][LENGTHS.index(length)] == pytest.approx(expected, abs=2e-4)


def test_the_adapter_stays_as_it_was_trained(parts, world):
    again = trained(world)[0]
    module = parts[0]
    for name, layer in module.layers().items():
        assert layer.scale == 4.0, "alpha 16 / rank 4"
        assert torch.equal(layer.B, again.layers()[name].B)


def test_it_is_the_same_each_time(parts, world):
    assert trained(world)[2].reach == parts[2].reach


def test_images_are_spread_over_the_held_out_part(parts):
    data = parts[1]
    few, all_of_them = data.held_out(4), data.held_out(10_000)
    assert len(few.labels) == 4 and len(few.labels.unique()) > 1
    assert set(few.indices.tolist()) < set(all_of_them.indices.tolist())
    assert len(all_of_them.labels) == len(data.val_dataloader().dataset)


def test_without_held_out_images_nothing_is_said(world):
    assert trained(world, val_fraction=0)[2].reach == {}
