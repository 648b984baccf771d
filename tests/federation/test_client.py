"""One client: what it trains on, what it leaves behind, and what keeps it from training."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from federation.runs import times
from places import SHAPES_CLIP
from references import contents
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.testing import assert_close

from sap_lightning.data.curriculum import Curriculum
from sap_lightning.data.domains import DomainDataModule
from sap_lightning.errors import InputError
from sap_lightning.federation.client import train_client
from sap_lightning.federation.run_folder import RunFolder
from sap_lightning.files import locked
from sap_lightning.io.adapter import read_adapter
from sap_lightning.models.layers import block_of
from sap_lightning.modules.clip_lora import CLIPLoRAModule


@pytest.fixture
def photo(world) -> DomainDataModule:
    return DomainDataModule(str(world / "domains"), "photo", base=SHAPES_CLIP)


def train(data: DomainDataModule, folder: Path, make_trainer: Any) -> Path:
    return train_client(CLIPLoRAModule(SHAPES_CLIP), data, RunFolder(folder), make_trainer, "client", {})


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
    assert not folder.exists()


@pytest.mark.parametrize("domain", ["../photo", "/tmp/photo", "nosuch"])
def test_a_domain_that_there_is_not_leaves_nothing_behind(run, tmp_path, domain):
    with pytest.raises(InputError, match=f"no domain '{domain}'; it has cartoon, painting, photo, sketch"):
        run("client", f"--data.domain={domain}", f"--federation.run_dir={tmp_path / 'run'}")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_was_not_trained_is_not_sent(photo, tmp_path):
    def no_time(**overrides: Any) -> L.Trainer:
        return L.Trainer(max_time={"seconds": 0}, max_epochs=1, accelerator="cpu", **overrides)

    with pytest.raises(InputError, match="client: not one step was trained, so nothing is sent"):
        train(photo, tmp_path, no_time)
    assert not (tmp_path / "uploads").exists()


def test_an_adapter_whose_training_diverged_is_not_sent(run, tmp_path):
    with pytest.raises(InputError, match=r"training has diverged, .* lower model\.learning_rate"):
        run("client", "--data.domain=photo", "--model.learning_rate=1e10", f"--federation.run_dir={tmp_path}")
    assert not (tmp_path / "uploads").exists()


UPLOADED_WITH_OTHERS = {
    "--model.rank=2": r"model\.rank was 2, is 8",
    "--model.targets=[q_proj]": r"model\.targets was \['q_proj'\], is \['q_proj', 'k_proj', 'v_proj', 'out_proj'\]",
    "--model.alpha=2": r"model\.alpha was 2\.0, is 16\.0",
    "--seed_everything=3": r"seed_everything was 3, is 0",
    "--data.class_names=[a,b,c,d,e,f,g,h]": r"data\.class_names was \['a', ",
}


@pytest.mark.parametrize("other", UPLOADED_WITH_OTHERS)
def test_fit_refuses_a_client_that_was_trained_with_other_settings(run, tmp_path, other):
    quick = ["--trainer.limit_train_batches=1", "--model.reach=false", f"--federation.run_dir={tmp_path}"]
    run("client", "--data.domain=photo", other, *quick)
    (tmp_path / ".lock").touch()
    for place in ("clients", "uploads"):
        before = contents(tmp_path)
        with pytest.raises(InputError, match=f"{place}/photo was started with .*{UPLOADED_WITH_OTHERS[other]}"):
            run("fit", *quick)
        assert contents(tmp_path) == before, "or the right settings would be refused from now on"
        shutil.rmtree(tmp_path / "clients", ignore_errors=True)  # an upload that came from elsewhere


def test_fit_takes_a_client_that_was_trained_with_its_settings(finished, run, tmp_path):
    # In a file, as others of the client's are not its own: what only the server uses may differ.
    (tmp_path / "server.yaml").write_text("prune: {sparsity: 0.5}")
    folder = tmp_path / "run"
    run("client", "--data.domain=photo", f"--config={tmp_path / 'server.yaml'}", f"--federation.run_dir={folder}")
    shutil.copytree(finished / "uploads" / "cartoon", folder / "uploads" / "cartoon")
    before = times(folder, "uploads/*/*")
    run("fit", "--federation.unseen=sketch", "--federation.report=false", f"--federation.run_dir={folder}")
    assert times(folder, "uploads/*/*").items() >= before.items()
    assert {path.name for path in (folder / "clients").iterdir()} == {"painting", "photo"}, (
        "cartoon came from elsewhere"
    )


# Easy images first, some blocks, some rows


class Stopped(L.Callback):
    """Ends a training as a new epoch begins."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            raise InputError("stopped")


def test_stopped_after_every_epoch_a_client_of_easy_images_blocks_and_rows_ends_in_the_same_bits(world, tmp_path):
    """The first stop comes while rows are still chosen, the second once they were."""

    def go_on(folder: Path, stop: int = -1) -> None:
        def make_trainer(callbacks: list[L.Callback], **overrides: Any) -> L.Trainer:
            callbacks = [Stopped(stop), *callbacks]
            return L.Trainer(max_epochs=3, accelerator="cpu", num_sanity_val_steps=0, callbacks=callbacks, **overrides)

        root, easy_first = str(world / "domains"), Curriculum(start=0.5)
        data = DomainDataModule(root, "photo", base=SHAPES_CLIP, batch_size=4, curriculum=easy_first)
        module = CLIPLoRAModule(SHAPES_CLIP, rank=2, dropout=0.3, sent_blocks=0.5, trained_rows=0.5)
        train_client(module, data, RunFolder(folder), make_trainer, "client", {})

    for stop in (1, 2):
        with pytest.raises(InputError, match="stopped"):
            go_on(tmp_path / "stopped", stop)
    for folder in ("stopped", "whole"):
        go_on(tmp_path / folder)
    assert contents(tmp_path / "stopped" / "uploads") == contents(tmp_path / "whole" / "uploads")
    checkpoint = torch.load(tmp_path / "whole" / "clients" / "photo" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 19 // 4 + 27 // 4 + 35 // 4


def test_a_client_that_sends_some_blocks_counts_as_nothing_in_the_others(finished, run, tmp_path):
    quick = ["--trainer.limit_train_batches=1", "--model.reach=false"]
    run("client", "--data.domain=photo", "--model.sent_blocks=[2,3]", *quick, f"--federation.run_dir={tmp_path}")
    uploads = [finished / "uploads" / "cartoon", tmp_path / "uploads" / "photo"]
    whole, some = map(read_adapter, uploads)
    assert {block_of(name) for name in some.layers} == {2, 3} and 2 * some.size < 1.1 * whole.size
    for method in ("average", "sap"):
        options = [f"--merge.method={method}", "--merge.format=adapter", f"--merge.output={tmp_path / method}"]
        run("merge", *options, f"--federation.run_dir={tmp_path}", "--uploads", *map(str, uploads))
    average, sap = read_adapter(tmp_path / "average").layers, read_adapter(tmp_path / "sap").layers
    for name, layer in whole.layers.items():
        other = some.layers[name].delta() if name in some.layers else 0
        assert_close(average[name].delta(), (layer.delta() + other) / 2)
    assert sap.keys() == whole.layers.keys()
