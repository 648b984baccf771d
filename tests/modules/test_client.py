"""How difficult a client finds its images, and training on the easiest first, by real short runs."""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from places import SHAPES_CLIP
from references import quiet_trainer
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from sap_lightning.callbacks.progress import EpochLog
from sap_lightning.data import DomainDataModule
from sap_lightning.data.curriculum import Curriculum
from sap_lightning.errors import InputError
from sap_lightning.modules import CLIPLoRAModule
from sap_lightning.modules.client import ClientModule, undisturbed
from sap_lightning.modules.clip_prompt import CLIPPromptModule

HALF = Curriculum(start=0.5, full_at=0.75)
EPOCHS = 4


def domain(world: Path, **settings: Any) -> DomainDataModule:
    """38 images to train on."""
    return DomainDataModule(str(world / "domains"), "photo", base=SHAPES_CLIP, batch_size=8, cache=False, **settings)


class Seen(L.Callback):
    """What every epoch shows, and at which rate."""

    def __init__(self) -> None:
        self.epochs: list[list[int]] = []
        self.rates: list[float] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.epochs.append([])

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, index: int) -> None:
        self.epochs[-1] += batch.indices.tolist()
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def trained(data: DomainDataModule, *callbacks: L.Callback, **options: Any) -> CLIPLoRAModule:
    module = CLIPLoRAModule(SHAPES_CLIP, rank=2, dropout=0.3, warmup=0.0)
    quiet = {"max_epochs": EPOCHS, "limit_val_batches": 0, "reload_dataloaders_every_n_epochs": 1}
    quiet_trainer(*callbacks, **quiet | options).fit(module, datamodule=data)
    return module


@pytest.mark.parametrize("made", [CLIPLoRAModule, CLIPPromptModule])
def test_difficulty_is_the_length_of_each_image_s_own_gradient(world, made):
    data, module = domain(world), made(SHAPES_CLIP)
    quiet_trainer(limit_val_batches=1).validate(module, data, verbose=False)
    found = module.difficulty(data)
    assert found.shape == (38,) and (found > 0).all()
    for place in (0, 17, 37):
        batch = data.training_part[[place]]
        module.zero_grad()
        cross_entropy(module(data._preprocess.normalise(batch.images)), batch.labels).backward()
        squares = [float(one.grad.square().sum()) for one in module.parameters() if one.grad is not None]
        assert_close(float(found[place]), sum(squares), rtol=1e-3, atol=1e-6)


def test_images_are_looked_at_without_dropout_and_the_module_is_left_as_it_was(world):
    data, module = domain(world), CLIPLoRAModule(SHAPES_CLIP, dropout=0.5)
    quiet_trainer(limit_val_batches=1).validate(module, data, verbose=False)
    before = [part.training for part in module.modules()]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(module.difficulty(data), module.difficulty(data))
    assert torch.equal(torch.get_rng_state(), state)
    with undisturbed(module):
        assert not any(part.training for part in module.modules())
    assert [part.training for part in module.modules()] == before


@pytest.fixture(scope="module")
def halved(world) -> tuple[Seen, DomainDataModule]:
    seen, data = Seen(), domain(world, curriculum=HALF)
    trained(data, seen)
    return seen, data


def test_an_epoch_shows_the_easiest_images_and_the_last_shows_all_once(world, halved):
    seen, data = halved
    untrained = CLIPLoRAModule(SHAPES_CLIP, rank=2)
    plain = domain(world)
    quiet_trainer(limit_val_batches=1).validate(untrained, plain, verbose=False)
    order = data.training_part.rows[untrained.difficulty(plain).argsort(stable=True)].tolist()
    for epoch, shown in enumerate(seen.epochs):
        number = HALF.images(38, 8, epoch, EPOCHS)
        assert len(shown) == len(set(shown)) == number // 8 * 8
        assert set(shown) <= set(order[:number])
    assert [len(shown) for shown in seen.epochs] == [16, 24, 32, 32]
    assert HALF.images(38, 8, EPOCHS - 1, EPOCHS) == 38


def test_the_learning_rate_falls_over_the_steps_that_there_are(halved):
    seen, _ = halved
    steps = 2 + 3 + 4 + 4
    assert seen.rates == pytest.approx([0.0005 * (1 + math.cos(math.pi * step / steps)) for step in range(steps)])


def test_a_share_that_leaves_no_image_out_trains_the_same_bits_as_none(world):
    plain = trained(domain(world), max_epochs=2).layers()
    whole = trained(domain(world, curriculum=Curriculum(start=0.99)), max_epochs=2).layers()
    for name, layer in plain.items():
        assert torch.equal(layer.A, whole[name].A) and torch.equal(layer.B, whole[name].B)


def test_the_time_left_counts_the_steps_that_there_are(world, caplog):
    caplog.set_level(logging.INFO, logger="sap_lightning")
    trained(domain(world, curriculum=HALF), EpochLog("client"))
    said = [record.getMessage() for record in caplog.records if record.name.startswith("sap_lightning")]
    assert re.fullmatch(r"photo: difficulty of 38 images, \d+ s", said[0])
    assert said[-1].endswith("about 0 s left")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"reload_dataloaders_every_n_epochs": 0}, "set reload_dataloaders_every_n_epochs 1"),
        ({"max_epochs": -1, "max_steps": 3}, r"set trainer\.max_epochs, and leave out max_steps"),
        ({"max_steps": 3}, "leave out max_steps"),
    ],
)
def test_a_trainer_that_does_not_go_by_epochs_is_refused(world, options, named):
    with pytest.raises(InputError, match=rf"data\.curriculum.*{named}"):
        trained(domain(world, curriculum=HALF), **options)


def test_mislabelled_images_come_last(world):
    """Half of the images are given the next class; the base knows better."""
    wrong = torch.arange(38) % 2 == 0
    relabelled = domain(world).for_domain(
        "photo", relabel=lambda labels, n: torch.where(wrong, (labels + 1) % n, labels)
    )
    module: ClientModule = CLIPLoRAModule(SHAPES_CLIP)
    quiet_trainer(limit_val_batches=1).validate(module, relabelled, verbose=False)
    difficulty = module.difficulty(relabelled)
    assert float(difficulty[wrong].median()) > 2 * float(difficulty[~wrong].median())
