"""Training that gives compressed blocks back some of what they lost; nothing else of the model is trained."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sap_lightning.compression.calibration import Batch, Calibration
from sap_lightning.console import on_terminal

LEARNING_RATE, BATCH, WARMUP = 3e-4, 32, 100
"""Of AdamW, of a step, and steps over which the learning rate rises, as GRASP's authors have them for long texts."""


class Recovery(L.LightningModule):
    """Trains some blocks of a frozen model, norms and all, by AdamW on its own loss.

    Args:
        shown: the model, and what it is trained on.
        blocks: of the model.
        seed: of the order of batches.
    """

    def __init__(self, shown: Calibration, blocks: Sequence[nn.Module], seed: int) -> None:
        super().__init__()
        self.tower = shown.tower
        self.shown = shown
        self.blocks = blocks
        self.seed = seed

    def train_dataloader(self) -> DataLoader[Batch]:
        """The batches in another order in every epoch."""
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(list(self.shown.batches), batch_size=None, shuffle=True, generator=generator)  # type: ignore[arg-type]

    def training_step(self, batch: Batch) -> Tensor:
        """The mean loss of a batch."""
        return self.shown.losses(self.tower, batch).mean()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW of the blocks' weights, whose learning rate rises over a tenth of the steps at most, then stays."""
        optimizer = torch.optim.AdamW([weight for block in self.blocks for weight in block.parameters()], LEARNING_RATE)
        rising = max(1, min(WARMUP, round(int(self.trainer.estimated_stepping_batches) / 10)))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / rising))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def batches_a_step(shown: int, at_once: int) -> int:
    """Over how many batches a step's gradient is summed: up to 32 rows or images, where that leaves 32 steps an epoch.

    Args:
        shown: all rows or images.
        at_once: how many are in a batch.
    """
    return max(1, min(BATCH, shown // BATCH) // at_once)


def recover(shown: Calibration, blocks: Sequence[nn.Module], epochs: int, seed: int) -> None:
    """Trains blocks in place on what the model is shown, and freezes them again."""
    sizes = [len(batch[0]) for batch in shown.batches]
    for block in blocks:
        block.requires_grad_()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        accumulate_grad_batches=batches_a_step(sum(sizes), sizes[0]),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=on_terminal(),
    )
    trainer.fit(Recovery(shown, blocks, seed))
    for block in blocks:
        block.requires_grad_(False)
