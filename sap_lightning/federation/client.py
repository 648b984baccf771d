"""A client: trains on its own domain, once, and writes what it sends."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from sap_lightning.callbacks.epochs import KeepEpochs
from sap_lightning.callbacks.progress import training_progress
from sap_lightning.callbacks.reach import ReachCallback
from sap_lightning.console import on_terminal
from sap_lightning.data.domains import DomainDataModule
from sap_lightning.errors import InputError
from sap_lightning.federation.checkpoints import LAST, WholeCheckpoints, last_checkpoint
from sap_lightning.federation.run_folder import RunFolder
from sap_lightning.files import clear_unfinished, locked
from sap_lightning.io.manifest import check_domain
from sap_lightning.modules.clip_lora import CLIPLoRAModule

log = logging.getLogger(__name__)
TrainerFactory = Callable[..., L.Trainer]
"""Gives a Lightning Trainer for keyword arguments that override its own."""
UNTRAINED: dict[str, Any] = {
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "limit_val_batches": 1.0,
    "limit_test_batches": 1.0,
    "fast_dev_run": False,
}
"""Trainer arguments where nothing is trained: a merge looks at all anchors, and a result is of all images."""


def train_client(
    module: CLIPLoRAModule, data: DomainDataModule, folder: RunFolder, make_trainer: TrainerFactory, title: str
) -> Path:
    """Trains a client on its domain, from its last checkpoint if it was interrupted, and writes its upload.

    A client whose upload stands is done and is not trained again.

    Raises:
        InputError: when the data names no domain, one that an upload cannot name, or one that another command trains.
    """
    if data.domain is None:
        raise InputError(f"data.domain is not set; choose one of {', '.join(data.domains)}")
    check_domain(data.domain)
    upload = folder.upload(data.domain)
    if upload.exists():
        log.info("%s: upload stands in %s, not trained again", title, upload)
        return upload
    home = folder.client(data.domain)
    with locked(home):
        clear_unfinished(upload.parent, upload.name)
        _train(module, data, folder, make_trainer, title)
    return upload


def _train(
    module: CLIPLoRAModule, data: DomainDataModule, folder: RunFolder, make_trainer: TrainerFactory, title: str
) -> None:
    assert data.domain is not None
    home, reach = folder.client(data.domain), ReachCallback()
    measured = [reach] if module.reach else []
    kept = [KeepEpochs(folder.epochs(data.domain))] if len(module.towers) > 1 else []
    trainer = make_trainer(
        logger=TensorBoardLogger(home.parent, name="", version=home.name, default_hp_metric=False),
        callbacks=[_every_epoch(home), training_progress(title), *measured, *kept],
        default_root_dir=home,
        enable_checkpointing=True,
        enable_progress_bar=on_terminal(),
    )
    trainer.strategy.checkpoint_io = WholeCheckpoints()
    trainer.fit(module, datamodule=data, ckpt_path=last_checkpoint(home), weights_only=True)
    if trainer.is_global_zero:
        module.write_upload(folder.upload(data.domain), data.domain, data.num_samples, reach.reach)
    trainer.strategy.barrier()


def _every_epoch(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(
        folder, filename=Path(LAST).stem, every_n_epochs=1, save_on_train_epoch_end=True, enable_version_counter=False
    )
