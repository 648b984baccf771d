"""One client: what it trains on, what it leaves behind, and what keeps it from training."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from federation.runs import contents
from places import SHAPES_CLIP
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sap_lightning.data.domains import DomainDataModule
from sap_lightning.errors import InputError
from sap_lightning.federation.client import train_client
from sap_lightning.federation.run_folder import RunFolder
from sap_lightning.files import locked
from sap_lightning.modules.clip_lora import CLIPLoRAModule


@pytest.fixture
def photo(world) -> DomainDataModule:
    return DomainDataModule(str(world / "domains"), "photo", base=SHAPES_CLIP)


def train(data: DomainDataModule, folder: Path, make_trainer: Any) -> Path:
    return train_client(CLIPLoRAModule(SHAPES_CLIP), data, RunFolder(folder), make_trainer, "client")


def no_trainer(**overrides: Any) -> None:
    pytest.fail("nothing is to be trained")


def test_a_client_alone_uploads_the_same_bits_as_in_a_federation(finished, run, tmp_path):
    run("client", "--data.domain=photo", f"--federation.run_dir={tmp_path}")
    assert contents(tmp_path / "uploads" / "photo") == contents(finished / "uploads" / "photo")


def test_tensorboard_shows_what_a_client_learns(finished):
    client = EventAccumulator(str(finished / "clients" / "photo")).Reload()
    assert {"train/loss", "train/accuracy", "val/loss", "val/accuracy"} <= set(client.Tags()["scalars"])


def test_a_client_whose_upload_stands_is_not_trained_again(photo, finished):
    before = contents(finished / "clients" / "photo")
    assert train(photo, finished, no_trainer) == finished / "uploads" / "photo"
    assert contents(finished / "clients" / "photo") == before


def test_a_client_without_a_domain_is_told_which_there_are(world, tmp_path):
    data = DomainDataModule(str(world / "domains"), base=SHAPES_CLIP)
    with pytest.raises(InputError, match=r"data\.domain is not set; choose one of cartoon, painting, photo, sketch"):
        train(data, tmp_path, no_trainer)
    assert list(tmp_path.iterdir()) == []


def test_a_client_that_another_command_trains_is_refused(photo, tmp_path):
    refused = pytest.raises(InputError, match="clients/photo: another command is writing there; wait for it")
    with locked(RunFolder(tmp_path).client("photo")), refused:
        train(photo, tmp_path, no_trainer)


def test_a_domain_that_an_upload_cannot_name_is_refused_before_training(world, run, tmp_path):
    shutil.copytree(world / "domains", tmp_path / "domains")
    (tmp_path / "domains" / "sketch").rename(tmp_path / "domains" / "Gemälde")
    root, folder = f"--data.root={tmp_path / 'domains'}", tmp_path / "run"
    with pytest.raises(InputError, match="domain 'Gemälde': its name must be at most 64 letters"):
        run("client", root, "--data.domain=Gemälde", f"--federation.run_dir={folder}")
    assert not list(folder.rglob("*.ckpt"))
