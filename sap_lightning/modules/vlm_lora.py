"""Training one client on instructions: LoRA on a language model, and a connector from images to it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, Self, cast

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics import MeanMetric

from sap_lightning.data.instructions import InstructionBatch, InstructionDataModule
from sap_lightning.errors import check_at_least, check_positive, check_share
from sap_lightning.fingerprints import hash_tensor
from sap_lightning.functional.lora import LoRALayer, Update
from sap_lightning.io.adapter import sha256_of
from sap_lightning.io.instruction_upload import InstructionUpload, connector_sha256, write_instruction_upload
from sap_lightning.io.manifest import Manifest
from sap_lightning.io.peft_config import public_name
from sap_lightning.models.language import answer_losses
from sap_lightning.models.layers import layer_shapes
from sap_lightning.models.llava import LanguageBase, embedded, load_language_base
from sap_lightning.models.lora import check_lora, layers_named_by, lora_layers, with_lora
from sap_lightning.models.patched import Patched
from sap_lightning.modules.connector import (
    Connector,
    LossWeights,
    MixedConnector,
    SharedConnector,
    TaskConnector,
    ends_in_zeros,
)
from sap_lightning.modules.schedule import Schedule, rates

Stage = Literal["shared", "task", "mixed"]
PACKAGES = ("lightning", "peft", "torch", "transformers")


@dataclass(frozen=True)
class Start:
    """What a client begins a turn with: what the server has sent it, and what it has kept at home.

    Attributes:
        number: of the turn, from 0.
        stage: which connector is trained: one for all, Pilot's first stage, or its second.
        task: the client's.
        layers: its LoRA; drawn from the seed where there is none.
        connectors: parameters of the connector of each task, or of the one for all; the base's where they are empty.
        kept: what its last turn has kept at home.
        update: of the language model's layers, by name, in place of a LoRA, where nothing is trained any more.
    """

    number: int = 0
    stage: Stage = "shared"
    task: str = ""
    layers: Mapping[str, LoRALayer] = field(default_factory=dict)
    connectors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    update: Mapping[str, Update] | None = None

    @property
    def sha256(self) -> str:
        """Of what training goes on from."""
        hashed = sha256(sha256_of(self.layers).encode())
        for task, tensors in sorted({**self.connectors, "kept at home": self.kept}.items()):
            for name, tensor in sorted(tensors.items()):
                hash_tensor(hashed, f"{task}\0{name}", tensor)
        return hashed.hexdigest()


class VLMLoRAModule(L.LightningModule):
    """Fine-tunes LoRA on a causal language model, and its connector to a frozen vision tower, on conversations.

    The loss is that of the answers' tokens; a connector adds its own. Of a base that is a language model alone there is
    no connector, and conversations are of text (FedIT).

    Args:
        base: hub id or folder of a LLaVA checkpoint, or of a causal language model.
        rank: LoRA rank r.
        alpha: LoRA alpha; the update is (alpha / r)·B·A.
        dropout: LoRA dropout.
        targets: names of the language model's linear layers that get an adapter.
        learning_rate: peak learning rate of AdamW.
        weight_decay: weight decay of AdamW.
        warmup: share of a turn's steps over which the learning rate rises.
        schedule: what it does then: it falls as a cosine to nothing, or stays (constant).
        losses: what connectors' losses count.
        seed: of the adapter's initial values and of dropout.

    Raises:
        InputError: when a number is out of range, or (with the base at hand) a target is no linear layer.
    """

    def __init__(
        self,
        base: str = "llava-hf/llava-1.5-7b-hf",
        rank: int = 64,
        alpha: float = 128.0,
        dropout: float = 0.05,
        targets: Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        learning_rate: float = 2e-4,
        weight_decay: float = 0.0,
        warmup: float = 0.03,
        schedule: Schedule = "cosine",
        losses: LossWeights = LossWeights(),  # noqa: B008  # frozen
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_lora(rank, dropout, targets)
        check_positive("model.alpha", alpha)
        check_positive("model.learning_rate", learning_rate)
        check_at_least("model.weight_decay", weight_decay, 0)
        check_share("model.warmup", warmup)
        self.base = base
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.targets = targets
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup = warmup
        self.schedule = schedule
        self.losses = losses
        self.seed = seed
        # Checkpoints hold the trained part without the frozen base (on_save_checkpoint).
        self.strict_loading = False
        self.language: nn.Module | None = None
        self.connector: Connector | None = None
        self._start = Start()
        self._loaded: LanguageBase | None = None

    def starting(self, start: Start) -> Self:
        """An untrained module of the same settings, for a client's turn."""
        other = copy.deepcopy(self)
        other._start = start
        return other

    # The model

    def configure_model(self) -> None:
        if self.language is not None:
            return
        loaded = load_language_base(self.base)
        language = loaded.language.requires_grad_(False)
        if self._start.update is not None:
            self.language = language
            Patched(language).set_update(self._start.update)
        else:
            layers = self.adapted(list(layer_shapes(language)))
            start = self._start.layers
            self.language = with_lora(language, layers, self.rank, self.alpha, self.dropout, self.seed, start)
        # On the CPU, so that what is drawn is the same whatever device trains it.
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.connector = self._connector(loaded.connector) if loaded.connector is not None else None
        self._loaded = loaded._replace(connector=None)  # what is trained is a copy of it

    def adapted(self, linear: Sequence[str]) -> list[str]:
        """The names of the layers that get an adapter.

        Args:
            linear: names of all linear layers of the language model.

        Raises:
            InputError: a target is none of them.
        """
        return layers_named_by(self.targets, [name for name in linear if name != "lm_head"], "the language model")

    def _connector(self, base: nn.Module) -> Connector:
        start = self._start
        of_tasks = {task: _with_values(base, values or base.state_dict()) for task, values in start.connectors.items()}
        first = of_tasks.get(start.task, base)
        if start.stage == "shared":
            return SharedConnector(next(iter(of_tasks.values()), base))
        if start.stage == "task":
            connector: Connector = TaskConnector(first, self.losses)
        else:
            others = {task: one for task, one in of_tasks.items() if task != start.task}
            connector = MixedConnector(first, others, ends_in_zeros(base), self.losses)
        known = connector.state_dict()
        kept = {name: value for name, value in start.kept.items() if name in known}
        connector.load_state_dict(kept, strict=False)
        return connector

    @property
    def loaded(self) -> LanguageBase:
        """The base, once it is."""
        assert self._loaded is not None
        return self._loaded

    def embedded(self, ids: Tensor, images: Sequence[Path]) -> tuple[Tensor, Tensor]:
        """Embeddings of tokens and images, shape (n, length, C), and the connector's loss."""
        language = cast(nn.Module, self.language)
        if not images:
            return cast(Any, language).get_input_embeddings()(ids), torch.zeros((), device=self.device)
        assert self.connector is not None and self.loaded.vision is not None and self.loaded.image_token is not None
        of_images, loss = self.connector(self.loaded.vision(images, self.device))
        return embedded(language, ids, self.loaded.image_token, of_images), loss

    def answer_losses(self, batch: InstructionBatch, images: Sequence[Path]) -> tuple[Tensor, Tensor]:
        """−log p of every token of the answers, given images, and the connector's loss."""
        inputs, beside = self.embedded(batch.ids, images)
        losses, answered = answer_losses(cast(nn.Module, self.language), inputs, batch.attention, batch.labels)
        return losses[answered], beside

    # Training

    def training_step(self, batch: InstructionBatch, batch_idx: int) -> Tensor:
        losses, beside = self.answer_losses(batch, batch.images)
        self.log("train/answers", losses.mean().detach(), batch_size=len(batch.ids))
        self.log("train/connector", beside.detach(), batch_size=len(batch.ids))
        loss = self._over_all_processes(losses) + beside
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.ids))
        return loss

    def _over_all_processes(self, losses: Tensor) -> Tensor:
        """Of each process's losses what has as its mean over processes, which DDP takes, the mean over all tokens."""
        if self.trainer.world_size == 1:
            return losses.mean()
        tokens = cast(Tensor, self.all_gather(torch.tensor(losses.numel(), device=self.device)))
        return losses.sum() / tokens.float().mean()

    def on_train_batch_start(self, batch: InstructionBatch, batch_idx: int) -> None:
        # Dropout draws the same values whether or not training was interrupted before this step, and others in every
        # process.
        seen = self.current_epoch * int(self.trainer.num_training_batches) + batch_idx
        seed = self.seed + 1_000_003 * self._start.number + seen
        torch.manual_seed(seed + 1_000_000_007 * self.global_rank)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.learning_rate, weight_decay=self.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = rates(optimizer, self.schedule, self.warmup, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}

    # Evaluation

    def on_test_start(self) -> None:
        self.said: list[tuple[str, str]] = []
        self._right, self._shuffled = MeanMetric().to(self.device), MeanMetric().to(self.device)

    def test_step(self, batch: InstructionBatch, batch_idx: int) -> None:
        losses, _ = self.answer_losses(batch, batch.images)
        self._right.update(losses.mean(), losses.numel())
        if batch.others:
            losses, _ = self.answer_losses(batch, batch.others)
            self._shuffled.update(losses.mean(), losses.numel())
        said = self.answers(batch)
        self.said += list(zip(said, batch.answers, strict=True))

    def on_test_epoch_end(self) -> None:
        self.said = self._of_all_processes()
        self.log("perplexity", self._right.compute().exp(), sync_dist=True)
        if self._shuffled.update_count:
            self.log("perplexity_other_image", self._shuffled.compute().exp(), sync_dist=True)

    def _of_all_processes(self) -> list[tuple[str, str]]:
        """What was said in every process, in the order of the conversations, which were dealt out in turn."""
        if self.trainer.world_size == 1:
            return self.said
        parts: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(parts, self.said)
        return [one for row in zip_longest(*parts) for one in row if one is not None]

    @property
    def _data(self) -> InstructionDataModule:
        return cast(InstructionDataModule, cast(Any, self.trainer).datamodule)

    @torch.no_grad()
    def answers(self, batch: InstructionBatch) -> list[str]:
        """What the model says to the last question of each conversation, greedily."""
        inputs, _ = self.embedded(batch.prompts, batch.images)
        ids = cast(Any, self.language).generate(
            inputs_embeds=inputs,
            attention_mask=batch.prompt_attention,
            max_new_tokens=self._data.longest_answer,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            eos_token_id=self._data.encoder.ends or None,
            pad_token_id=self._data.encoder.padding,
        )
        return [self._data.encoder.text(row) for row in ids]

    # What is sent

    def write_upload(self, folder: Path, client: str, num_samples: int) -> Path:
        """Writes what the client sends: LoRA in PEFT's format, the connector's part for others, and a manifest."""
        layers = lora_layers(cast(nn.Module, self.language))
        sent = {} if self.connector is None else dict(self.connector.sent.state_dict())
        manifest = Manifest(
            base=public_name(self.base),
            base_fingerprint=self.loaded.fingerprint,
            domain=client,
            class_names=(),
            num_samples=num_samples,
            rank=self.rank,
            alpha=self.alpha,
            targets=tuple(self.targets),
            seed=self.seed,
            packages={name: version(name) for name in PACKAGES},
            tensors_sha256=sha256_of(layers),
            format_version=2,
            round=self._start.number,
            task=self._start.task or "instructions",
            connector_sha256=connector_sha256(sent),
        )
        return write_instruction_upload(folder, InstructionUpload(layers, sent), self.base, manifest)

    def kept(self) -> dict[str, Tensor]:
        """What stays at home from one turn to the next."""
        return {} if self.connector is None else self.connector.kept()


def _with_values(connector: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    other = copy.deepcopy(connector)
    other.load_state_dict(dict(values))
    return other
