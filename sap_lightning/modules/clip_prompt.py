"""Training one client: a learnable context for CLIP's class prompts, both towers frozen (CoOp)."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.classification import MulticlassAccuracy

from sap_lightning.data.domains import DomainDataModule
from sap_lightning.data.loaders import Batch
from sap_lightning.errors import InputError, check_at_least, check_positive, check_share
from sap_lightning.functional.lora import LoRALayer
from sap_lightning.functional.reach import Reach
from sap_lightning.io.context import ClassPosition, as_layer, class_position_of, context_layer
from sap_lightning.io.manifest import Manifest
from sap_lightning.io.prompt import PARTS, read_prompt, write_prompt
from sap_lightning.models.clip import TextEncoder, load_base
from sap_lightning.models.prompt import ClassPrompts, room_in
from sap_lightning.modules.classifier import data_of, require_end
from sap_lightning.modules.client import ClientModule
from sap_lightning.modules.feature_memory import FeatureMemory
from sap_lightning.modules.features import domain_features

TOKENS = 16
SPREAD = 0.02
"""Standard deviation of a context's first values."""

log = logging.getLogger(__name__)


class CLIPPromptModule(ClientModule):
    """Learns M vectors that stand in class prompts in place of words, shared by all classes.

    This is CoOp (Zhou et al. 2022, arXiv:2109.01134; reference code KaiyangZhou/CoOp, trainers/coop.py) with one
    context for all classes: one for each class says nothing of others, and cannot be averaged over clients that have
    others. Image features are computed once, but for images that are augmented, which change with every epoch.

    Args:
        base: hub id or folder of a CLIP checkpoint.
        templates: class prompts of zero-shot, which the context takes the place of.
        tokens: M; if not given 16, or as many as there are where the context starts.
        init: words whose embeddings the context starts as, such as "a photo of a"; without them it starts as noise.
        start: folder of a prompt that the context starts as.
        class_position: where the class's name stands: before the context (front), between its halves or after it.
        learning_rate: of SGD after warm-up, from where it falls as a cosine over the epochs.
        momentum: of SGD.
        weight_decay: of SGD.
        warmup_epochs: number of epochs at the rate of warm-up.
        warmup_rate: learning rate of these.
        memory: what a client adds to the prompt at its own site (pFedPrompt); measured, and never sent.
        seed: seed of the noise that the context starts as, the same for all clients or their contexts would not mix.

    Raises:
        InputError: when a number is out of range, or two settings say where the context starts.
    """

    kind = "prompt"
    context: nn.Parameter

    def __init__(
        self,
        base: str = "openai/clip-vit-base-patch16",
        templates: Sequence[str] = ("a photo of a {}.",),
        tokens: int | None = None,
        init: str | None = None,
        start: str | None = None,
        class_position: ClassPosition = "end",
        learning_rate: float = 0.002,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        warmup_epochs: int = 1,
        warmup_rate: float = 1e-5,
        memory: FeatureMemory = FeatureMemory(),  # noqa: B008  # frozen
        seed: int = 0,
    ) -> None:
        super().__init__(base, templates, seed)
        self.save_hyperparameters(ignore=["memory"])
        self.tokens = tokens
        self.init = init
        self.start = start
        self.class_position = class_position
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.warmup_epochs = warmup_epochs
        self.warmup_rate = warmup_rate
        self.memory = memory
        self._looked_at: DomainDataModule | None = None
        self._check_settings()

    def _check_settings(self) -> None:
        if self.tokens is not None:
            check_at_least("model.tokens", self.tokens, 1)
        if self.init is not None and self.start is not None:
            raise InputError("model.init and model.start both say where the context starts; leave one of them out")
        check_positive("model.learning_rate", self.learning_rate)
        check_share("model.momentum", self.momentum)
        for name in ("weight_decay", "warmup_epochs", "warmup_rate"):
            check_at_least(f"model.{name}", getattr(self, name), 0)

    def configure_model(self) -> None:
        if self.tower is not None:
            return
        base = load_base(self.base)
        self.tower, self.text_tower = base.tower, base.texts.tower
        self.logit_scale = base.logit_scale
        self.base_fingerprint = base.fingerprint([context_layer(self.class_position)])
        self.context = nn.Parameter(self._first_context(base.texts).float().clone())
        names = data_of(self.trainer).class_names
        self._prompts = ClassPrompts(base.texts, names, len(self.context), self.class_position)
        self.use_classes(names, self._prompts.features(self.context).detach())
        self.personal = MulticlassAccuracy(len(names), average="micro")

    def _first_context(self, texts: TextEncoder) -> Tensor:
        if self._turn.start:
            return self._turn.start[context_layer(self.class_position)].delta()
        if self.start is not None:
            return self._counted(self._read(self.start, texts), f"the prompt in model.start {self.start}")
        if self.init is not None:
            words = texts.token_embedding.weight[texts.tokens(self.init)]
            return self._counted(words.detach(), f"model.init {self.init!r}")
        room = room_in(texts)
        if (tokens := self.tokens or TOKENS) > room.longest:
            raise InputError(f"model.tokens {tokens}: the text tower has room for {room.longest} beside a class's name")
        shape = tokens, room.width
        return SPREAD * torch.randn(shape, generator=torch.Generator().manual_seed(self.seed))

    def _read(self, folder: str, texts: TextEncoder) -> Tensor:
        ((layer, context),) = read_prompt(folder, room_in(texts), self.base_fingerprint).layers.items()
        if (found := class_position_of(layer)) != self.class_position:
            raise InputError(
                f"model.start {folder}: its class's name stands at the {found}, model.class_position is"
                f" {self.class_position}; set it to {found}"
            )
        return context.delta()

    def _counted(self, context: Tensor, where: str) -> Tensor:
        if not len(context) or self.tokens not in (None, len(context)):
            expected = f"model.tokens is {self.tokens}; leave it out" if len(context) else "give at least one word"
            raise InputError(f"{where} has {len(context)} tokens; {expected}")
        return context

    def present_class_features(self) -> Tensor:
        if torch.is_grad_enabled():
            return self._prompts.features(self.context)
        return super().present_class_features()

    def batch_features(self, batch: Batch) -> Tensor:
        if self.trainer.training and data_of(self.trainer).augment:
            return super().batch_features(batch)
        return self._seen[batch.indices]

    def on_train_start(self) -> None:
        if self.context.dtype != torch.float32:
            raise InputError(
                f"trainer.precision {self.trainer.precision}: steps of SGD would be lost in so few digits; use"
                " 32-true, bf16-mixed or 16-mixed"
            )
        self._look_at_the_images()

    def on_validation_start(self) -> None:
        self._look_at_the_images()
        self.class_features = self._prompts.features(self.context)

    def _look_at_the_images(self) -> None:
        data = data_of(self.trainer)
        if self._looked_at is not data:
            self._seen, self._looked_at = domain_features(self, data), data

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        features, own = self.batch_features(batch), data_of(self.trainer).training_part
        remembered = self._seen[own.rows], own.labels[own.rows].to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            added = self.memory.logits(features.float(), *remembered, len(self.class_names))
        self.personal.update(self.logits(features) + added, batch.labels)

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.log("val/personal_accuracy", self.personal.compute())
        self.personal.reset()

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        require_end(self.trainer)
        optimizer = torch.optim.SGD(
            [self.context], self.learning_rate, momentum=self.momentum, weight_decay=self.weight_decay
        )
        if self._turn.optimizer:
            optimizer.load_state_dict(optimizer.state_dict() | {"state": self._turn.optimizer})
        self.trainer.fit_loop.setup_data()  # before which nobody knows how many batches an epoch has
        steps = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        epochs = math.ceil(self.trainer.estimated_stepping_batches / steps)
        first, end = self._turn.scheduled
        before, all_epochs = (self._turn.number - first) * epochs, (end - first) * epochs
        if all_epochs <= self.warmup_epochs:
            log.warning(
                "model.warmup_epochs %d: the prompt trains for %d, all at the rate of warm-up, %g; train longer,"
                " or set it lower", self.warmup_epochs, all_epochs, self.warmup_rate,
            )  # fmt: skip
        rates = LambdaLR(optimizer, lambda epoch: self._rate(before + epoch, all_epochs))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "epoch"}}

    def _rate(self, epoch: int, epochs: int) -> float:
        """The learning rate in one of so many epochs, as a multiple of its peak."""
        if epoch < self.warmup_epochs:
            return self.warmup_rate / self.learning_rate
        return 0.5 * (1 + math.cos(math.pi * (epoch - self.warmup_epochs) / epochs))

    def layers(self) -> dict[str, LoRALayer]:
        """The trained context as a layer, float32 on the CPU."""
        return {context_layer(self.class_position): as_layer(self.context.detach().float().cpu())}

    def stated(self, manifest: Manifest) -> dict[str, tuple[Any, Any]]:
        positions = [class_position_of(layer) for layer in manifest.layers]
        stated: dict[str, tuple[Any, Any]] = {"model.class_position": (positions, [self.class_position])}
        if self.tokens is not None:
            stated["model.tokens"] = (manifest.rank, self.tokens)
        return stated

    def write_upload(
        self,
        folder: str | Path,
        domain: str,
        num_samples: int,
        reach: Reach | None = None,
        blocks: Collection[int] | None = None,
    ) -> Path:
        """Writes the context, and its manifest."""
        layers = self.layers()
        manifest = self.manifest_of(
            layers,
            domain,
            num_samples,
            packages=("lightning", "torch", "transformers"),
            rank=len(self.context),
            alpha=len(self.context),
            targets=tuple(layers),
            format_version=2,
            kind=self.kind,
            parts=PARTS,
            layers=tuple(layers),
        )
        return write_prompt(folder, layers, manifest)
