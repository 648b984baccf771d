"""A client's training, by real short runs on one small domain."""

from __future__ import annotations

import json
import math
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from places import SHAPES_CLIP
from references import quiet_trainer
from safetensors.torch import load_file
from torch.testing import assert_close

from sap_lightning.data import DomainDataModule
from sap_lightning.errors import InputError
from sap_lightning.fingerprints import fingerprint
from sap_lightning.functional.lora import LoRALayer
from sap_lightning.io.adapter import read_adapter, sha256_of
from sap_lightning.models.clip import load_base
from sap_lightning.models.layers import layer_shapes
from sap_lightning.modules import CLIPLoRAModule
from sap_lightning.modules.turn import Turn

TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


@pytest.fixture(scope="module")
def data(world: Path) -> DomainDataModule:
    """38 images to train on in 2 steps an epoch, 10 to validate on."""
    return DomainDataModule(str(world / "domains"), "photo", base=SHAPES_CLIP, batch_size=16, cache=False)


def untrained(data: DomainDataModule, **settings: Any) -> CLIPLoRAModule:
    module = CLIPLoRAModule(SHAPES_CLIP, **settings)
    quiet_trainer(limit_val_batches=1).validate(module, data, verbose=False)
    return module


def trained(data: DomainDataModule, epochs: int = 1, **settings: Any) -> CLIPLoRAModule:
    module = CLIPLoRAModule(SHAPES_CLIP, **settings)
    quiet_trainer(max_epochs=epochs).fit(module, datamodule=data)
    return module


def assert_same_adapter(one: dict[str, LoRALayer], other: dict[str, LoRALayer]) -> None:
    assert one.keys() == other.keys()
    for name, layer in one.items():
        assert torch.equal(layer.A, other[name].A) and torch.equal(layer.B, other[name].B), name


def test_the_initial_adapter_is_a_function_of_the_seed(data):
    torch.manual_seed(1)
    first = untrained(data, seed=3).layers()
    torch.manual_seed(2)
    second = untrained(data, seed=3).layers()
    other = untrained(data, seed=4).layers()
    assert_same_adapter(first, second)
    assert not any(torch.equal(layer.A, other[name].A) for name, layer in first.items())


def test_an_untrained_adapter_changes_nothing(data):
    assert not any(layer.delta().any() for layer in untrained(data).layers().values())


def test_making_the_adapter_leaves_the_random_state_alone(data):
    module = CLIPLoRAModule(SHAPES_CLIP)
    module.trainer = quiet_trainer()
    module.trainer.datamodule = data  # type: ignore[attr-defined]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    module.configure_model()
    assert torch.equal(torch.get_rng_state(), before)


def test_rank_alpha_and_targets_shape_the_adapter(data):
    layers = untrained(data, rank=3, alpha=12, targets=["fc1", "visual_projection"]).layers()
    shapes = layer_shapes(load_base(SHAPES_CLIP).tower)
    assert layers.keys() == {name for name in shapes if name.endswith(("fc1", "visual_projection"))}
    for name, layer in layers.items():
        assert layer.A.shape == (3, shapes[name][1]) and layer.B.shape == (shapes[name][0], 3)
        assert layer.scale == 4


def test_only_the_adapter_is_trained_and_the_text_tower_is_not_there(data):
    module = untrained(data)
    trainable = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 4 * len(TARGETS) * 2
    assert all("lora_" in name for name in trainable)
    assert not any("text" in name or "logit_scale" in name for name, _ in module.named_parameters())


def test_training_moves_the_adapter_and_nothing_else(data):
    module = trained(data)
    assert all(layer.delta().any() for layer in module.layers().values())
    base = load_base(SHAPES_CLIP)
    frozen = {
        name.removeprefix("tower.base_model.model.").replace(".base_layer", ""): parameter
        for name, parameter in module.named_parameters()
        if not parameter.requires_grad
    }
    assert_close(frozen, dict(base.tower.named_parameters()), atol=0, rtol=0)
    assert module.logit_scale == base.logit_scale


def test_the_same_seed_gives_the_same_bits(data):
    torch.manual_seed(1)
    first = trained(data, dropout=0.5).layers()
    torch.manual_seed(2)
    assert_same_adapter(trained(data, dropout=0.5).layers(), first)


class Losses(L.Callback):
    def __init__(self) -> None:
        self.epochs: list[float] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.epochs.append(float(trainer.callback_metrics["train/loss"]))


def test_training_teaches_names_that_are_not_the_base_s(world, tmp_path):
    classes = sorted((world / "domains" / "photo").iterdir())
    for folder, other in zip(classes, [*classes[1:], classes[0]], strict=True):
        shutil.copytree(folder, tmp_path / "photo" / other.name)
    data = DomainDataModule(str(tmp_path), "photo", base=SHAPES_CLIP, augment=False, cache=False)
    seen = Losses()
    module = CLIPLoRAModule(SHAPES_CLIP, learning_rate=0.01)
    quiet_trainer(seen, max_epochs=12, limit_val_batches=0).fit(module, datamodule=data)
    assert seen.epochs[-1] < 0.5 * seen.epochs[0], seen.epochs


