"""What all kinds of clients share: they learn from the images of a domain, and send what was trained."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sap_lightning.data.domains import DomainDataModule
from sap_lightning.data.loaders import Batch
from sap_lightning.functional.fisher import fisher_trace, sample_squares
from sap_lightning.functional.lora import LoRALayer
from sap_lightning.functional.reach import Reach
from sap_lightning.io.adapter import sha256_of
from sap_lightning.io.manifest import Kind, Manifest
from sap_lightning.io.peft_config import public_name
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
        sent_blocks: share of the transformer blocks whose layers are sent, or their numbers.
        trained_rows: share of the rows of a matrix that training goes on with after its first batches.
        label_smoothing: of the cross-entropy.
    """

    base_fingerprint: str
    kind: Kind = "lora"
    rank = 0
    reach = False
    keeps_epochs = False
    sent_blocks: float | Sequence[int] = 1.0
    trained_rows = 1.0
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

    @property
    def named_blocks(self) -> Sequence[int] | None:
        """The blocks whose layers are sent, where they are named."""
        return self.sent_blocks if isinstance(self.sent_blocks, Sequence) else None

    @abstractmethod
    def stated(self, manifest: Manifest) -> Mapping[str, tuple[Any, Any]]:
        """The settings that an upload's manifest states: by name, what they are there and here."""

    @abstractmethod
    def write_upload(
        self,
        folder: str | Path,
        domain: str,
        num_samples: int,
        reach: Reach | None = None,
        blocks: Collection[int] | None = None,
    ) -> Path:
        """Writes what the client sends: the part and its manifest, which says how far it reaches.

        Args:
            folder: must not exist.
            domain: the client's.
            num_samples: number of its training images.
            reach: how far the part reaches.
            blocks: numbers of the transformer blocks whose layers are sent; all if not given.

        Raises:
            InputError: when the folder already exists.
        """

    def manifest_of(
        self, part: Mapping[str, LoRALayer], domain: str, num_samples: int, packages: Sequence[str], **own: Any
    ) -> Manifest:
        """What a client says of the part that it sends; its class of clients adds what is its own."""
        return Manifest(
            base=public_name(self.base),
            base_fingerprint=self.base_fingerprint,
            domain=domain,
            class_names=tuple(self.class_names),
            num_samples=num_samples,
            seed=self.seed,
            packages={name: version(name) for name in packages},
            tensors_sha256=sha256_of(part),
            round=self._turn.number,
            **own,
        )

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The part, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def sample_losses(self, batches: Iterable[Batch]) -> Iterator[Tensor]:
        """−log p(y|x) of one image after another, of batches of the tower's input; a label y is the image's own."""
        for batch in batches:
            for image, label in zip(batch.images, batch.labels, strict=True):
                with self.trainer.precision_plugin.forward_context():
                    logits = self.logits(self.image_features(image[None]))
                yield cross_entropy(logits, label[None])

    @torch.enable_grad()
    def difficulty(self, data: DomainDataModule) -> Tensor:
        """Of each image that is trained on the trace of its Fisher information at the part as it is, shape (n,)."""
        trained = list(self.trained_parameters().values())
        with undisturbed(self):
            losses = self.sample_losses(data.unchanged(data.batch_size, self.device))
            return torch.stack([fisher_trace(squares).cpu() for squares in sample_squares(losses, trained)])

    def setup(self, stage: str) -> None:
        self.require_its_images()

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
        trained = self.trained_parameters().keys()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint["base_fingerprint"] = self.base_fingerprint


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """A module without dropout for a while."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
