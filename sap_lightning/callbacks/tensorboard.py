"""What TensorBoard shows of a merge: anchor losses, the share of parameters kept, saliency."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure
from torch import Tensor

from sap_lightning.figures import share_kept_figure
from sap_lightning.functional.agreement import share_kept
from sap_lightning.functional.spaces import Parameters

HISTOGRAM_SAMPLES = 1_000_000


class EventLogger(TensorBoardLogger):
    """TensorBoard's events alone: its hparams.yaml is not written whole, and a config.yaml stands beside it."""

    def __init__(self, folder: str | Path, name: str) -> None:
        super().__init__(folder, name="", version=name, default_hp_metric=False)

    @rank_zero_only
    def save(self) -> None:
        self.experiment.flush()


def log_pruning(
    trainer: L.Trainer,
    client: str,
    loss_before: float,
    loss_after: float,
    masks: Mapping[str, Parameters],
    scores: Mapping[str, Parameters],
) -> None:
    """One client's anchor loss before and after, the share kept by layer and module, and its saliency."""
    for board in tensorboards(trainer):
        board.add_scalar(f"anchor_loss_before_pruning/{client}", loss_before)
        board.add_scalar(f"anchor_loss_after_pruning/{client}", loss_after)
        board.add_figure(f"share_kept/{client}", share_kept_figure(share_kept(masks), client))
        if len(saliency := log_saliency(scores)):
            board.add_histogram(f"log10_saliency/{client}", saliency)


def tensorboards(trainer: L.Trainer) -> list[Any]:
    """The trainer's TensorBoard writers."""
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def log_saliency(scores: Mapping[str, Parameters]) -> Tensor:
    """log10 of the positive scores, thinned evenly to at most a million."""
    flat = torch.cat([tensor.flatten() for layer in scores.values() for tensor in layer])
    flat = flat[:: -(-len(flat) // HISTOGRAM_SAMPLES)]
    return flat[flat > 0].log10().cpu()


def log_figures(boards: Iterable[Any], figures: Mapping[str, Figure]) -> None:
    """Adds figures to TensorBoard writers."""
    for board in boards:
        for name, figure in figures.items():
            board.add_figure(name, figure, close=False)
