"""What a person sees while a command runs: rich bars on a terminal, plain log lines elsewhere."""

from __future__ import annotations

import logging
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn

from sap_lightning.console import on_terminal

log = logging.getLogger(__name__)


def training_progress(title: str) -> L.Callback:
    """A bar on a terminal, a log line an epoch elsewhere; title says which client this is."""
    return TitledProgressBar(title) if on_terminal() else EpochLog(title)


class TitledProgressBar(RichProgressBar):
    """Lightning's rich progress bar with the client's name before the epoch."""

    def __init__(self, title: str) -> None:
        super().__init__()
        self.title = title

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Any:
        return _measured(trainer)

    def configure_columns(self, trainer: L.Trainer) -> list[ProgressColumn]:
        # Short enough for the metrics to stand on the same line.
        return [TextColumn("{task.description}"), BarColumn(10), MofNCompleteColumn(), TimeRemainingColumn()]

    def _get_train_description(self, current_epoch: int) -> str:
        return f"{self.title} · {_epoch(self.trainer)}"


class EpochLog(L.Callback):
    """One line an epoch: loss, accuracy and the time left."""

    def __init__(self, title: str) -> None:
        self.title = title

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.started, self.first_step = time.monotonic(), trainer.global_step

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        measured = "".join(f", {name} {value:.3f}" for name, value in _measured(trainer).items())
        pace = (time.monotonic() - self.started) / max(trainer.global_step - self.first_step, 1)
        left = pace * (trainer.estimated_stepping_batches - trainer.global_step)
        log.info("%s: %s%s, about %.0f s left", self.title, _epoch(trainer), measured, left)


def _epoch(trainer: L.Trainer) -> str:
    of = f" of {trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
    return f"epoch {trainer.current_epoch + 1}{of}"


def _measured(trainer: L.Trainer) -> dict[str, float]:
    names = {"loss": "train/loss", "val accuracy": "val/accuracy"}
    values = trainer.callback_metrics
    return {name: float(values[key]) for name, key in names.items() if key in values}
