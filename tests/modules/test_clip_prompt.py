"""A prompt client's training, by real short runs on one small domain."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from places import SHAPES_CLIP
from references import quiet_trainer
from safetensors.torch import load_file
from torch import Tensor

from sap_lightning.data import DomainDataModule
from sap_lightning.errors import InputError
from sap_lightning.io.context import as_layer, context_layer
from sap_lightning.io.prompt import read_prompt, write_prompt
from sap_lightning.models.clip import load_base
from sap_lightning.modules import CLIPPromptModule, MergeModule
from sap_lightning.modules.feature_memory import FeatureMemory
from sap_lightning.modules.turn import Turn

WORDS = "a photo of a"


@pytest.fixture(scope="module")
def data(world: Path) -> DomainDataModule:
    """38 images to train on in 2 steps an epoch, 10 to validate on; as they are, so that their features stay."""
    return DomainDataModule(
        str(world / "domains"), "photo", base=SHAPES_CLIP, batch_size=16, augment=False, cache=False
    )


def prompt(**settings: Any) -> CLIPPromptModule:
    return CLIPPromptModule(SHAPES_CLIP, **settings)


def untrained(data: DomainDataModule, **settings: Any) -> CLIPPromptModule:
    module = prompt(**settings)
    quiet_trainer().validate(module, data, verbose=False)
    return module


def trained(data: DomainDataModule, epochs: int = 2, **settings: Any) -> CLIPPromptModule:
    module = prompt(**settings)
    quiet_trainer(max_epochs=epochs, limit_val_batches=0).fit(module, datamodule=data)
    return module


@pytest.fixture(scope="module")
def once(data) -> CLIPPromptModule:
    """A client that has trained."""
    return trained(data)


def context_of(module: CLIPPromptModule) -> Tensor:
    return module.context.detach()


def test_the_first_context_is_noise_of_the_seed_and_leaves_the_random_state_alone(data):
    module = prompt(seed=3)
    module.trainer = quiet_trainer()
    module.trainer.datamodule = data  # type: ignore[attr-defined]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    module.configure_model()
    assert torch.equal(torch.get_rng_state(), before)
    first = context_of(module)
    assert torch.equal(context_of(untrained(data, seed=3)), first)
    assert not torch.equal(context_of(untrained(data, seed=4)), first)
    assert first.shape == (16, 64) and first.std() == pytest.approx(0.02, rel=0.1) and abs(first.mean()) < 0.002


def test_the_embeddings_of_words_give_zero_shot_s_logits(data):
    module = untrained(data, init=WORDS)
    base = load_base(SHAPES_CLIP)
    assert torch.equal(context_of(module), base.texts.token_embedding.weight[base.texts.tokens(WORDS)])
    expected = base.texts.class_features(data.class_names, [f"{WORDS} {{}}."])
    torch.testing.assert_close(module.class_features, expected, atol=1e-5, rtol=0)


def test_training_moves_the_context_and_nothing_else(data, once):
    before, module = context_of(untrained(data)), once
    assert [name for name, parameter in module.named_parameters() if parameter.requires_grad] == ["context"]
    assert context_of(module).ne(before).all()
    base = load_base(SHAPES_CLIP)
    for name, own in {"tower": base.tower, "text_tower": base.texts.tower}.items():
        found = getattr(module, name)
        assert not any(part.training for part in found.modules())
        for key, tensor in own.state_dict().items():
            assert torch.equal(found.state_dict()[key], tensor), key


class Watch(L.Callback):
    """The loss of every epoch and the learning rate of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, index: int) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))


def test_training_teaches_names_that_are_not_the_base_s(world, tmp_path):
    """Of two classes, as one context for all classes cannot tell every class anew."""
    for folder, other in (("boat", "car"), ("car", "boat")):
        shutil.copytree(world / "domains" / "photo" / folder, tmp_path / "photo" / other)
    data = DomainDataModule(str(tmp_path), "photo", base=SHAPES_CLIP, augment=False, cache=False)
    seen = Watch()
    quiet_trainer(seen, max_epochs=40, limit_val_batches=0).fit(prompt(learning_rate=0.05), datamodule=data)
    assert seen.losses[-1] < 0.5 * seen.losses[0], seen.losses