class Rates(L.Callback):
    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, index: int) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_the_learning_rate_rises_and_falls_as_a_cosine_to_nothing(data):
    seen = Rates()
    runner = quiet_trainer(seen, max_epochs=5, limit_val_batches=0)
    runner.fit(CLIPLoRAModule(SHAPES_CLIP, learning_rate=0.01, warmup=0.2, rank=1), datamodule=data)
    rising = [0, 0.005]
    falling = [0.005 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert seen.rates == pytest.approx(rising + falling)
    assert runner.optimizers[0].param_groups[0]["lr"] == pytest.approx(0)


def test_on_a_constant_schedule_the_learning_rate_rises_and_stays(data):
    seen = Rates()
    runner = quiet_trainer(seen, max_epochs=5, limit_val_batches=0)
    runner.fit(
        CLIPLoRAModule(SHAPES_CLIP, learning_rate=0.01, warmup=0.2, schedule="constant", rank=1), datamodule=data
    )
    assert seen.rates == pytest.approx([0, 0.005] + [0.01] * 8)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_over_all_rounds_together_the_learning_rate_goes_on_in_each_where_it_was(data, schedule):
    settings = {"learning_rate": 0.01, "warmup": 0.3, "rank": 1, "schedule": schedule}
    whole, one, two, anew = (Rates() for _ in range(4))
    quiet_trainer(whole, max_epochs=4, limit_val_batches=0).fit(
        CLIPLoRAModule(SHAPES_CLIP, **settings), datamodule=data
    )
    turns = (one, Turn(0, 2)), (two, Turn(1, 2)), (anew, Turn(1, 2, "round"))
    for seen, turn in turns:
        client = CLIPLoRAModule(SHAPES_CLIP, **settings).for_turn(turn)
        quiet_trainer(seen, max_epochs=2, limit_val_batches=0).fit(client, datamodule=data)
    assert one.rates + two.rates == whole.rates
    alone = Rates()
    quiet_trainer(alone, max_epochs=2, limit_val_batches=0).fit(
        CLIPLoRAModule(SHAPES_CLIP, **settings), datamodule=data
    )
    assert anew.rates == alone.rates != two.rates


@pytest.mark.parametrize(("rank", "kept"), [(2, 2), (3, 3), (5, 3)])
def test_a_client_starts_from_what_it_is_handed_as_far_as_its_rank_goes(data, rank, kept):
    drawn = untrained(data, rank=rank).layers()
    start = {
        name: LoRALayer(torch.randn(3, layer.shape[1]), torch.randn(layer.shape[0], 3), 0.5)
        for name, layer in drawn.items()
    }
    client = CLIPLoRAModule(SHAPES_CLIP, rank=rank).for_turn(Turn(1, 2, start=start))
    quiet_trainer(limit_val_batches=1).validate(client, data, verbose=False)
    for name, layer in client.layers().items():
        A, B, scale = start[name]
        assert_close(layer.delta(), scale * B[:, :kept] @ A[:kept])
        assert torch.equal(layer.A[:kept], A[:kept]), "in the same factors"
        assert torch.equal(layer.A[kept:], drawn[name].A[kept:]), "what is not handed can still be trained"


def test_an_upload_of_a_round_says_of_which(data, tmp_path):
    client = CLIPLoRAModule(SHAPES_CLIP).for_turn(Turn(1, 3))
    assert not client.reach, "which only the last round is asked for"
    assert CLIPLoRAModule(SHAPES_CLIP).for_turn(Turn(2, 3)).reach
    quiet_trainer(limit_val_batches=1).validate(client, data, verbose=False)
    manifest = read_adapter(client.write_upload(tmp_path / "upload", "photo", 3)).manifest
    assert manifest is not None and (manifest.format_version, manifest.round, manifest.kind) == (2, 1, "lora")


class FirstBatch(L.Callback):
    """The first batch as the module sees it, and its logits by the untrained module."""

    logits: torch.Tensor
    labels: torch.Tensor

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, index: int) -> None:
        with torch.no_grad():
            self.logits, self.labels = pl_module(batch.images), batch.labels


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_loss_is_cross_entropy_with_smoothed_labels(data, smoothing):
    first = FirstBatch()
    runner = quiet_trainer(first, max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    runner.fit(CLIPLoRAModule(SHAPES_CLIP, label_smoothing=smoothing), datamodule=data)
    log_probabilities = first.logits.double().log_softmax(1)
    target = torch.eye(8, dtype=torch.float64)[first.labels] * (1 - smoothing) + smoothing / 8
    expected = -(target * log_probabilities).sum(1).mean()
    assert float(runner.callback_metrics["train/loss"]) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_resumed_after_an_epoch_with_dropout_it_ends_in_the_same_bits(data, tmp_path):
    each_epoch = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole = CLIPLoRAModule(SHAPES_CLIP, dropout=0.5)
    quiet_trainer(each_epoch, max_epochs=2, enable_checkpointing=True).fit(whole, datamodule=data)
    torch.manual_seed(99)
    resumed = CLIPLoRAModule(SHAPES_CLIP, dropout=0.5)
    first_epoch = tmp_path / "epoch=0.ckpt"
    quiet_trainer(max_epochs=2).fit(resumed, datamodule=data, ckpt_path=first_epoch, weights_only=True)
    assert_same_adapter(resumed.layers(), whole.layers())


def test_a_checkpoint_holds_the_adapter_and_what_it_takes_to_go_on(finished):
    file = finished / "clients" / "photo" / "last.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    assert len(checkpoint["state_dict"]) == 4 * len(TARGETS) * 2
    assert all(".lora_" in name for name in checkpoint["state_dict"])
    assert {"optimizer_states", "lr_schedulers", "loops"} <= checkpoint.keys()
    adapter = sum(tensor.nbytes for tensor in checkpoint["state_dict"].values())
    assert file.stat().st_size < 4 * adapter, "the adapter and two moments of it"


def test_an_upload_says_what_it_was_made_from(finished, world):
    manifest = json.loads((finished / "uploads" / "photo" / "manifest.json").read_text())
    tower = load_base(SHAPES_CLIP).tower
    adapter = read_adapter(finished / "uploads" / "photo", layer_shapes(tower))
    classes = [folder.name for folder in sorted((world / "domains" / "photo").iterdir())]
    assert manifest.pop("reach").keys() == {"plain", "grey", "edges", "posterised", "retextured"}
    assert len(manifest.pop("fields_sha256")) == 64
    assert manifest == {
        "format_version": 1,
        "base": Path(SHAPES_CLIP).name,
        "base_fingerprint": fingerprint(tower),
        "domain": "photo",
        "class_names": classes,
        "num_samples": 38,
        "rank": 8,
        "alpha": 16,
        "targets": list(TARGETS),
        "seed": 0,
        "packages": {name: version(name) for name in ("lightning", "peft", "torch", "transformers")},
        "tensors_sha256": sha256_of(adapter.layers),
    }


def test_before_training_there_is_nothing_to_send(tmp_path):
    with pytest.raises(InputError, match="has no adapter yet; fit"):
        CLIPLoRAModule(SHAPES_CLIP).write_upload(tmp_path / "upload", "photo", 1)
    assert not (tmp_path / "upload").exists()


def test_an_upload_holds_the_trained_adapter(data, tmp_path):
    module = trained(data)
    module.write_upload(tmp_path / "upload", "photo", data.num_samples)
    stored = load_file(tmp_path / "upload" / "adapter_model.safetensors")
    trained_parameters = {
        name.removeprefix("tower.").replace(".default", ""): parameter.detach()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    assert_close(stored, trained_parameters, atol=0, rtol=0)
    with pytest.raises(InputError, match="already exists"):
        module.write_upload(tmp_path / "upload", "photo", data.num_samples)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"targets": ["no_such_layer"]}, r"no linear layer 'no_such_layer'; it has fc1, fc2, k_proj"),
        ({"targets": ["q_proj", "no_such_layer"]}, r"no linear layer 'no_such_layer'"),
        ({"targets": ["layer_norm1"]}, r"no linear layer 'layer_norm1'"),
        ({"targets": ["patch_embedding"]}, r"no linear layer 'patch_embedding'"),
        ({"targets": ["proj"]}, r"no linear layer 'proj'"),
        ({"targets": []}, r"model\.targets is empty"),
        ({"rank": 0}, r"model\.rank"),
        ({"rank": -1}, r"model\.rank"),
        ({"alpha": math.nan}, r"model\.alpha"),
        ({"alpha": 0.0}, r"model\.alpha"),
        ({"dropout": 1.5}, r"model\.dropout"),
        ({"learning_rate": -1.0}, r"model\.learning_rate"),
        ({"learning_rate": 0.0}, r"model\.learning_rate"),
        ({"weight_decay": -1.0}, r"model\.weight_decay"),
        ({"warmup": 1.5}, r"model\.warmup"),
        ({"warmup": -0.5}, r"model\.warmup"),
        ({"label_smoothing": 1.5}, r"model\.label_smoothing"),
        ({"templates": ["a photo"]}, r"model\.templates"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_name(data, settings, named):
    with pytest.raises(InputError, match=named):
        trained(data, **settings)


def test_no_file_that_is_sent_or_published_has_a_path_of_this_machine(finished):
    """With a base in a folder, as here; the model's weights are searched too."""
    files = [file for part in ("uploads", "merged") for file in (finished / part).rglob("*") if file.is_file()]
    assert len(files) > 10
    paths = [str(path).encode() for path in (Path(SHAPES_CLIP).parent, finished, Path.home(), Path.cwd())]
    for file in files:
        content = file.read_bytes()
        assert not [path for path in paths if path in content], file
