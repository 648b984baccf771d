"""The server: holds the base and the clients' adapters, merges them into one update, evaluates and writes it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoImageProcessor

from sap_lightning.adapter import Adapter, adapter_files, fingerprint, layer_shapes, read_adapter
from sap_lightning.base import TextEncoder, linear_weight, load_base, load_clip
from sap_lightning.data.anchors import AnchorBatch
from sap_lightning.data.domains import Batch
from sap_lightning.errors import InputError
from sap_lightning.files import new_folder, write_json
from sap_lightning.functional.lora import LoRALayer, compress_dense, recompress
from sap_lightning.functional.masking import Scope
from sap_lightning.functional.merging import average
from sap_lightning.functional.rescaling import Rescale, inverse_keep, relative_error, restore_norm, robust
from sap_lightning.functional.saliency import alignment_loss
from sap_lightning.functional.spaces import Update, dense
from sap_lightning.modules.classifier import CLIPClassifier, data_of

log = logging.getLogger(__name__)


class MergeModule(CLIPClassifier):
    """Merges adapters into one update of the base.

    ``validate`` on anchors prunes (with a ``SaliencyPruneCallback``), rescales, averages and measures the alignment
    of the result; ``test`` on a domain measures its accuracy. Without adapters it is the zero-shot base.

    Args:
        base: hub id or folder of the CLIP checkpoint that every adapter was trained on.
        templates: class prompts, averaged after normalisation; ``{}`` stands for the class name.
        rescale: how a pruned adapter is scaled up again: to its l1 or l2 norm before pruning, by 1 / (1 − ρ), or
            rank by rank as RobustMerge does (factor space only).
        rescale_scope: whether l1 and l2 restore the norm of each layer or of the whole adapter.
        weights: clients count alike, or by their number of training images.
        output: folder for the merged model; must not exist.
        format: write a PEFT adapter, a full CLIPModel, or (``auto``) an adapter whenever that is exact or a rank is
            given.
        rank: recompress the adapter that is written to this rank; the error is reported. What is measured in the
            same run is the merge before recompression.

    Raises:
        InputError: when the rank is below 1, or given for a full model.
    """

    texts: TextEncoder
    caption_features: Tensor

    def __init__(
        self,
        base: str = "openai/clip-vit-base-patch16",
        templates: Sequence[str] = ("a photo of a {}.",),
        rescale: Rescale = "l2",
        rescale_scope: Scope = "layer",
        weights: Literal["uniform", "samples"] = "uniform",
        output: str | None = None,
        format: Literal["auto", "adapter", "model"] = "auto",
        rank: int | None = None,
    ) -> None:
        super().__init__()
        if rank is not None and (rank < 1 or format == "model"):
            raise InputError(f"merge.rank {rank}: must be at least 1, and is for merge.format adapter or auto only")
        self.base = base
        self.templates = templates
        self.rescale = rescale
        self.rescale_scope = rescale_scope
        self.weights = weights
        self.output = output
        self.format = format
        self.rank = rank
        self.adapters: list[Adapter] = []
        self.update: dict[str, Update] = {}
        self._base_weights: dict[str, Tensor] = {}
        self.forget_pruning()

    def configure_model(self) -> None:
        if self.tower is None:
            self.tower, self.texts, self.logit_scale = load_base(self.base)
            self.base_fingerprint = fingerprint(self.tower)

    # The adapters and what pruning made of them

    def read_uploads(self, folders: Sequence[str | Path]) -> list[Adapter]:
        """Reads and validates uploads against the base, in an order that depends on their content only.

        Raises:
            InputError: when one is faulty or two are the same.
        """
        self.configure_model()
        assert self.tower is not None
        shapes = layer_shapes(self.tower)
        found: dict[str, Path] = {}
        adapters = []
        for folder in map(Path, folders):
            adapter = read_adapter(folder, shapes, self.base_fingerprint)
            if adapter.sha256 in found:
                raise InputError(f"{folder}: the same adapter as {found[adapter.sha256]}; give each upload once")
            found[adapter.sha256] = folder
            adapters.append(adapter)
        return sorted(adapters, key=lambda adapter: adapter.sha256)

    def forget_pruning(self) -> None:
        """The adapters count whole again."""
        self.pruned: dict[str, Mapping[str, Update]] = {}
        self.pruning: dict[str, Any] = {}

    def use_pruned(self, adapter: Adapter, updates: Mapping[str, Update], settings: Mapping[str, Any]) -> None:
        """Merge these updates in place of the whole adapter; settings tell how they were pruned."""
        self.pruned[adapter.sha256] = updates
        self.pruning = dict(settings)

    def check_rescale(self, space: str) -> None:
        """Raises InputError when this way of rescaling is not defined in a space."""
        if self.rescale == "robust" and space != "factor":
            raise InputError(f"merge.rescale robust scales the ranks of B and needs prune.space factor, got {space}")

    # Merging

    def merge(self) -> None:
        """Rescales and averages the (pruned) adapters and adds the result to the base's weights.

        Raises:
            InputError: when there is none, or their sample counts are needed and unknown.
        """
        if not self.adapters:
            raise InputError("nothing to merge: give at least one upload")
        weights = self._weights()
        self.set_update(average([self._rescaled(adapter) for adapter in self.adapters], weights))

    def _weights(self) -> list[float]:
        if self.weights == "uniform":
            return [1 / len(self.adapters)] * len(self.adapters)
        samples = [adapter.num_samples for adapter in self.adapters]
        for adapter, count in zip(self.adapters, samples, strict=True):
            if not count:
                raise InputError(
                    f"merge.weights samples: upload {adapter.name!r} has no manifest that says its number of"
                    " samples; use --merge.weights uniform"
                )
        return [count / sum(filter(None, samples)) for count in samples if count]

    def _rescaled(self, adapter: Adapter) -> Mapping[str, Update]:
        pruned = self.pruned.get(adapter.sha256)
        if pruned is None:
            return adapter.layers
        match self.rescale:
            case "l1" | "l2":
                p = 1 if self.rescale == "l1" else 2
                return restore_norm(adapter.layers, pruned, p, self.rescale_scope)
            case "inverse_keep":
                return inverse_keep(pruned, self.pruning["sparsity"])
            case "robust":
                self.check_rescale(self.pruning["space"])
                return {
                    name: robust(adapter.layers[name], layer)
                    for name, layer in pruned.items()
                    if isinstance(layer, LoRALayer)
                }
        return pruned

    @torch.inference_mode(False)
    @torch.no_grad()
    def set_update(self, update: Mapping[str, Update]) -> None:
        """The tower's weights become base + ΔW; an empty update gives the base back, bit for bit."""
        assert self.tower is not None
        for name, weight in self._base_weights.items():
            linear_weight(self.tower, name).copy_(weight)
        self._base_weights = {name: linear_weight(self.tower, name).cpu().clone() for name in update}
        for name, layer in update.items():
            linear_weight(self.tower, name).add_(dense(layer).to(self.device))
        self.update = dict(update)

    # Lightning: anchors validate, a domain tests

    def on_validation_start(self) -> None:
        # Callbacks come first, so the adapters are pruned by now.
        self.encode_captions(data_of(self.trainer).captions)
        self.merge()

    @torch.inference_mode(False)  # scoring backpropagates through them, also after a copy to the device
    def encode_captions(self, captions: Sequence[str]) -> None:
        """Computes the text features of the anchors' captions once, shape (n, d)."""
        if getattr(self, "captions", None) != list(captions):
            self.captions = list(captions)
            self.register_buffer("caption_features", self.texts(captions).to(self.device), persistent=False)

    def validation_step(self, batch: AnchorBatch, batch_idx: int) -> None:
        losses = alignment_loss(self.image_features(batch.images).float(), self.caption_features[batch.indices])
        self.log("anchor_loss", losses.mean(), batch_size=len(losses), sync_dist=True, logger=False)

    def on_test_start(self) -> None:
        names = data_of(self.trainer).class_names
        if getattr(self, "class_names", None) != names:
            self.use_classes(names, self.texts.class_features(names, self.templates))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.metrics.update(self(batch.images), batch.labels)

    def on_test_epoch_end(self) -> None:
        self.log_accuracy()

    # Output

    def save(self, folder: str | Path) -> Path:
        """Writes the merged model: a PEFT adapter or a CLIPModel folder, and ``merge.json`` with its sources.

        Raises:
            InputError: when the folder already exists.
        """
        with new_folder(folder) as staging:
            as_adapter = self._writes_adapter()
            error = self._save_adapter(staging) if as_adapter else self._save_model(staging)
            write_json(staging / "merge.json", self._record(error))
        log.info("merged %s written to %s", "adapter" if as_adapter else "model", folder)
        return Path(folder)

    def saved_in(self, folder: Path) -> bool:
        """Whether a folder holds what ``save`` wrote of these very adapters."""
        record = folder / "merge.json"
        return record.is_file() and json.loads(record.read_text(encoding="utf-8"))["sources"] == self._sources()

    def _writes_adapter(self) -> bool:
        if self.format != "auto":
            return self.format == "adapter"
        exact = all(isinstance(layer, LoRALayer) for layer in self.update.values())
        return exact or self.rank is not None

    def _save_adapter(self, folder: Path) -> float:
        layers = {name: self._as_lora(layer) for name, layer in self.update.items()}
        for name, content in adapter_files(layers, self.base).items():
            (folder / name).write_bytes(content)
        error = relative_error(self.update, layers)
        if error:
            log.info("recompressed with a relative error of %.2e (Frobenius norm)", error)
        return error

    def _as_lora(self, layer: Update) -> LoRALayer:
        if not isinstance(layer, LoRALayer):
            return compress_dense(layer, self.rank or self._total_rank())
        return layer if self.rank is None or self.rank >= layer.rank else recompress(layer, self.rank)

    def _total_rank(self) -> int:
        return sum(max(layer.rank for layer in adapter.layers.values()) for adapter in self.adapters)

    def _save_model(self, folder: Path) -> float:
        clip = load_clip(self.base)
        for name, layer in self.update.items():
            linear_weight(clip, name).add_(dense(layer))
        clip.save_pretrained(folder)
        self.texts.tokenizer.save_pretrained(folder)
        AutoImageProcessor.from_pretrained(self.base).save_pretrained(folder)
        return 0.0

    def _record(self, error: float) -> dict[str, Any]:
        settings = {key: getattr(self, key) for key in ("rescale", "rescale_scope", "weights", "rank")}
        return {
            "base": self.base,
            "base_fingerprint": self.base_fingerprint,
            "prune": self.pruning,
            "merge": settings,
            "relative_error": error,
            "sources": self._sources(),
        }

    def _sources(self) -> list[dict[str, Any]]:
        return [
            {"name": adapter.name, "sha256": adapter.sha256, "weight": weight}
            for adapter, weight in zip(self.adapters, self._weights(), strict=True)
        ]