def test_the_learning_rate_is_low_for_an_epoch_then_falls_as_a_cosine_by_epochs(data):
    seen = Watch()
    module = prompt(learning_rate=0.01, warmup_epochs=1, warmup_rate=1e-5)
    trainer = quiet_trainer(seen, max_epochs=4, limit_val_batches=0)
    trainer.fit(module, datamodule=data)
    expected = [1e-5, *(0.005 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(3))]
    assert seen.rates == pytest.approx([rate for rate in expected for _ in range(2)])
    (group,) = trainer.optimizers[0].param_groups
    assert isinstance(trainer.optimizers[0], torch.optim.SGD)
    assert (group["momentum"], group["weight_decay"]) == (0.9, 5e-4)


@pytest.mark.parametrize(("epochs", "said"), [(1, True), (2, False)])
def test_a_prompt_that_only_warms_up_is_said(data, caplog, epochs, said):
    quiet_trainer(max_epochs=epochs, limit_val_batches=0).fit(prompt(warmup_epochs=1), datamodule=data)
    assert ("model.warmup_epochs 1: the prompt trains for 1, all at" in caplog.text) == said


def test_the_steps_are_those_of_sgd_on_cross_entropy_written_out(data):
    """Two full batches of all 38 images, whose order does not count."""
    data = DomainDataModule(data.root, "photo", base=SHAPES_CLIP, batch_size=64, augment=False, cache=False)
    module = prompt(learning_rate=0.5, warmup_epochs=0)
    quiet_trainer(max_epochs=2, limit_val_batches=0).fit(module, datamodule=data)
    part = data.training_part
    base = load_base(SHAPES_CLIP)
    with torch.no_grad():
        batch = part[list(range(len(part)))]
        images = torch.nn.functional.normalize(base.tower(data.normalised(batch).images).image_embeds, dim=-1)
    start = untrained(data)
    context, velocity = context_of(start).clone(), 0.0
    for rate in (0.5, 0.25):
        context.requires_grad_()
        classes = start._prompts.features(context)
        loss = torch.nn.functional.cross_entropy(base.logit_scale * images @ classes.T, batch.labels)
        (gradient,) = torch.autograd.grad(loss, context)
        velocity = 0.9 * velocity + gradient + 5e-4 * context.detach()
        context = context.detach() - rate * velocity
    torch.testing.assert_close(context_of(module), context, atol=1e-6, rtol=1e-4)


def test_the_same_seed_gives_the_same_bits_whether_features_were_kept_or_not(data, once, tmp_path, monkeypatch):
    monkeypatch.setenv("SAP_LIGHTNING_CACHE", str(tmp_path / "cache"))
    first = context_of(once)
    keeping = DomainDataModule(data.root, "photo", base=SHAPES_CLIP, batch_size=16, augment=False)
    assert torch.equal(context_of(trained(keeping)), first)
    (kept,) = (tmp_path / "cache" / "features").iterdir()
    written = kept.stat().st_mtime_ns
    assert torch.equal(context_of(trained(keeping)), first)
    assert kept.stat().st_mtime_ns == written
    assert load_file(kept)["features"].shape == (48, 64)


def test_features_are_looked_up_where_images_stay_and_made_anew_where_they_are_augmented(data, monkeypatch):
    calls: list[int] = []
    plain = CLIPPromptModule.image_features

    def counted(self: CLIPPromptModule, images: Tensor) -> Tensor:
        calls.append(len(images))
        return plain(self, images)

    monkeypatch.setattr(CLIPPromptModule, "image_features", counted)
    trained(data)
    assert calls == [48]
    calls.clear()
    varied = DomainDataModule(data.root, "photo", base=SHAPES_CLIP, batch_size=16, cache=False)
    quiet_trainer(max_epochs=2, limit_val_batches=0).fit(prompt(), datamodule=varied)
    assert calls == [48, *[16] * 4]


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_resumed_after_an_epoch_it_ends_in_the_same_bits(data, tmp_path):
    each_epoch = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole = prompt()
    quiet_trainer(each_epoch, max_epochs=3, enable_checkpointing=True).fit(whole, datamodule=data)
    resumed = prompt()
    first_epoch = tmp_path / "epoch=0.ckpt"
    quiet_trainer(max_epochs=3).fit(resumed, datamodule=data, ckpt_path=first_epoch, weights_only=True)
    assert torch.equal(context_of(resumed), context_of(whole))
    assert torch.load(first_epoch, weights_only=True)["state_dict"].keys() == {"context"}


