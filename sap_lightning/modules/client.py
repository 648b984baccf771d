"""What all kinds of clients share: they learn from the images of a domain, and send what was trained."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from torch import Tensor
from torch.nn.functional import cross_entropy

from sap_lightning.data.loaders import Batch
from sap_lightning.functional.reach import Reach
from sap_lightning.io.manifest import Kind, Manifest
from sap_lightning.modules.classifier import CLIPClassifier
from sap_lightning.modules.turn import ONE_SHOT, Turn


class ClientModule(CLIPClassifier, ABC):
    """Trains a part of CLIP with cross-entropy of images against class prompts; the rest stays the base's.

    Args:
        base: hub id or folder of a CLIP checkpoint.
        templates: class prompts, averaged after normalisation; ``{}`` stands for the class name.
        seed: seed of the part's initial values.

    Attributes:
        kind: of the part.
        base_fingerprint: of the towers that the part is for.
        rank: of a LoRA; 0 of what is none.
        reach: whether it is measured how far the part reaches on images in changed styles.
        keeps_epochs: whether the part is kept after every epoch.
        label_smoothing: of the cross-entropy.
    """

    base_fingerprint: str
    kind: Kind = "lora"
    rank = 0
    reach = False
    keeps_epochs = False
    label_smoothing = 0.0

    def __init__(self, base: str, templates: Sequence[str], seed: int) -> None:
        super().__init__()
        self.base = base
        self.templates = templates
        self.seed = seed
        # Checkpoints hold the trained part without the frozen base (on_save_checkpoint).
        self.strict_loading = False
        self._turn = ONE_SHOT

    def for_turn(self, turn: Turn) -> Self:
        """An untrained module of the same settings, for a turn in one of several rounds.

        Before the last round nobody asks how far the adapter reaches, so it is not measured.
        """
        other = copy.deepcopy(self)
        other._turn = turn
        other.reach = self.reach and turn.is_last
        return other

    @abstractmethod
    def stated(self, manifest: Manifest) -> Mapping[str, tuple[Any, Any]]:
        """The settings that an upload's manifest states: by name, what they are there and here."""

    @abstractmethod
    def write_upload(self, folder: str | Path, domain: str, num_samples: int, reach: Reach | None = None) -> Path:
        """Writes what the client sends: the part and its manifest, which says how far it reaches.

        Raises:
            InputError: when the folder already exists.
        """

    def batch_features(self, batch: Batch) -> Tensor:
        """Normalised features, shape (n, d), of the images of a batch."""
        return self.image_features(batch.images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits = self.logits(self.batch_features(batch))
        loss = cross_entropy(logits, batch.labels, label_smoothing=self.label_smoothing)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/accuracy", (logits.detach().argmax(1) == batch.labels).float().mean())
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        logits = self.logits(self.batch_features(batch))
        self.metrics.update(logits, batch.labels)
        loss = cross_entropy(logits, batch.labels)
        self.log("val/loss", loss, batch_size=len(batch.labels), sync_dist=True)
        # What Lightning's own examples have callbacks monitor.
        self.log("val_loss", loss, batch_size=len(batch.labels), sync_dist=True, logger=False)

    def on_validation_epoch_end(self) -> None:
        self.log_accuracy("val/")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint["base_fingerprint"] = self.base_fingerprint
