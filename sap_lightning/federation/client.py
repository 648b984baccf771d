"""A client: trains on its own domain, once, and writes what it sends."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar

from sap_lightning.callbacks.epochs import KeepEpochs
from sap_lightning.callbacks.progress import training_progress
from sap_lightning.callbacks.reach import ReachCallback
from sap_lightning.callbacks.sent_blocks import SentBlocks
from sap_lightning.callbacks.sparse_update import SparseUpdate
from sap_lightning.callbacks.tensorboard import EventLogger
from sap_lightning.data.domains import DomainDataModule
from sap_lightning.errors import InputError
from sap_lightning.federation.checkpoints import WholeCheckpoints, every_epoch, last_checkpoint
from sap_lightning.federation.run_folder import (
    SERVER_SETTINGS,
    RunFolder,
    is_held_to,
    refuse_other_settings,
    require_settings,
)
from sap_lightning.files import clear_unfinished_at, locked
from sap_lightning.io.adapter import manifest_in
from sap_lightning.io.upload_files import FilesInFolder
from sap_lightning.modules.client import ClientModule

log = logging.getLogger(__name__)
TrainerFactory = Callable[..., L.Trainer]
"""Gives a Lightning Trainer for keyword arguments that override its own."""
ShowProgress = Callable[[str], L.Callback]
"""Gives the callback that shows how far a client is, for what the log calls it."""
UNTRAINED: dict[str, Any] = {
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "limit_val_batches": 1.0,
    "limit_test_batches": 1.0,
    "fast_dev_run": False,
}
"""Trainer arguments where nothing is trained: a merge looks at all anchors, and a result is of all images."""


def require_client(module: ClientModule, data: DomainDataModule, folder: RunFolder, config: Mapping[str, Any]) -> None:
    """Raises InputError that names every setting that what stands of a client was not trained with."""
    assert data.domain is not None
    if config:
        is_held_to(folder.client(data.domain), config, SERVER_SETTINGS)
    upload = folder.upload(data.domain)
    if manifest := manifest_in(FilesInFolder(upload)):
        stated = {
            "data.class_names": (list(manifest.class_names), data.class_names),
            "seed_everything": (manifest.seed, module.seed),
            **module.stated(manifest),
        }
        before, now = ({name: pair[which] for name, pair in stated.items()} for which in (0, 1))
        refuse_other_settings(upload, before, now)


def train_client(
    module: ClientModule,
    data: DomainDataModule,
    folder: RunFolder,
    make_trainer: TrainerFactory,
    title: str,
    config: Mapping[str, Any],
    progress: ShowProgress = training_progress,
) -> Path:
    """Trains a client on its domain, from its last checkpoint if it was interrupted, and writes its upload.

    A client whose upload stands is done and is not trained again.

    Args:
        module: what is trained.
        data: the domain.
        folder: of the run.
        make_trainer: gives the trainer.
        title: what the log calls the client.
        config: settings that the client is held to; a client of other settings is refused.
        progress: gives the callback that shows how far it is.

    Raises:
        InputError: when the data names no domain, one that it lacks or an upload cannot name, or one that another
            command trains, or the client was begun with other settings.
    """
    domain = data.require_domain()
    require_client(module, data, folder, config)
    upload = folder.upload(domain)
    if upload.exists():
        log.info("%s: upload stands in %s, not trained again", title, upload)
        return upload
    home = folder.client(domain)
    with locked(home):
        clear_unfinished_at(upload)
        if config:
            require_settings(home, config, SERVER_SETTINGS)
        _train(module, data, folder, make_trainer, title, progress)
    return upload


def _train(
    module: ClientModule,
    data: DomainDataModule,
    folder: RunFolder,
    make_trainer: TrainerFactory,
    title: str,
    progress: ShowProgress,
) -> None:
    domain = data.require_domain()
    home, shown, sent = folder.client(domain), progress(title), SentBlocks(module.sent_blocks)
    reach = ReachCallback(sent)
    measured = [reach] if module.reach else []
    kept = [KeepEpochs(folder.epochs(domain))] if module.keeps_epochs else []
    trainer = fit_at_home(
        home,
        title,
        module,
        data,
        make_trainer,
        shown,
        [sent, SparseUpdate(module.trained_rows, sent), *measured, *kept],
        reload_dataloaders_every_n_epochs=int(data.curriculum.narrows),
    )
    if not all(math.isfinite(share) for curve in reach.reach.values() for share in curve):
        raise InputError(
            f"{title}: training has diverged, what the model says of held-out images are no numbers; lower"
            " model.learning_rate, in another federation.run_dir"
        )
    if trainer.is_global_zero:
        module.write_upload(folder.upload(domain), domain, data.num_samples, reach.reach, sent.blocks)
    trainer.strategy.barrier()


def fit_at_home(
    home: Path,
    title: str,
    module: L.LightningModule,
    data: L.LightningDataModule,
    make_trainer: TrainerFactory,
    shown: L.Callback,
    callbacks: Sequence[L.Callback] = (),
    **overrides: Any,
) -> L.Trainer:
    """Trains what a client sends, from the last checkpoint in its folder if it was interrupted.

    Args:
        home: the client's folder, for checkpoints and events.
        title: what the log calls the client.
        module: what is trained.
        data: what it is trained on.
        make_trainer: gives the trainer.
        shown: shows how far it is.
        callbacks: besides.
        overrides: of the trainer.

    Raises:
        InputError: when there was no time for one step.
    """
    trainer = make_trainer(
        logger=EventLogger(home.parent, home.name),
        callbacks=[every_epoch(home), shown, *callbacks],
        default_root_dir=home,
        enable_checkpointing=True,
        enable_progress_bar=isinstance(shown, ProgressBar),
        **overrides,
    )
    trainer.strategy.checkpoint_io = WholeCheckpoints()
    trainer.fit(module, datamodule=data, ckpt_path=last_checkpoint(home), weights_only=True)
    if trainer.global_step == 0:
        raise InputError(f"{title}: not one step was trained, so nothing is sent; check trainer.max_time")
    return trainer
