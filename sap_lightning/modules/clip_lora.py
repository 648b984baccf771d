"""Training one client: LoRA on CLIP's vision tower against class-prompt features, or on its text tower too."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn.functional import normalize

from sap_lightning.data.loaders import Batch
from sap_lightning.errors import InputError, check_at_least, check_positive, check_share
from sap_lightning.functional.lora import LoRALayer
from sap_lightning.functional.reach import Reach
from sap_lightning.io.adapter import Expected, write_adapter
from sap_lightning.io.manifest import Manifest, base_with
from sap_lightning.io.peft_config import in_text_tower
from sap_lightning.models.clip import Base, TextEncoder, load_base
from sap_lightning.models.layers import block_of, blocks_of, layer_shapes, linear_weight
from sap_lightning.models.lora import adapted_layers, check_lora, layers_named_by, lora_layers, with_lora
from sap_lightning.modules.classifier import data_of, require_end
from sap_lightning.modules.client import ClientModule
from sap_lightning.modules.schedule import Schedule, rates
from sap_lightning.modules.turn import Turn

Tower = Literal["vision", "text"]


class CLIPLoRAModule(ClientModule):
    """Fine-tunes LoRA on CLIP with cross-entropy of images against class prompts.

    The features of the prompts are computed once, but for a client that adapts the text tower: there they follow the
    adapter at every step.

    Args:
        base: hub id or folder of a CLIP checkpoint.
        rank: LoRA rank r.
        alpha: LoRA alpha; the update is (alpha / r)·B·A.
        dropout: LoRA dropout.
        targets: names of the linear layers that get an adapter.
        towers: which towers they are in: vision, text or both.
        templates: class prompts, averaged after normalisation; ``{}`` stands for the class name.
        learning_rate: peak learning rate of AdamW.
        weight_decay: weight decay of AdamW.
        warmup: share of the steps over which the learning rate rises.
        schedule: what it does then: it falls as a cosine to nothing, or stays (constant).
        label_smoothing: label smoothing of the cross-entropy.
        reach: measure how far the adapter reaches on held-out images in changed styles, and say so in the manifest.
        sent_blocks: share of the vision tower's blocks whose layers the client sends, those that are most sensitive to
            a change of its images; or their numbers, from 0. Layers of other blocks are trained, and stay at home.
        trained_rows: share of the rows of A and B that training goes on with after its first batches, those of the
            largest Fisher information; where not all blocks are sent, in the blocks that stay at home.
        seed: seed of the adapter's initial values and of dropout.

    Raises:
        InputError: when a number is out of range, or (with the base at hand) a target is no linear layer.
    """

    def __init__(
        self,
        base: str = "openai/clip-vit-base-patch16",
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        targets: Sequence[str] = ("q_proj", "k_proj", "v_proj", "out_proj"),
        towers: Sequence[Tower] = ("vision",),
        templates: Sequence[str] = ("a photo of a {}.",),
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.1,
        schedule: Schedule = "cosine",
        label_smoothing: float = 0.0,
        reach: bool = True,
        sent_blocks: float | Sequence[int] = 1.0,
        trained_rows: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(base, templates, seed)
        self.save_hyperparameters()
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.targets = targets
        self.towers = towers
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup = warmup
        self.schedule = schedule
        self.label_smoothing = label_smoothing
        self.reach = reach
        self.sent_blocks = sent_blocks
        self.trained_rows = trained_rows
        self._first_step = 0
        self._trained_texts: TextEncoder | None = None
        self._check_settings()

    def _check_settings(self) -> None:
        check_lora(self.rank, self.dropout, self.targets)
        if not self.towers or len(set(self.towers)) < len(self.towers) or not set(self.towers) <= set(get_args(Tower)):
            raise InputError(f"model.towers must name vision, text or both, once, got {list(self.towers)}")
        for name in ("alpha", "learning_rate"):
            check_positive(f"model.{name}", getattr(self, name))
        check_at_least("model.weight_decay", self.weight_decay, 0)
        for name in ("warmup", "label_smoothing"):
            check_share(f"model.{name}", getattr(self, name))
        if not 0 < self.trained_rows <= 1:
            raise InputError(f"model.trained_rows must lie in (0, 1], got {self.trained_rows}")
        self._check_sent_blocks()

    def _check_sent_blocks(self) -> None:
        sent = self.sent_blocks
        if sent == 1.0:
            return
        if "text" in self.towers:
            raise InputError(
                "model.sent_blocks chooses among blocks of the vision tower; leave text out of model.towers"
            )
        if not isinstance(sent, Sequence) and not 0 < sent <= 1:
            alone = f"; for one block alone write [{sent:g}]" if sent >= 0 and sent % 1 == 0 else ""
            raise InputError(f"model.sent_blocks must lie in (0, 1], got {sent:g}{alone}")
        if isinstance(sent, Sequence) and (not sent or len(set(sent)) < len(sent)):
            raise InputError(f"model.sent_blocks must name blocks by their numbers, each once, got {list(sent)}")

    def for_turn(self, turn: Turn) -> Self:
        other = super().for_turn(turn)
        other.rank = other.hparams["rank"] = turn.rank or self.rank
        return other

    def configure_model(self) -> None:
        if self.tower is not None:
            return
        base = load_base(self.base)
        model = self._model_of(base)
        layers = self._layers_to_adapt(model)
        self.base_fingerprint = base_with(base.fingerprint(layers), [one.sha256 for one in self._turn.folded])
        for adapter in self._turn.folded:
            for name, layer in adapter.layers.items():
                linear_weight(model, name).add_(layer.delta())
        self.logit_scale = base.logit_scale
        self.tower = self._with_lora(model, layers)
        names = data_of(self.trainer).class_names
        self.use_classes(names, base.texts.class_features(names, self.templates))
        if "text" in self.towers:
            # Anew, since the projections may have an adapter now; hidden from Lightning, whose tower has its modules.
            self._trained_texts = TextEncoder(base.clip, self.base)

    def _with_lora(self, tower: nn.Module, layers: list[str]) -> nn.Module:
        # Another draw where a round starts anew, on a base that the last draw has already served.
        seed = self.seed + (0 if self._turn.start else self._turn.number)
        adapted = with_lora(tower, layers, self.rank, self.alpha, self.dropout, seed, self._turn.start)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name and name.split("lora_")[1][0] not in self._turn.trained:
                parameter.requires_grad_(False)
        return adapted

    def drawn(self) -> dict[str, LoRALayer]:
        """The adapter as the seed draws it, float32 on the CPU: the same for all clients, with B = 0."""
        model = self._model_of(load_base(self.base))
        return lora_layers(self._with_lora(model, self._layers_to_adapt(model)))

    def _model_of(self, base: Base) -> nn.Module:
        """The part of a base that holds the towers."""
        return base.clip if "text" in self.towers else base.tower

    def _layers_to_adapt(self, model: nn.Module) -> list[str]:
        """The linear layers of these towers that the targets name."""
        linear = [name for name in layer_shapes(model) if tower_of(name) in self.towers]
        layers = layers_named_by(self.targets, linear, f"the {' and the '.join(self.towers)} tower")
        blocks = sorted({block for layer in layers if (block := block_of(layer)) is not None})
        if isinstance(self.sent_blocks, Sequence) and (unknown := sorted(set(self.sent_blocks) - set(blocks))):
            raise InputError(f"model.sent_blocks: no adapter is in block {unknown[0]}; there are some in {blocks}")
        return layers

    def image_features(self, images: Tensor) -> Tensor:
        if self._trained_texts is None:
            return super().image_features(images)
        clip: Any = self.tower
        return normalize(clip.get_image_features(pixel_values=images).pooler_output, dim=-1)

    def present_class_features(self) -> Tensor:
        if self._trained_texts is None:
            return super().present_class_features()
        return self._trained_texts.class_features(self.class_names, self.templates, with_gradients=True)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Dropout draws the same values whether or not training was interrupted before this step.
        torch.manual_seed(self.seed + self._first_step + self.global_step)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        require_end(self.trainer)
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        # With its initial rate, as a schedule that does not begin here needs it.
        groups = [{"params": trainable, "initial_lr": self.learning_rate}]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, weight_decay=self.weight_decay)
        if self._turn.optimizer:
            optimizer.load_state_dict(optimizer.state_dict() | {"state": self._turn.optimizer})
        number, (first, end) = self._turn.number, self._turn.scheduled
        self._first_step = self._steps(0, number)
        done, steps = self._steps(first, number), self._steps(first, end)
        scheduler = rates(optimizer, self.schedule, self.warmup, steps, done)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _steps(self, first: int, end: int) -> int:
        """Steps of the optimizer in the rounds from the first to the one before the end."""
        epochs, data = self.trainer.max_epochs, data_of(self.trainer)
        if not data.curriculum.narrows:
            return (end - first) * int(self.trainer.estimated_stepping_batches)
        assert epochs is not None
        return int(data.steps(range(first * epochs, end * epochs)))

    def layers(self) -> dict[str, LoRALayer]:
        """The trained adapter by layer name in CLIPModel, float32 on the CPU.

        Raises:
            InputError: there is none yet.
        """
        if self.tower is None:
            raise InputError("model: has no adapter yet; fit a Trainer to it first")
        return lora_layers(self.tower)

    def blocks(self) -> dict[int, nn.Module]:
        """The blocks that have an adapter, by number; of the vision tower where it alone has."""
        tower: Any = self.tower
        return blocks_of(tower.base_model.model, self.layers())

    @contextmanager
    def sending(self, blocks: Collection[int] | None) -> Iterator[None]:
        """The model as the adapter makes it that is sent, for a while: without the layers that stay at home."""
        assert self.tower is not None
        home = [module for name, module in adapted_layers(self.tower).items() if not _is_sent(name, blocks)]
        scales = [module.scaling["default"] for module in home]
        for module in home:
            module.scaling["default"] = 0.0
        try:
            yield
        finally:
            for module, scale in zip(home, scales, strict=True):
                module.scaling["default"] = scale

    @property
    def keeps_epochs(self) -> bool:  # type: ignore[override]  # by its settings
        return len(self.towers) > 1

    def stated(self, manifest: Manifest) -> dict[str, tuple[Any, Any]]:
        return {
            "model.alpha": (manifest.alpha, self.alpha),
            "model.rank": (manifest.rank, self.rank),
            "model.targets": (list(manifest.targets), list(self.targets)),
        }

    def write_upload(
        self,
        folder: str | Path,
        domain: str,
        num_samples: int,
        reach: Reach | None = None,
        blocks: Collection[int] | None = None,
    ) -> Path:
        """Writes the adapter in PEFT format, and its manifest."""
        layers = {name: layer for name, layer in self.layers().items() if _is_sent(name, blocks)}
        sent, is_whole = self._turn.sent, blocks is None
        if sent == "A":  # what stays at home counts as nothing
            layers = {name: layer._replace(B=torch.zeros_like(layer.B)) for name, layer in layers.items()}
        manifest = self.manifest_of(
            layers,
            domain,
            num_samples,
            packages=("lightning", "peft", "torch", "transformers"),
            rank=self.rank,
            alpha=self.alpha,
            targets=tuple(self.targets),
            reach=reach or {},
            format_version=1 if self._turn.rounds == 1 and is_whole else 2,
            parts=Expected(sent).parts,
            layers=() if is_whole else tuple(layers),
        )
        return write_adapter(folder, layers, self.base, manifest, sent=sent)


def _is_sent(layer: str, blocks: Collection[int] | None) -> bool:
    """Whether a layer is sent with these blocks, or with all; one that is in no block always is."""
    block = block_of(layer)
    return blocks is None or block is None or block in blocks


def tower_of(layer: str) -> Tower:
    """The tower of CLIP that a layer is in."""
    return "text" if in_text_tower(layer) else "vision"