def test_mixed_precision_leaves_the_context_in_float32(data):
    module = prompt()
    quiet_trainer(max_epochs=2, precision="bf16-mixed").fit(module, datamodule=data)
    assert module.context.dtype == torch.float32
    assert context_of(module).ne(context_of(untrained(data))).all()


def test_a_precision_in_which_steps_are_lost_is_refused(data):
    with pytest.raises(InputError, match=r"trainer\.precision bf16-true: steps of SGD would be lost"):
        quiet_trainer(max_epochs=1, precision="bf16-true").fit(prompt(), datamodule=data)


def test_more_tokens_than_the_tower_reads_are_refused_before_they_are_drawn(data):
    with pytest.raises(
        InputError, match=r"model.tokens 1000000000: the text tower has room for 28 beside a class's name"
    ):
        untrained(data, tokens=10**9)


def test_without_epochs_the_rate_falls_over_the_steps(data):
    module = prompt(warmup_epochs=0)
    trainer = quiet_trainer(max_epochs=-1, max_steps=3, limit_val_batches=0)
    trainer.fit(module, datamodule=data)
    rates = [trainer.lr_scheduler_configs[0].scheduler.lr_lambdas[0](epoch) for epoch in range(2)]
    assert trainer.global_step == 3 and rates == pytest.approx([1, 0.5]), "a cosine of two epochs of two steps"


def test_the_rate_falls_over_the_epochs_where_batches_are_taken_together(data):
    module = prompt(warmup_epochs=0)
    trainer = quiet_trainer(max_epochs=4, limit_val_batches=0, accumulate_grad_batches=2)
    trainer.fit(module, datamodule=data)
    rates = [trainer.lr_scheduler_configs[0].scheduler.lr_lambdas[0](epoch) for epoch in range(4)]
    assert trainer.num_training_batches == 2 and trainer.global_step == 4
    assert rates == pytest.approx([1, 0.854, 0.5, 0.146], abs=1e-3)


def test_training_without_an_end_is_refused(data):
    with pytest.raises(InputError, match=r"training has no end in steps, .*; give trainer.max_epochs or"):
        trained(data, epochs=-1)


def test_a_context_can_start_from_a_prompt_in_a_folder_or_in_memory(data, tmp_path):
    first = untrained(data, tokens=4, class_position="middle", seed=5)
    folder = first.write_upload(tmp_path / "upload", "photo", data.num_samples)
    for again in (
        untrained(data, start=str(folder), class_position="middle"),
        untrained_from(data, prompt(class_position="middle").for_turn(Turn(start=first.layers()))),
    ):
        assert torch.equal(context_of(again), context_of(first))
    with pytest.raises(InputError, match=r"class's name stands at the middle, model.class_position is end; set it to"):
        untrained(data, start=str(folder))
    with pytest.raises(InputError, match=r"the prompt in model.start .* has 4 tokens; model.tokens is 5; leave it out"):
        untrained(data, start=str(folder), class_position="middle", tokens=5)
    other = write_prompt(tmp_path / "wide", {context_layer("end"): as_layer(torch.ones(2, 65))})
    with pytest.raises(InputError, match=r"shape \(2, 65\), expected \(tokens, 64\)"):
        untrained(data, start=str(other))


def untrained_from(data: DomainDataModule, module: CLIPPromptModule) -> CLIPPromptModule:
    quiet_trainer().validate(module, data, verbose=False)
    return module


def test_the_server_classifies_by_an_upload_as_its_client_does(data, tmp_path):
    module = untrained(data, class_position="middle")
    server = MergeModule(SHAPES_CLIP)
    (upload,) = server.read_uploads([module.write_upload(tmp_path / "upload", "photo", data.num_samples)])
    worn = []
    for update in ({}, upload.layers, {}):
        server.set_update(update)
        quiet_trainer(limit_test_batches=1).test(server, data, verbose=False)
        worn.append(server.class_features)
    torch.testing.assert_close(worn[1], module.class_features, atol=1e-5, rtol=0)
    assert (worn[1] - worn[0]).abs().max() > 0.01
    assert torch.equal(worn[2], worn[0]), "without the context it is zero-shot again"


