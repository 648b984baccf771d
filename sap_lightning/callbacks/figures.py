"""What TensorBoard shows of a merge: anchor losses, the share of parameters kept, saliency, the results."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from torch import Tensor

from sap_lightning.functional.spaces import Parameters

HISTOGRAM_SAMPLES = 1_000_000


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


def share_kept(masks: Mapping[str, Parameters]) -> dict[str, float]:
    """For each layer the share of its parameters that pruning left."""
    return {
        name: sum(int(mask.sum()) for mask in layer) / sum(mask.numel() for mask in layer)
        for name, layer in masks.items()
    }


def log_saliency(scores: Mapping[str, Parameters]) -> Tensor:
    """log10 of the positive scores, thinned evenly to at most a million."""
    flat = torch.cat([tensor.flatten() for layer in scores.values() for tensor in layer])
    flat = flat[:: -(-len(flat) // HISTOGRAM_SAMPLES)]
    return flat[flat > 0].log10().cpu()


def share_kept_figure(shares: Mapping[str, float], title: str) -> Figure:
    """Heat map of the share kept: a row for each transformer layer, a column for each module."""
    cells = {_row_and_column(name): share for name, share in shares.items()}
    rows = sorted({row for row, _ in cells})
    columns = sorted({column for _, column in cells})
    grid = np.array([[cells.get((row, column), np.nan) for column in columns] for row in rows])
    figure = Figure(figsize=(0.6 + 1.2 * len(columns), 1.0 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(grid, cmap="viridis", vmin=0, aspect="auto")
    for (row, column), share in cells.items():
        ink = "white" if share <= 0.6 * np.nanmax(grid) else "black"
        axes.text(columns.index(column), rows.index(row), f"{share:.1%}", ha="center", va="center", color=ink)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), [f"{row:g}" if row < math.inf else "–" for row in rows])
    axes.set_ylabel("layer")
    axes.set_title(f"share kept: {title}")
    return figure


def _row_and_column(layer: str) -> tuple[float, str]:
    # The projection is in no transformer layer; it comes after them all.
    number = re.search(r"\.layers\.(\d+)\.", layer)
    return (int(number.group(1)) if number else math.inf, layer.rsplit(".", 1)[-1])
