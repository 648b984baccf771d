"""The server: holds the base and the clients' adapters, merges them into one update, evaluates and writes it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torchmetrics import CatMetric

from sap_lightning.adapter import Adapter, fingerprint, layer_shapes
from sap_lightning.base import (
    StemCache,
    TextEncoder,
    first_changed,
    linear_shapes,
    linear_weight,
    load_base,
    model_type,
)
from sap_lightning.data.anchors import AnchorBatch
from sap_lightning.data.domains import Batch
from sap_lightning.errors import InputError
from sap_lightning.functional.lora import Update, dense
from sap_lightning.functional.masking import Scope
from sap_lightning.functional.outliers import LEAST_VALUES, OUTLIER, robust_z_scores
from sap_lightning.functional.rescaling import Rescale
from sap_lightning.functional.saliency import alignment_loss
from sap_lightning.merging import MergeMethod, named
from sap_lightning.merging.method import required
from sap_lightning.modules.classifier import CLIPClassifier, data_of
from sap_lightning.output import Merged
from sap_lightning.probe import AnchorProbe
from sap_lightning.results import Predictions
from sap_lightning.uploads import read_uploads

log = logging.getLogger(__name__)


class MergeModule(CLIPClassifier):
    """Merges adapters into one update of the base.

    ``validate`` on anchors merges and measures the alignment of the result, ``test`` on a domain measures its accuracy,
    ``predict`` gives class probabilities. Without adapters it is the zero-shot base. Adapters of a base other than CLIP
    can be merged (``merge``) by methods that need no anchors.

    Args:
        base: hub id or folder of the checkpoint that every adapter was trained on.
        templates: class prompts, averaged after normalisation; ``{}`` stands for the class name.
        method: how adapters become one update: a method, or the name of one at its own settings; if not given, as a
            ``SaliencyPruneCallback`` says (sap).
        rescale: for sap: how a pruned adapter is scaled up again: to its l1 or l2 norm before pruning, by 1 / (1 − ρ),
            or rank by rank as RobustMerge does (factor space only).
        rescale_scope: for sap: whether l1 and l2 restore the norm of each layer or of the whole adapter.
        scale: for sap: λ, the factor on the mean of the clients.
        weights: clients count alike, or by their number of training images.
        reject_outliers: leave out clients whose adapter, alone, has an anchor loss that stands out from the others'
            (robust z-score above 3.5), and say so; of fewer than three clients none stands out.
        output: folder for the merged model; must not exist.
        format: write a PEFT adapter, a full CLIPModel, or (``auto``) an adapter whenever that is exact or a rank is
            given.
        rank: recompress the adapter that is written to this rank; the error is reported. What is measured in the
            same run is the merge before recompression.
        report: for the command merge: print for every layer what the merge kept of the adapters and how they agree.
        push_to_hub: for the command merge: id of a repository on the hub to which the output is uploaded.

    Raises:
        InputError: when the rank is below 1, or given for a full model, or no method has that name.
    """

    texts: TextEncoder
    caption_features: Tensor

    def __init__(
        self,
        base: str = "openai/clip-vit-base-patch16",
        templates: Sequence[str] = ("a photo of a {}.",),
        method: MergeMethod | str | None = None,
        rescale: Rescale = "l2",
        rescale_scope: Scope = "layer",
        scale: float = 1.0,
        weights: Literal["uniform", "samples"] = "uniform",
        reject_outliers: bool = False,
        output: str | None = None,
        format: Literal["auto", "adapter", "model"] = "auto",
        rank: int | None = None,
        report: bool = False,
        push_to_hub: str | None = None,
    ) -> None:
        super().__init__()
        if rank is not None and (rank < 1 or format == "model"):
            raise InputError(f"merge.rank {rank}: must be at least 1, and is for merge.format adapter or auto only")
        self.base = base
        self.templates = templates
        self.method = named(method) if isinstance(method, str) else method
        self.rescale = rescale
        self.rescale_scope = rescale_scope
        self.scale = scale
        self.weights = weights
        self.reject_outliers = reject_outliers
        self.output = output
        self.format = format
        self.rank = rank
        self.report = report
        self.push_to_hub = push_to_hub
        self.offered_method: MergeMethod | None = None
        self.sparsity: float | None = None
        self.adapters: list[Adapter] = []
        self.rejected: list[str] = []
        self.update: dict[str, Update] = {}
        self._base_weights: dict[str, Tensor] = {}
        self._losses_alone: dict[tuple[str, str], float] = {}
        self._stem: StemCache | None = None

    def configure_model(self) -> None:
        if self.tower is None:
            self.tower, self.texts, self.logit_scale = load_base(self.base)
            self.base_fingerprint = fingerprint(self.tower)

    # Adapters and their merge

    def read_uploads(self, uploads: Sequence[str | Path]) -> list[Adapter]:
        """Reads and validates uploads against the base, in an order that depends on their content only.

        Uploads are PEFT folders, hub ids or Lightning checkpoints of this package.

        Raises:
            InputError: when one is faulty or two are the same.
        """
        if model_type(self.base) != "clip":
            return read_uploads(uploads, base_shapes=linear_shapes(self.base))
        self.configure_model()
        assert self.tower is not None
        return read_uploads(uploads, layer_shapes(self.tower), self.base_fingerprint)

    @property
    def merge_method(self) -> MergeMethod:
        """The method that merges: the module's own, or what a callback offers.

        Raises:
            InputError: when there is neither.
        """
        method = self.method or self.offered_method
        if method is None:
            raise InputError("merge.method is not set: name one, or give the trainer a SaliencyPruneCallback")
        return method

    @property
    def looks_at_anchors(self) -> bool:
        """Whether anchors have a say in the merge."""
        return self.merge_method.needs_anchors or self.reject_outliers

    def require_towers(self) -> None:
        """Raises InputError when the merge looks at anchors, which only a CLIP base can."""
        if self.looks_at_anchors and (kind := model_type(self.base)) != "clip":
            raise InputError(
                f"merge.method {self.merge_method.name} looks at anchors through CLIP, but {self.base} is a {kind}"
                " model; use one that needs none, such as --merge.method average or ties"
            )

    def merge(self, anchors: AnchorProbe | None = None) -> None:
        """Prepares the method with the adapters, and applies it.

        Raises:
            InputError: when there is no adapter or method, or the method needs what is not there.
        """
        if not self.adapters:
            raise InputError("nothing to merge: give at least one upload")
        if self.reject_outliers:
            self._reject_outliers(required(anchors, self.merge_method))
        self.merge_method.prepare(self.adapters, self.client_weights(), anchors)
        self.apply_method()

    def apply_method(self) -> None:
        """Adds what the prepared method makes of the adapters, at ``sparsity`` if set, to the base's weights."""
        self.set_update(self.merge_method.apply(self.sparsity))

    def losses_alone(self, anchors: AnchorProbe) -> list[float]:
        """The anchors' alignment loss with each adapter alone."""
        for adapter in self.adapters:
            if (anchors.fingerprint, adapter.sha256) not in self._losses_alone:
                loss = anchors.loss(adapter.layers)
                self._losses_alone[anchors.fingerprint, adapter.sha256] = loss
        return [self._losses_alone[anchors.fingerprint, adapter.sha256] for adapter in self.adapters]

    def check_rejection(self, clients: int) -> None:
        """Raises InputError when outliers are to be left out of so few clients that none can be called one."""
        if self.reject_outliers and clients < LEAST_VALUES:
            raise InputError(
                f"merge.reject_outliers needs at least {LEAST_VALUES} clients in a merge, here are {clients}; add"
                " clients or leave it out"
            )

    def _reject_outliers(self, anchors: AnchorProbe) -> None:
        losses = self.losses_alone(anchors)
        if not torch.tensor(losses).isfinite().any():
            raise InputError("no upload has a finite anchor loss; all of them are broken, or training diverged")
        self.rejected = []
        for adapter, loss, z in zip(list(self.adapters), losses, robust_z_scores(torch.tensor(losses)), strict=True):
            if z > OUTLIER:
                log.warning("%s left out: anchor loss %.4f, robust z-score %.1f", adapter.name, loss, z)
                self.rejected.append(adapter.name)
                self.adapters = [other for other in self.adapters if other is not adapter]

    def client_weights(self) -> list[float]:
        """Each adapter's share of the whole; they sum to 1.

        Raises:
            InputError: when sample counts are needed and an upload does not say its own.
        """
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

    @torch.inference_mode(False)
    @torch.no_grad()
    def set_update(self, update: Mapping[str, Update]) -> None:
        """The tower's weights become base + ΔW; an empty update gives the base back, bit for bit."""
        self.update = dict(update)
        if self.tower is None:
            return
        for name, weight in self._base_weights.items():
            linear_weight(self.tower, name).copy_(weight)
        self._base_weights = {name: linear_weight(self.tower, name).cpu().clone() for name in update}
        for name, layer in update.items():
            linear_weight(self.tower, name).add_(dense(layer).to(self.device))

    def merged(self, metrics: Mapping[str, float] | None = None) -> Merged:
        """The present update with all that is to be known of it, and what was measured of it."""
        return Merged(
            self.base,
            self.merge_method,
            self.adapters,
            self.client_weights(),
            self.update,
            metrics or {},
            self.rejected,
        )

    def save(self, folder: str | Path, metrics: Mapping[str, float] | None = None) -> Path:
        """Writes the merged model: a PEFT adapter or a CLIPModel folder, ``merge.json`` and a model card.

        Raises:
            InputError: when the folder already exists, or a full model is asked for of a base other than CLIP.
        """
        return self.merged(metrics).save(folder, self.format, self.rank)

    # Lightning: anchors validate, a domain tests, a user's images are predicted

    def on_validation_start(self) -> None:
        self.encode_captions(data_of(self.trainer).captions)
        self.anchor_images = data_of(self.trainer).fingerprint
        self.merge(self.probe())

    @torch.inference_mode(False)  # scoring backpropagates through them, also after a copy to the device
    def encode_captions(self, captions: Sequence[str]) -> None:
        """Computes the text features of the anchors' captions once, shape (n, d)."""
        if getattr(self, "captions", None) != list(captions):
            self.captions = list(captions)
            self.register_buffer("caption_features", self.texts(captions).to(self.device), persistent=False)

    def probe(self) -> AnchorProbe:
        """The anchors of the trainer that validates, to be looked at by a merge method."""
        assert self.tower is not None
        return AnchorProbe(
            self.tower,
            self.set_update,
            self._features_in_trainer_precision,
            self._anchor_batches,
            self.caption_features,
            self.logit_scale,
            self._sum_over_processes,
            images=self.anchor_images,
        )

    def _features_in_trainer_precision(self, images: Tensor) -> Tensor:
        # Saliency spans more orders of magnitude than float16 does: score in float32 where training uses it.
        if self.trainer.precision == "16-mixed":
            return self.image_features(images)
        with self.trainer.precision_plugin.forward_context():
            return self.image_features(images)

    def _anchor_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.trainer.val_dataloaders or ():
            # This runs the data module's transfer hooks too: the images arrive normalised.
            batch = self.trainer.strategy.batch_to_device(batch, self.device)
            yield batch.images, batch.indices

    def _sum_over_processes(self, tensor: Tensor) -> Tensor:
        # Processes on GPUs can only add up what lies there.
        summed = self.trainer.strategy.reduce(tensor.to(self.trainer.strategy.root_device), reduce_op="sum")
        return summed.to(tensor.device)

    def validation_step(self, batch: AnchorBatch, batch_idx: int) -> None:
        losses = alignment_loss(self.image_features(batch.images).float(), self.caption_features[batch.indices])
        self.log("anchor_loss", losses.mean(), batch_size=len(losses), sync_dist=True, logger=False)

    def on_test_start(self) -> None:
        self._use_classes_of_the_data()
        self._tested = [CatMetric(nan_strategy="disable").to(self.device) for _ in (*Predictions._fields, "features")]

    def on_predict_start(self) -> None:
        self._use_classes_of_the_data()

    def _use_classes_of_the_data(self) -> None:
        names = data_of(self.trainer).class_names
        if getattr(self, "class_names", None) != names:
            self.use_classes(names, self.texts.class_features(names, self.templates))

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Probability of every class, shape (n, classes), float32 on the CPU."""
        return self(batch.images).float().softmax(-1).cpu()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        features = self._test_features(batch, batch_idx)
        probabilities = self.logits(features).softmax(-1)
        self.metrics.update(probabilities, batch.labels)
        tested = (probabilities, batch.labels, batch.indices, features.float())
        for metric, values in zip(self._tested, tested, strict=True):
            metric.update(values)

    def on_test_epoch_end(self) -> None:
        self.log_accuracy()
        # Over all processes, in the order of the domain; the metrics are float32, which holds these integers.
        probabilities, labels, images, features = (metric.compute().cpu() for metric in self._tested)
        order = images.argsort()
        probabilities = probabilities.view(len(images), -1)
        self.tested_features = features.view(len(images), -1)[order]
        self.predictions = Predictions(probabilities[order], labels[order].long(), images[order].long())

    def remember_stem(self, adapters: Iterable[Adapter]) -> None:
        """From now on, what comes before the first layer of these adapters is computed once for each test batch.

        The batches must stay the same: call it anew for every domain. It takes memory for the hidden states of all
        images, and does nothing where an adapter changes the first encoder layer.
        """
        assert self.tower is not None
        layers = [name for adapter in adapters for name in adapter.layers]
        first = min(first_changed(self.tower, layers), first_changed(self.tower, ()) - 1)
        self._stem = StemCache(self.tower, first) if layers and first > 0 else None

    def _test_features(self, batch: Batch, batch_idx: int) -> Tensor:
        assert self.tower is not None
        if self._stem is None or first_changed(self.tower, self.update) < self._stem.first:
            return self.image_features(batch.images)
        return normalize(self._stem.embed(batch_idx, batch.images), dim=-1)
