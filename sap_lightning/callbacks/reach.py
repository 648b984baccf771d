"""A client measures how far its adapter reaches beyond its own domain."""

from __future__ import annotations

import lightning as L
import torch
from peft.helpers import rescale_adapter_scale
from torch import Tensor

from sap_lightning.callbacks.sent_blocks import SentBlocks
from sap_lightning.functional.reach import LENGTHS, MEASURED
from sap_lightning.functional.styles import STYLES
from sap_lightning.modules.classifier import data_of
from sap_lightning.modules.client import undisturbed
from sap_lightning.modules.clip_lora import CLIPLoRAModule

IMAGES = 64
"""Held-out images that are looked at: enough for a mean, few enough to take a small part of the training's time."""


class ReachCallback(L.Callback):
    """Measures the adapter that is sent at several lengths on the client's held-out images, plain and in other styles.

    Args:
        sent: says which layers are sent.

    Attributes:
        reach: style → mean probability of the right class at every one of ``functional.reach.LENGTHS``; empty before
            training ends, and where no images are held out.
    """

    def __init__(self, sent: SentBlocks) -> None:
        self.sent = sent
        self.reach: dict[str, tuple[float, ...]] = {}

    @torch.no_grad()
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, CLIPLoRAModule)
        # Every process has all of them, so that the numbers do not depend on how many there are.
        batch = data_of(trainer).held_out(IMAGES)
        if not len(batch.labels):
            return
        pl_module.to(trainer.strategy.root_device)  # by now Lightning has taken it off
        images, labels = batch.images.to(pl_module.device).float() / 255, batch.labels.to(pl_module.device)
        with undisturbed(pl_module):
            for style in MEASURED:
                changed = STYLES[style](images) if style in STYLES else images
                inputs = data_of(trainer).normalised(batch._replace(images=255 * changed)).images
                self.reach[style] = tuple(self._certainty(pl_module, inputs, labels, length) for length in LENGTHS)

    def _certainty(self, module: CLIPLoRAModule, images: Tensor, labels: Tensor, length: float) -> float:
        """Mean probability of the right class at base + length · ΔW."""
        precision = module.trainer.precision_plugin.forward_context()
        with precision, module.sending(self.sent.blocks), rescale_adapter_scale(module, length):
            logits = torch.cat([module(part) for part in images.split(data_of(module.trainer).batch_size)])
        return round(float(logits.softmax(-1).gather(1, labels[:, None]).mean()), 4)
