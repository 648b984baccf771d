"""From pixels to batches that do not depend on the number of processes."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from sap_lightning.errors import InputError


class Batch(NamedTuple):
    """Labelled images of one domain.

    Attributes:
        images: (B, 3, H, W), uint8 from the loader, normalised float once on the device.
        labels: (B,) int64, positions in the class names.
        indices: (B,) int64, positions in the domain.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor


class PixelDataset(Dataset[Batch]):
    """Some rows of an array of images, by position or a whole batch of positions at once.

    Args:
        images: uint8 (N, 3, H, W).
        labels: (N,) int64.
        rows: (n,) int64, the rows that belong to this set.
    """

    def __init__(self, images: np.ndarray, labels: Tensor, rows: Tensor) -> None:
        self.images, self.labels, self.rows = images, labels, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, positions: int | list[int]) -> Batch:
        rows = self.rows[positions]
        return Batch(torch.from_numpy(self.images[rows.numpy()]), self.labels[rows], rows)

    __getitems__ = __getitem__


def train_sampler(dataset: Dataset, world_size: int, rank: int, seed: int) -> DistributedSampler:
    """This process's share of a shuffled epoch; batch i of all processes together is batch i of a single one."""
    return DistributedSampler(dataset, world_size, rank, shuffle=True, seed=seed, drop_last=True)


def eval_sampler(dataset: Dataset, world_size: int, rank: int, source: str) -> DistributedSampler:
    """This process's share in order: every image exactly once over all processes.

    Args:
        dataset: images to cover.
        world_size: number of processes.
        rank: this process.
        source: what messages call the dataset.

    Raises:
        InputError: fewer images than processes.
    """
    size = len(dataset)  # type: ignore[arg-type]
    if 0 < size < world_size:
        raise InputError(f"{source}: {size} images for {world_size} processes; use fewer devices")
    return UnrepeatedDistributedSampler(dataset, world_size, rank, shuffle=False)


def images_per_process(batch_size: int, world_size: int) -> int:
    """Images per process in a batch of `batch_size` over all processes.

    Raises:
        InputError: the batch does not divide evenly.
    """
    if batch_size % world_size:
        fits = max(batch_size // world_size, 1) * world_size
        raise InputError(
            f"a batch of {batch_size} images does not divide among {world_size} processes; set batch_size to {fits}"
        )
    return batch_size // world_size


def process_of(trainer: Trainer | None) -> tuple[int, int]:
    """World size and rank of this process; (1, 0) outside a trainer."""
    return (trainer.world_size, trainer.global_rank) if trainer else (1, 0)


def make_loader(dataset: Dataset, sampler: DistributedSampler, batch_size: int, drop_last: bool = False) -> DataLoader:
    """A loader of whole batches, in this process: rows of decoded pixels need no workers."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=drop_last,
        pin_memory=torch.cuda.is_available(),
        collate_fn=_as_is,  # `__getitems__` has already stacked the batch
    )


def _as_is(batch: Any) -> Any:
    return batch
