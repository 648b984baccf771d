"""A client's adapter after every epoch, kept at its own site to look at how clients drift apart."""

from __future__ import annotations

from pathlib import Path

import lightning as L

from sap_lightning.files import write_tensors
from sap_lightning.modules.clip_lora import CLIPLoRAModule


class KeepEpochs(L.Callback):
    """Writes A and B of every layer to <folder>/<epoch>.safetensors, counted from 1, in float16.

    Args:
        folder: made when the first epoch ends; nothing in it is sent.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not (isinstance(pl_module, CLIPLoRAModule) and trainer.is_global_zero):
            return
        tensors = {
            f"{name}.{factor}": getattr(layer, factor).half()
            for name, layer in pl_module.layers().items()
            for factor in ("A", "B")
        }
        write_tensors(self.folder / f"{trainer.current_epoch + 1}.safetensors", tensors)