# What is sent, and what is not


def test_an_upload_says_what_it_was_made_from_and_holds_the_context_alone(data, once, tmp_path):
    module = once
    folder = module.write_upload(tmp_path / "upload", "photo", data.num_samples)
    assert {file.name for file in folder.iterdir()} == {"prompt.safetensors", "manifest.json"}
    ((key, sent),) = load_file(folder / "prompt.safetensors").items()
    assert key == context_layer("end") and torch.equal(sent, context_of(module))
    manifest = read_prompt(folder, None, module.base_fingerprint).manifest
    assert manifest is not None
    assert (manifest.kind, manifest.rank, manifest.num_samples, manifest.seed) == ("prompt", 16, 38, 0)
    assert manifest.class_names == tuple(data.class_names)
    assert module.base_fingerprint == load_base(SHAPES_CLIP).fingerprint(["text_model"])


def test_nothing_that_the_memory_holds_is_in_what_is_sent(data, once, tmp_path):
    module = once
    folder = module.write_upload(tmp_path / "upload", "photo", data.num_samples)
    sent = b"".join(file.read_bytes() for file in folder.iterdir())
    assert len(sent) < 16 * 64 * 4 + 2000, "the context and a manifest have that size, 38 features ten times as much"
    for feature in module._seen:
        for kept in (feature, feature.half()):
            assert kept[:4].numpy().tobytes() not in sent
    assert context_of(module)[0, :4].numpy().tobytes() in sent, "what is sent would be found so"


# The memory


def personal(data: DomainDataModule, **settings: Any) -> dict[str, float]:
    (metrics,) = quiet_trainer().validate(prompt(memory=FeatureMemory(**settings)), data, verbose=False)
    return metrics


def test_without_alpha_the_memory_changes_nothing_and_with_much_it_decides(data):
    plain = personal(data, alpha=0)
    assert plain["val/personal_accuracy"] == plain["val/accuracy"]
    remembering = personal(data, alpha=1e6, beta=20)
    assert remembering["val/accuracy"] == plain["val/accuracy"], "the server's model is the prompt alone"
    base = load_base(SHAPES_CLIP)
    with torch.no_grad():
        features = torch.nn.functional.normalize(
            base.tower(torch.cat([*data.inputs(64, torch.device("cpu"))])).image_embeds
        )
    own, rest = data.training_part, data._val
    likeness = torch.exp(-20 * (1 - features[rest.rows].double() @ features[own.rows].double().T))
    votes = torch.stack([likeness[:, own.labels[own.rows] == label].sum(1) for label in range(8)], 1)
    expected = (votes.argmax(1) == rest.labels[rest.rows]).double().mean()
    assert remembering["val/personal_accuracy"] == pytest.approx(float(expected))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"tokens": 0}, r"model\.tokens must be at least 1, got 0"),
        ({"tokens": 30}, r"model\.tokens 30: the text tower has room for 28 beside a class's name"),
        ({"init": WORDS, "start": "x"}, r"model\.init and model\.start both say where the context starts"),
        ({"init": WORDS, "tokens": 3}, r"model\.init 'a photo of a' has 4 tokens; model\.tokens is 3; leave it out"),
        ({"init": " "}, r"model\.init ' ' has 0 tokens; give at least one word"),
        ({"start": "/nowhere"}, r"/nowhere: no such folder"),
        ({"learning_rate": 0.0}, r"model\.learning_rate must be above 0"),
        ({"momentum": 1.5}, r"model\.momentum must lie in \[0, 1\]"),
        ({"weight_decay": -1.0}, r"model\.weight_decay"),
        ({"warmup_epochs": -1}, r"model\.warmup_epochs"),
        ({"warmup_rate": math.nan}, r"model\.warmup_rate"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_name(data, settings, named):
    with pytest.raises(InputError, match=named):
        trained(data, **settings)


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_a_memory_takes_no_number_below_0(name):
    with pytest.raises(InputError, match=rf"model\.memory\.{name} must be at least 0"):
        FeatureMemory(**{name: -1.0})
