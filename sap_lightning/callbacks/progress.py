"""What a person sees while a command runs: rich bars on a terminal, plain log lines elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from typing import TypeVar

import lightning as L
import rich.progress
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console

log = logging.getLogger(__name__)
Item = TypeVar("Item")


def on_terminal() -> bool:
    """Whether somebody watches a terminal."""
    return Console().is_terminal


def track(items: Sequence[Item], description: str) -> Iterable[Item]:
    """The items, with a bar that goes away when they are through."""
    return rich.progress.track(items, description, transient=True) if on_terminal() else items


def training_progress(title: str) -> L.Callback:
    """A bar on a terminal, a log line an epoch elsewhere; title says which client this is."""
    return TitledProgressBar(title) if on_terminal() else EpochLog(title)


class TitledProgressBar(RichProgressBar):
    """Lightning's rich progress bar with the client's name before the epoch."""

    def __init__(self, title: str) -> None:
        super().__init__()
        self.title = title

    def _get_train_description(self, current_epoch: int) -> str:
        return f"{self.title} · {super()._get_train_description(current_epoch)}"


class EpochLog(L.Callback):
    """One line an epoch: loss, accuracy and the time left."""

    def __init__(self, title: str) -> None:
        self.title = title

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.started, self.first_epoch = time.monotonic(), trainer.current_epoch

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        done = trainer.current_epoch + 1
        pace = (time.monotonic() - self.started) / (done - self.first_epoch)
        measured = trainer.callback_metrics
        log.info(
            "%s: epoch %d of %s, train loss %.3f, val accuracy %.3f, about %.0f s left",
            self.title,
            done,
            trainer.max_epochs,
            measured.get("train/loss", float("nan")),
            measured.get("val/accuracy", float("nan")),
            pace * ((trainer.max_epochs or done) - done),
        )
