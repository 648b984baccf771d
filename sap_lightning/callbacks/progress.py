"""What a person sees while a command runs: rich bars on a terminal, plain log lines elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import lightning as L
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from rich import get_console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from sap_lightning.console import on_terminal
from sap_lightning.modules.classifier import training_steps

log = logging.getLogger(__name__)


class Row(NamedTuple):
    """How far one of several clients is.

    Attributes:
        title: which client this is.
        text: its title, epoch and what it measured last.
        steps: that it has trained.
        all_steps: that it will have.
    """

    title: str
    text: str
    steps: int
    all_steps: float


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


class RowBar(ProgressBar):
    """Shows every step on a row among those of other clients.

    Args:
        title: which client this is.
        show: draws the row.
    """

    def __init__(self, title: str, show: Callable[[Row], None]) -> None:
        super().__init__()
        self.title = title
        self.show = show

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        measured = "".join(f", {name} {value:.3f}" for name, value in _measured(trainer).items())
        text = f"{self.title} · {_epoch(trainer)}{measured}"
        self.show(Row(self.title, text, trainer.global_step, training_steps(trainer)))


class Rows:
    """A bar for each of several clients on a terminal, nothing elsewhere; a context manager."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(10), MofNCompleteColumn(), TimeRemainingColumn())
        # The console of the log lines, so that they go above the bars.
        self._bars = Progress(*columns, console=get_console(), transient=True, disable=not on_terminal())
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Rows:
        self._bars.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._bars.stop()

    def show(self, row: Row) -> None:
        """Draws a client's row anew, or its first."""
        if row.title not in self._tasks:
            self._tasks[row.title] = self._bars.add_task(row.text, total=row.all_steps)
        self._bars.update(self._tasks[row.title], description=row.text, completed=row.steps, total=row.all_steps)

    def remove(self, title: str) -> None:
        """Takes away a client's row, if it has one."""
        if title in self._tasks:
            self._bars.remove_task(self._tasks.pop(title))


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
        left = pace * (training_steps(trainer) - trainer.global_step)
        log.info("%s: %s%s, about %.0f s left", self.title, _epoch(trainer), measured, left)


def _epoch(trainer: L.Trainer) -> str:
    of = f" of {trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
    return f"epoch {trainer.current_epoch + 1}{of}"


def _measured(trainer: L.Trainer) -> dict[str, float]:
    names = {"loss": "train/loss", "val accuracy": "val/accuracy"}
    values = trainer.callback_metrics
    return {name: float(values[key]) for name, key in names.items() if key in values}
