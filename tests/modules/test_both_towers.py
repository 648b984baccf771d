"""Clients that adapt the text tower too, and the server that merges and measures what they send."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from places import SHAPES_CLIP
from references import quiet_trainer, randn
from torch.nn.functional import normalize
from transformers import AutoTokenizer, CLIPModel

from sap_lightning.data import AnchorDataModule, DomainDataModule
from sap_lightning.data.loaders import Batch
from sap_lightning.errors import InputError
from sap_lightning.io.adapter import read_adapter
from sap_lightning.io.peft_config import in_text_tower
from sap_lightning.merging import SAP, Average
from sap_lightning.models.clip import load_base
from sap_lightning.modules import CLIPLoRAModule
from sap_lightning.modules.evaluator import CLIPEvaluator
from sap_lightning.modules.merge import MergeModule

BOTH, TEXT = ["vision", "text"], ["text"]
IMAGES = randn(0, 6, 3, 64, 64)


def data_of(world: Path, domain: str) -> DomainDataModule:
    return DomainDataModule(str(world / "domains"), domain, base=SHAPES_CLIP, batch_size=16, cache=False)


def trained(data: DomainDataModule, *callbacks: Any, towers: list[str], epochs: int = 1, **settings: Any):
    module = CLIPLoRAModule(SHAPES_CLIP, towers=towers, rank=2, learning_rate=0.003, **settings)
    trainer = quiet_trainer(*callbacks, max_epochs=epochs, enable_checkpointing=bool(callbacks))
    trainer.fit(module, datamodule=data)
    return module.eval()


@pytest.fixture(scope="module")
def photo(world) -> CLIPLoRAModule:
    return trained(data_of(world, "photo"), towers=BOTH)


@pytest.fixture(scope="module")
def sent(photo, world, tmp_path_factory) -> list[Path]:
    """Uploads of two clients that adapt both towers."""
    folder = tmp_path_factory.mktemp("both")
    sketch = trained(data_of(world, "sketch"), towers=BOTH)
    return [one.write_upload(folder / name, name, 38) for one, name in ((photo, "photo"), (sketch, "sketch"))]


@pytest.fixture
def module(sent) -> MergeModule:
    module = MergeModule(SHAPES_CLIP, method=Average())
    module.use(module.read_uploads(sent))
    return module


@torch.no_grad()
def peft_logits(model: torch.nn.Module, class_names: list[str]) -> torch.Tensor:
    """What a plain CLIPModel says of the images."""
    prompts = AutoTokenizer.from_pretrained(SHAPES_CLIP)(
        [f"a photo of a {name}." for name in class_names], padding=True, return_tensors="pt"
    )
    return model(**prompts, pixel_values=IMAGES).logits_per_image


def normalised(data: DomainDataModule) -> list[Batch]:
    return [b._replace(images=data._preprocess.normalise(b.images)) for b in data.test_dataloader()]


def whole_clip() -> CLIPModel:
    return CLIPModel.from_pretrained(SHAPES_CLIP).eval()


@torch.no_grad()
def test_an_upload_of_both_towers_is_peft_s_and_classifies_as_its_client_does(photo, sent, world):
    layers = photo.layers()
    assert sum(map(in_text_tower, layers)) == 8 and len(layers) == 8 + 16
    assert all(layer.B.any() for layer in layers.values()), "all of them were trained"
    loaded = PeftModel.from_pretrained(whole_clip(), sent[0]).eval()
    expected = peft_logits(loaded, photo.class_names)
    torch.testing.assert_close(photo(IMAGES), expected, atol=1e-4, rtol=0)
    assert (peft_logits(whole_clip(), photo.class_names) - expected).abs().max() > 0.1
    with pytest.raises(InputError, match="changes the text tower, only the vision tower can be merged here"):
        read_adapter(sent[0], {name: layer.shape for name, layer in layers.items() if not in_text_tower(name)})


@torch.no_grad()
def test_a_client_of_the_text_tower_leaves_images_as_they_are(world):
    client = trained(data_of(world, "photo"), towers=TEXT)
    assert all(map(in_text_tower, client.layers()))
    base = load_base(SHAPES_CLIP)
    torch.testing.assert_close(client.image_features(IMAGES), normalize(base.tower(IMAGES).image_embeds, dim=-1))
    at_start = base.texts.class_features(client.class_names, client.templates)
    assert (client.present_class_features() - at_start).abs().max() > 1e-3, "but not the classes"


def test_the_server_classifies_as_the_client_and_gives_the_base_back(photo, sent, world):
    evaluator, data = CLIPEvaluator(SHAPES_CLIP), data_of(world, "sketch")
    encoded = []

    def tested(update) -> torch.Tensor:
        evaluator.set_update(update)
        quiet_trainer().test(evaluator, datamodule=data, verbose=False)
        encoded.append(evaluator.class_features)
        return evaluator.predictions.probabilities

    adapter = read_adapter(sent[0])
    vision = {name: layer for name, layer in adapter.layers.items() if not in_text_tower(name)}
    zero_shot, client, only_vision, again = (tested(one) for one in ({}, adapter.layers, vision, {}))
    assert torch.equal(zero_shot, again)
    assert encoded[2] is encoded[3], "prompts are encoded anew only where the text tower changed"
    assert not torch.equal(encoded[0], encoded[1])
    assert not torch.equal(client, only_vision)
    of_client = torch.cat([photo(batch.images).softmax(1) for batch in normalised(data)]).detach()
    torch.testing.assert_close(client, of_client, atol=1e-5, rtol=0)


def test_a_merge_of_both_towers_is_the_mean_and_peft_loads_it(module, sent, tmp_path):
    merged = module.merge()
    clients = [read_adapter(folder).layers for folder in sent]
    for name, update in merged.update.items():
        mean = sum(client[name].delta() for client in clients) / 2
        torch.testing.assert_close(update.delta(), mean, atol=1e-7, rtol=1e-5)
    names = ["dog", "cat"]
    adapter = PeftModel.from_pretrained(whole_clip(), merged.save(tmp_path / "adapter")).eval()
    model = CLIPModel.from_pretrained(merged.save(tmp_path / "model", format="model")).eval()
    expected = peft_logits(adapter, names)
    torch.testing.assert_close(peft_logits(model, names), expected, atol=1e-3, rtol=0)
    module.use_classes(names, module.texts.class_features(names, module.templates))
    with torch.no_grad():
        torch.testing.assert_close(module(IMAGES), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("method", [Average(), SAP(0.5), SAP(0.9, "factor", reduction="square")])
def test_validation_measures_images_and_captions_of_the_merge(sent, world, method):
    module = MergeModule(SHAPES_CLIP, method=method)
    module.use(module.read_uploads(sent))
    anchors = AnchorDataModule(str(world / "anchors"), num_pairs=8, base=SHAPES_CLIP, cache=False)
    trainer = quiet_trainer()
    trainer.validate(module, anchors, verbose=False)
    with torch.no_grad():
        captions = module.texts(anchors.captions)
        losses = 1 - (module.image_features(anchors.images()) * captions).sum(1)
    assert float(trainer.callback_metrics["anchor_loss"]) == pytest.approx(float(losses.mean()), abs=1e-5)
    assert (captions - module.caption_features).abs().max() > 1e-3, "the base's are kept as the base's"
    module.encode_captions([*anchors.captions, "another"])
    torch.testing.assert_close(module.caption_features[:8], load_base(SHAPES_CLIP).texts(anchors.captions))


def test_a_base_with_another_text_tower_is_another_base_for_those_who_adapt_it_alone(sent, uploads, tmp_path):
    other = Path(shutil.copytree(SHAPES_CLIP, tmp_path / "base"))
    model = CLIPModel.from_pretrained(other)
    model.text_model.final_layer_norm.weight.data += 1
    model.save_pretrained(other)
    server = MergeModule(str(other))
    with pytest.raises(InputError, match="fingerprint"):
        server.read_uploads(sent)
    assert len(server.read_uploads(uploads)) == len(uploads)


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_resumed_with_both_towers_it_ends_in_the_same_bits_and_its_checkpoint_is_an_upload(world, tmp_path):
    data = data_of(world, "photo")
    each_epoch = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole = trained(data, each_epoch, towers=BOTH, epochs=2, dropout=0.5)
    resumed = CLIPLoRAModule(SHAPES_CLIP, towers=BOTH, rank=2, learning_rate=0.003, dropout=0.5)
    quiet_trainer(max_epochs=2).fit(resumed, datamodule=data, ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True)
    (last,) = MergeModule(SHAPES_CLIP).read_uploads([tmp_path / "epoch=1.ckpt"])
    for name, layer in whole.layers().items():
        for other in (resumed.layers(), dict(last.layers)):
            assert torch.equal(layer.A, other[name].A) and torch.equal(layer.B, other[name].B)


@pytest.mark.parametrize(
    ("towers", "targets", "named"),
    [
        ([], ["q_proj"], r"model\.towers must name vision, text or both, once, got \[\]"),
        (["text", "text"], ["q_proj"], r"model\.towers must name"),
        (["audio"], ["q_proj"], r"model\.towers must name .* got \['audio'\]"),
        (TEXT, ["visual_projection"], "the text tower has no linear layer 'visual_projection'; it has fc1"),
        (BOTH, ["nothing"], "the vision and the text tower has no linear layer 'nothing'"),
    ],
)
def test_towers_that_cannot_be_are_refused_by_name(world, towers, targets, named):
    with pytest.raises(InputError, match=named):
        trained(data_of(world, "photo"), towers=towers, targets=targets)
