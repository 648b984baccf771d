"""How sensitive the blocks of a client's tower are, against the tower's own hidden states, and which it sends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from places import SHAPES_CLIP
from references import quiet_trainer
from torch.nn.functional import cross_entropy, normalize

from sap_lightning.callbacks.reach import ReachCallback
from sap_lightning.callbacks.sent_blocks import RADIUS, SentBlocks
from sap_lightning.data import DomainDataModule
from sap_lightning.errors import InputError
from sap_lightning.io.adapter import read_adapter
from sap_lightning.models.clip import load_base
from sap_lightning.models.layers import block_of
from sap_lightning.modules import CLIPLoRAModule


def fitted(world: Path, sent: Any, reach: ReachCallback | None = None) -> tuple[CLIPLoRAModule, SentBlocks]:
    data = DomainDataModule(str(world / "domains"), "photo", base=SHAPES_CLIP, batch_size=19, cache=False)
    module = CLIPLoRAModule(SHAPES_CLIP, rank=2, sent_blocks=sent, targets=["q_proj", "visual_projection"])
    callbacks = [SentBlocks(sent), *([reach] if reach else [])]
    trainer = quiet_trainer(*callbacks, max_epochs=1, limit_val_batches=0)
    trainer.fit(module, datamodule=data)
    return module, callbacks[0]


@pytest.fixture(scope="module")
def half(world) -> tuple[CLIPLoRAModule, SentBlocks]:
    return fitted(world, 0.5)


def test_it_is_the_mean_relative_change_of_the_tower_s_hidden_states(world, half):
    module, sent = half
    data = DomainDataModule(str(world / "domains"), "photo", base=SHAPES_CLIP, cache=False)
    data.setup()
    batch = data.training_part[list(range(38))]
    base = load_base(SHAPES_CLIP)
    images = data._preprocess.normalise(batch.images).requires_grad_()

    def looked_at(images: torch.Tensor) -> Any:
        return base.tower(images, output_hidden_states=True)

    before = looked_at(images)
    logits = base.logit_scale * normalize(before.image_embeds, dim=-1) @ module.class_features.T
    (gradient,) = torch.autograd.grad(cross_entropy(logits, batch.labels, reduction="sum"), images)
    after = looked_at(images + RADIUS * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1))
    for block, found in sent.sensitivity.items():
        h, changed = (one.hidden_states[block + 1].detach().flatten(1) for one in (before, after))
        assert found == pytest.approx(float(((changed - h).norm(dim=1) / h.norm(dim=1)).mean()), rel=1e-3)
    assert list(sent.sensitivity) == [0, 1, 2, 3]


def test_the_half_that_is_most_sensitive_is_sent_with_what_is_in_no_block(half, tmp_path):
    module, sent = half
    blocks = sorted(sorted(sent.sensitivity, key=lambda block: sent.sensitivity[block])[2:])
    assert sent.blocks == blocks
    upload = module.write_upload(tmp_path / "upload", "photo", 38, blocks=sent.blocks)
    adapter = read_adapter(upload)
    assert {block_of(layer) for layer in adapter.layers} == {None, *blocks}
    assert len(module.layers()) == 5 and len(adapter.layers) == 3
    assert adapter.manifest is not None
    said = json.loads((upload / "manifest.json").read_text())
    assert sorted(said["layers"]) == list(adapter.layers) and said["format_version"] == 2
    for name, layer in adapter.layers.items():
        assert torch.equal(layer.B, module.layers()[name].B)


def test_named_blocks_are_sent_and_nothing_is_measured(world):
    _, sent = fitted(world, [1, 0])
    assert sent.blocks == [0, 1] and sent.sensitivity == {}


@pytest.mark.parametrize("sent", [0.99, [0, 1, 2, 3]])
def test_all_blocks_are_the_upload_that_there_is_without(world, half, sent, tmp_path):
    module, callback = fitted(world, sent)
    assert callback.blocks is None
    module.write_upload(tmp_path / "all", "photo", 38, blocks=callback.blocks)
    half[0].write_upload(tmp_path / "plain", "photo", 38)
    for file in (tmp_path / "plain").iterdir():
        assert (tmp_path / "all" / file.name).read_bytes() == file.read_bytes()


def test_how_far_the_adapter_reaches_is_measured_of_what_is_sent(world):
    sent = SentBlocks([2])
    reach = ReachCallback(sent)
    data = DomainDataModule(str(world / "domains"), "photo", base=SHAPES_CLIP, batch_size=19, cache=False)
    module = CLIPLoRAModule(SHAPES_CLIP, learning_rate=0.01)
    quiet_trainer(sent, reach, max_epochs=2, limit_val_batches=0).fit(module, datamodule=data)
    held_out, base = data.held_out(64), load_base(SHAPES_CLIP)
    for name, layer in module.layers().items():
        if block_of(name) == 2:
            base.tower.get_submodule(name).weight.data.add_(layer.delta())
    with torch.no_grad():
        features = normalize(base.tower(data._preprocess.normalise(held_out.images)).image_embeds, dim=-1)
    shares = (base.logit_scale * features @ module.class_features.T).softmax(-1)
    expected = float(shares[torch.arange(len(shares)), held_out.labels].mean())
    assert reach.reach["plain"][-1] == pytest.approx(expected, abs=2e-4)
    assert all(layer.scale == 2 for layer in module.layers().values()), "the adapter is whole again"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"sent_blocks": 0.0}, r"must lie in \(0, 1\], got 0; for one block alone write \[0\]"),
        ({"sent_blocks": 3.0}, r"got 3; for one block alone write \[3\]"),
        ({"sent_blocks": []}, "must name blocks by their numbers, each once"),
        ({"sent_blocks": [1, 1]}, r"each once, got \[1, 1\]"),
        ({"sent_blocks": [4]}, r"no adapter is in block 4; there are some in \[0, 1, 2, 3\]"),
        ({"sent_blocks": 0.5, "towers": ["vision", "text"]}, r"leave text out of model\.towers"),
    ],
)
def test_blocks_that_cannot_be_sent_are_refused(world, settings, named):
    data = DomainDataModule(str(world / "domains"), "photo", base=SHAPES_CLIP, cache=False)
    with pytest.raises(InputError, match=rf"model\.sent_blocks.*{named}"):
        quiet_trainer(max_epochs=1).fit(CLIPLoRAModule(SHAPES_CLIP, **settings), datamodule=data)
