"""What the data modules share: batches of decoded images, normalised on the device as the checkpoint wants them."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from sap_lightning.data.loaders import eval_sampler, images_per_process, make_loader, process_of
from sap_lightning.data.preprocess import Preprocess
from sap_lightning.errors import check_at_least


class PixelDataModule(LightningDataModule):
    """A data module whose batches are named tuples with ``images``, uint8 (B, 3, H, W) from the loader.

    Args:
        base: hub id or folder of the CLIP checkpoint whose preprocessing to apply.
        batch_size: images per batch over all processes.

    Raises:
        InputError: when the batch size is below 1.

    Attributes:
        group: of the settings, which errors name.
    """

    group = "data"

    def __init__(self, base: str, batch_size: int) -> None:
        super().__init__()
        check_at_least(f"{self.group}.batch_size", batch_size, 1)
        self.base = base
        self.batch_size = batch_size

    @cached_property
    def _preprocess(self) -> Preprocess:
        return Preprocess(self.base)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """All that the checkpoint says of it, plain enough for JSON."""
        return self._preprocess.settings

    def _in_order(self, images: Dataset, source: str) -> DataLoader:
        """Every image once, in order, over all processes."""
        world_size, rank = process_of(self.trainer)
        sampler = eval_sampler(images, world_size, rank, source)
        return make_loader(images, sampler, images_per_process(self.batch_size, world_size))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Normalises, on the device."""
        return self.normalised(batch)

    def normalised(self, batch: Any) -> Any:
        """A batch of pixels in 0…255 with the tower's input for images, in the trainer's precision."""
        assert self.trainer is not None
        normalised = batch._replace(images=self._preprocess.normalise(batch.images))
        # The loader's bytes passed the trainer's precision untouched; the floats made of them must not.
        return self.trainer.precision_plugin.convert_input(normalised)
