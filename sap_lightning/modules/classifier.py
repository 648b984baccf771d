"""What a client and the server share: classify images by their class prompts, and measure it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from sap_lightning.data.domains import DomainDataModule
from sap_lightning.data.pixels import PixelDataModule
from sap_lightning.data.preprocess import Preprocess, same_input
from sap_lightning.errors import InputError


def data_of(trainer: L.Trainer) -> Any:
    """The data module that a trainer runs on.

    Raises:
        InputError: there is none.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    if data is None:
        raise InputError("the trainer has no data module, which knows classes and captions; give it one as datamodule")
    return data


def require_end(trainer: L.Trainer) -> None:
    """Raises InputError for a trainer that does not say how many steps it trains, as rates' schedules need."""
    if trainer.max_epochs in (None, -1) and trainer.max_steps == -1:
        raise InputError(
            "training has no end in steps, by which the learning rate's schedule goes; give trainer.max_epochs or"
            " trainer.max_steps (a time alone is not enough)"
        )


def training_steps(trainer: L.Trainer) -> int | float:
    """Steps of the optimizer in a fit; Lightning's own estimate takes every epoch for one as long as the present."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(data, DomainDataModule) and data.curriculum.narrows:
        return int(data.steps(data.epochs))
    return trainer.estimated_stepping_batches


def accuracy_metrics(class_names: Sequence[str]) -> MetricCollection:
    """Top-1, macro and per-class accuracy, and expected calibration error.

    The error is that of Guo et al. 2017, arXiv:1706.04599, over 15 bins.
    """
    classes = len(class_names)
    return MetricCollection(
        {
            "accuracy": MulticlassAccuracy(classes, average="micro"),
            "macro_accuracy": MulticlassAccuracy(classes, average="macro"),
            "class_accuracy": MulticlassAccuracy(classes, average="none"),
            "ece": MulticlassCalibrationError(classes),
        }
    )


class CLIPClassifier(L.LightningModule):
    """Zero-shot classification by the cosine of image features and class-prompt features.

    Subclasses set ``base``, in ``configure_model`` ``tower`` and ``logit_scale``, and the classes with ``use_classes``.
    """

    base: str
    class_features: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.tower: nn.Module | None = None
        self.logit_scale = 1.0
        self.class_names: list[str] = []

    def require_its_images(self) -> None:
        """Raises InputError when the trainer's data preprocesses images as another base asks."""
        data = data_of(self.trainer)
        if not isinstance(data, PixelDataModule) or data.base == self.base:
            return
        if not same_input(data.preprocessing, Preprocess(self.base).settings):
            raise InputError(
                f"{type(data).__name__} makes images for {data.base}, and {self.base} asks for others; give it"
                f" base={self.base!r}"
            )

    def use_classes(self, class_names: Sequence[str], features: Tensor) -> None:
        """Classify into these from now on; features have shape (classes, d)."""
        self.class_names = list(class_names)
        self.register_buffer("class_features", features.to(self.device), persistent=False)
        self.metrics = accuracy_metrics(class_names).to(self.device)

    def image_features(self, images: Tensor) -> Tensor:
        """Normalised features, shape (n, d), of normalised images (n, 3, h, w)."""
        assert self.tower is not None
        return normalize(self.tower(images).image_embeds, dim=-1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, shape (n, classes), of normalised images (n, 3, h, w)."""
        return self.logits(self.image_features(images))

    def present_class_features(self) -> Tensor:
        """Features of the classes, shape (classes, d)."""
        return self.class_features

    def logits(self, features: Tensor) -> Tensor:
        """Logits, shape (n, classes), float32, of normalised image features (n, d)."""
        classes = self.present_class_features()
        # Mixed precision would round them to so few digits that classes tie.
        with torch.autocast(features.device.type, enabled=False):
            return self.logit_scale * features.float() @ classes.float().T

    def log_accuracy(self, prefix: str = "") -> None:
        """Logs what the metrics have gathered since the last call."""
        values = self.metrics.compute()
        self.metrics.reset()
        per_class = values.pop("class_accuracy")
        values |= {f"accuracy/{name}": value for name, value in zip(self.class_names, per_class, strict=True)}
        self.log_dict({prefix + name: value for name, value in values.items()})
