"""The server: merges the clients' adapters into one update of the base, on anchors where the method looks at them."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sap_lightning.data.anchors import AnchorBatch
from sap_lightning.errors import InputError, check_choice, check_positive, check_share, short
from sap_lightning.functional.lora import Update
from sap_lightning.functional.outliers import LEAST_VALUES
from sap_lightning.functional.saliency import alignment_loss
from sap_lightning.io.adapter import WHOLE, Adapter, Expected, adapter_from_bytes
from sap_lightning.io.factors import Beside, Shapes
from sap_lightning.io.peft_config import in_text_tower
from sap_lightning.io.uploads import read_uploads
from sap_lightning.merging import METHODS, MergeMethod
from sap_lightning.merging.clients import Weights, client_weights, doubts_about
from sap_lightning.merging.merged import Format, Merged
from sap_lightning.merging.method import check_method, check_weights, required
from sap_lightning.merging.registry import method_of
from sap_lightning.merging.selection import Selection, doubts_on_anchors, without_outliers
from sap_lightning.models.base import base_weight, linear_shapes, model_type
from sap_lightning.models.layers import layer_shapes
from sap_lightning.models.probe import AnchorProbe, Memory
from sap_lightning.models.prompt import room_in
from sap_lightning.modules.classifier import data_of
from sap_lightning.modules.evaluator import CLIPEvaluator

log = logging.getLogger(__name__)


class MergeModule(CLIPEvaluator):
    """Merges adapters into one update of the base.

    ``validate`` on anchors merges and measures the alignment of the result; ``test`` and ``predict`` are those of
    :class:`CLIPEvaluator`. Without adapters it is the zero-shot base. Adapters of a base other than CLIP can be merged
    (``merge``) by methods that need no anchors.

    Args:
        base: hub id or folder of the checkpoint that every adapter was trained on.
        templates: class prompts, averaged after normalisation; ``{}`` stands for the class name.
        method: how adapters become one update: a method, or the name of one at its own settings; if not given, as a
            ``SaliencyPruneCallback`` says (sap). The command fit takes sap_auto, where clients say their reach and
            nothing of the group prune is set.
        weights: clients count alike (uniform), by their number of training images (samples), or by what their adapters
            win in other styles (reach); or a number for each upload in their order, by which its ΔW is multiplied
            whatever the sum. None: as the method has it; by reach in sap_auto, where clients say theirs, else alike.
        max_share: the most that a client may count by its images or its reach; the others share what is above that.
        drop_heads: merge adapters that have layers trained whole, such as a classifier's head, and leave these out.
        reject_outliers: leave out clients with whose adapter, alone, the anchors' images are much less close to their
            captions than with the others', and say so; of fewer than three clients none stands out.
        format: write a PEFT adapter, a full CLIPModel, or (``auto``) an adapter whenever that is exact or a rank is
            given.
        rank: recompress the adapter that is written to this rank; the error is reported. What is measured in the
            same run is the merge before recompression.

    Attributes:
        adapters: what is merged, see ``use``.
        merged: what was made of them; None before the first merge.

    Raises:
        InputError: when the rank is below 1, or given for a full model, no method has that name, or weights or format
            are none of those above; where it classifies, when the adapters in use are not merged.
    """

    caption_features: Tensor

    def __init__(
        self,
        base: str = "openai/clip-vit-base-patch16",
        templates: Sequence[str] = ("a photo of a {}.",),
        method: MergeMethod | str | None = None,
        weights: Weights | list[float] | None = None,
        max_share: float | None = None,
        drop_heads: bool = False,
        reject_outliers: bool = False,
        format: Format = "auto",
        rank: int | None = None,
    ) -> None:
        super().__init__(base, templates)
        self.method = None if method is None else method_of(method)
        if isinstance(weights, str):
            check_choice("merge.weights", weights, Weights)
        check_choice("merge.format", format, Format)
        if rank is not None and (rank < 1 or format == "model"):
            raise InputError(f"merge.rank {rank}: must be at least 1, and is for merge.format adapter or auto only")
        if max_share is not None:
            check_positive("merge.max_share", max_share)
            by_reach = weights is None and self.method is not None and self.method.weighs_by_reach
            if weights not in ("samples", "reach") and not by_reach:
                said = "null" if weights is None else weights
                raise InputError(f"merge.max_share {max_share:g} is for merge.weights samples or reach, got {said}")
        self.weights = weights
        self.max_share = max_share
        self.drop_heads = drop_heads
        self.reject_outliers = reject_outliers
        self.format = format
        self.rank = rank
        self.adapters: list[Adapter] = []
        self.merged: Merged | None = None
        self._used: MergeMethod | None = None
        self._outdated = False  # what it wears is of other adapters than those in use
        self._offered: MergeMethod | None = None
        self._sparsity: float | None = None
        self._anchor_images = ""
        self._captions: list[str] = []
        self._memory: Memory = {}
        self._own_weights: dict[str, float] = {}
        self._said: set[str] = set()

    # Adapters and their merge

    @cached_property
    def base_type(self) -> str:
        """What the base's config says it is: clip, bert, …"""
        return model_type(self.base)

    def read_uploads(self, uploads: Sequence[str | Path], expected: Expected = WHOLE) -> list[Adapter]:
        """Reads and validates uploads against the base, in an order that depends on their content only.

        Uploads are PEFT folders, hub ids or Lightning checkpoints of this package.

        Args:
            uploads: in any order.
            expected: what they must be beside whole adapters of the base as it is.

        Raises:
            InputError: when one is faulty or two are the same.
        """
        if isinstance(uploads, str | Path):
            raise InputError(f"{short(str(uploads))}: is one upload; give a list of them")
        adapters = self._read(uploads, expected)
        if self._numbers is not None:
            if len(self._numbers) != len(adapters):
                raise InputError(
                    f"merge.weights {self._numbers}: {len(self._numbers)} numbers for {len(adapters)} uploads"
                )
            self._own_weights = {one.sha256: weight for one, weight in zip(adapters, self._numbers, strict=True)}
        return sorted(adapters, key=lambda adapter: adapter.sha256)

    def _read(self, uploads: Sequence[str | Path], expected: Expected) -> list[Adapter]:
        beside = Beside(self.drop_heads, partial(base_weight, self.base))
        if self.base_type != "clip":
            return read_uploads(uploads, base_shapes=linear_shapes(self.base), beside=beside)
        shapes, room = self._layer_shapes(), room_in(self.texts)
        return read_uploads(uploads, shapes, self._fingerprint_for, beside=beside, expected=expected, room=room)

    def adapter_from_bytes(self, files: Mapping[str, bytes], sender: str, expected: Expected = WHOLE) -> Adapter:
        """Reads and validates an adapter that came over a network, as `adapter_from_bytes` does.

        Raises:
            InputError: when it is faulty.
        """
        return adapter_from_bytes(files, sender, self._layer_shapes(), self._fingerprint_for, expected)

    def _layer_shapes(self) -> Shapes:
        self.configure_model()
        assert self.tower is not None
        return layer_shapes(self.tower) | layer_shapes(self.texts.tower)

    def _fingerprint_for(self, layers: Iterable[str]) -> str:
        return self._both_fingerprint if any(map(in_text_tower, layers)) else self.base_fingerprint

    @cached_property
    def _both_fingerprint(self) -> str:
        update = self._patched.update
        self._patched.set_update({})
        fingerprint = self._loaded.fingerprint(layer_shapes(self.texts.tower))
        self._patched.set_update(update)
        return fingerprint

    def use(
        self, adapters: Iterable[Adapter], method: MergeMethod | None = None, sparsity: float | None = None
    ) -> None:
        """From now on these adapters are merged.

        Args:
            adapters: in an order that depends on their content only.
            method: merges them in place of the module's own.
            sparsity: ρ in place of the method's own.

        Raises:
            InputError: when one is no adapter, or ρ lies outside [0, 1].
        """
        if sparsity is not None:
            check_share("sparsity", sparsity)
        given = list(adapters)
        if others := [one for one in given if not isinstance(one, Adapter)]:
            raise InputError(f"{short(others[0])}: is no adapter; use takes what read_uploads gives for folders")
        self.adapters = given
        self._outdated = True
        self.merged = None
        self._used = method
        self._sparsity = sparsity

    def offer(self, method: MergeMethod) -> None:
        """From now on this method merges where the module has none of its own."""
        self._offered = method

    @property
    def merge_method(self) -> MergeMethod:
        """The method that merges: that in use, the module's own, or what was offered.

        Raises:
            InputError: when there is neither.
        """
        method = self._used or self.method or self._offered
        if method is None:
            raise InputError("merge.method is not set: name one, or give the trainer a SaliencyPruneCallback")
        return method

    @property
    def looks_at_anchors(self) -> bool:
        """Whether anchors have a say in the merge."""
        return self.merge_method.needs_anchors or self.reject_outliers

    def require_towers(self) -> None:
        """Raises InputError when the merge looks at anchors, which only a CLIP base can."""
        if self.looks_at_anchors and self.base_type != "clip":
            raise InputError(
                f"merge.method {self.merge_method.name} looks at anchors through CLIP, but {self.base} is a"
                f" {self.base_type} model; use one that needs none, such as --merge.method average or ties"
            )

    def check_prompts(self, method: MergeMethod) -> None:
        """Raises InputError when prompts cannot be merged by a method, or as this module is set."""
        if not method.merges_prompts:
            able = ", ".join(name for name, other in METHODS.items() if other.merges_prompts)
            raise InputError(f"merge.method {method.name} does not merge prompts, only adapters; prompts have {able}")
        if self.reject_outliers:
            raise InputError(
                "merge.reject_outliers is for adapters: prompts change nothing that anchors are asked about"
            )
        if self.format != "auto" or self.rank is not None:
            raise InputError("merge.format and merge.rank are for adapters; what a merge of prompts writes is a prompt")
        if self._numbers is not None and not math.isclose(sum(self._numbers), 1):
            raise InputError(f"merge.weights {self.weights}: those of prompts must add up to 1")

    def set_update(self, update: Mapping[str, Update]) -> None:
        super().set_update(update)
        self._outdated = False

    def merge(self, anchors: AnchorProbe | None = None) -> Merged:
        """Merges the adapters and, of a CLIP base, wears the result.

        Raises:
            InputError: when there is no adapter or method, or the method needs what is not there.
        """
        if not self.adapters:
            raise InputError("nothing to merge: give at least one upload")
        method = self.merge_method
        if self.adapters[0].kind == "prompt":
            self.check_prompts(method)
        if self._numbers is not None:
            check_weights(method, self._numbers)
        check_method(method)
        doubts = doubts_about(self.adapters)
        adapters, rejected = Selection(self.adapters, [])
        if self.reject_outliers:
            adapters, rejected = without_outliers(self.adapters, required(anchors, method))
        weights = self.weights_of(adapters, method)
        prepared = method.prepare(adapters, weights, anchors)
        update = prepared.apply(self._sparsity)
        if anchors is not None and not self.reject_outliers and len(adapters) >= LEAST_VALUES:
            doubts += doubts_on_anchors(adapters, anchors)
        for doubt in doubts:
            if doubt not in self._said:  # once, however many methods merge the same uploads
                log.warning("%s", doubt)
        self._said.update(doubts)
        self.merged = Merged(self.base, method, adapters, weights, prepared, update, self._sparsity, rejected, doubts)
        if self.base_type == "clip":
            self.set_update(self.merged.update)
        return self.merged

    @property
    def _numbers(self) -> Sequence[float] | None:
        """A number for each upload, if such are the weights."""
        return None if self.weights is None or isinstance(self.weights, str) else self.weights

    def weights_in(self, method: MergeMethod, adapters: Sequence[Adapter]) -> Weights | list[float]:
        """How these clients count in a method: as this module is set, or if nothing is said as the method has it."""
        return (self.weights or method.own_weights(adapters)) if method.uses_weights else "uniform"

    def weights_of(self, adapters: Sequence[Adapter], method: MergeMethod) -> list[float]:
        """Each adapter's share of the whole, in their order.

        Args:
            adapters: some of those that were read.
            method: how they are merged.

        Raises:
            InputError: when an upload does not say what its share depends on.
        """
        weights = self.weights_in(method, adapters)
        if isinstance(weights, str):
            return client_weights(adapters, weights, self.max_share)
        if unread := [adapter.name for adapter in adapters if adapter.sha256 not in self._own_weights]:
            raise InputError(
                f"merge.weights {weights}: are for uploads in the order of read_uploads, which did not read"
                f" {unread[0]!r}"
            )
        return [self._own_weights[adapter.sha256] for adapter in adapters]

    def save(self, folder: str | Path, metrics: Mapping[str, float] | None = None) -> Path:
        """Writes the merged model: a PEFT adapter or a CLIPModel folder, ``merge.json`` and a model card.

        Raises:
            InputError: when nothing was merged, the folder already exists, or a full model is asked for of a base
                other than CLIP.
        """
        if self.merged is None:
            raise InputError("nothing was merged yet; merge first")
        return self.merged.save(folder, metrics, self.format, self.rank)

    def use_classes_of_the_data(self) -> None:
        if self._outdated and self.adapters:
            raise InputError("the adapters in use are not merged yet; merge them, or validate on anchors, first")
        self._be_the_base_without_adapters()
        super().use_classes_of_the_data()

    def _be_the_base_without_adapters(self) -> None:
        if self._outdated and not self.adapters:
            self.set_update({})

    # Anchors are what validates

    def on_validation_start(self) -> None:
        self.require_its_images()
        self.encode_captions(data_of(self.trainer).captions)
        self._anchor_images = data_of(self.trainer).fingerprint
        self._be_the_base_without_adapters()
        if self.adapters:
            self.merge(self.probe())

    @torch.inference_mode(False)  # scoring backpropagates through them, also after a copy to the device
    def encode_captions(self, captions: Sequence[str]) -> None:
        """Computes the text features of the anchors' captions once, shape (n, d)."""
        if self._captions != list(captions):
            self._captions = list(captions)
            with self._patched.with_base_text():
                features = self.texts(captions)
            self.register_buffer("caption_features", features.to(self.device), persistent=False)

    def probe(self) -> AnchorProbe:
        """The anchors of the trainer that validates, or has validated and done nothing since."""
        return AnchorProbe(
            self._patched,
            self._anchor_batches,
            self.caption_features,
            self.logit_scale,
            self._scoring_precision,
            self._sum_over_processes,
            encode=self._encode,
            images=self._anchor_images,
            memory=self._memory,
        )

    def _encode(self, pairs: Sequence[int]) -> Tensor:
        """The captions of these pairs through the text tower as it is."""
        return self.texts.features([self._captions[pair] for pair in pairs])

    def _scoring_precision(self) -> AbstractContextManager[Any]:
        # Saliency spans more orders of magnitude than float16 does: score in float32 where training uses it.
        if self.trainer.precision == "16-mixed":
            return nullcontext()
        return self.trainer.precision_plugin.forward_context()

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
        captions = self.probe().caption_features(batch.indices)
        losses = alignment_loss(self.image_features(batch.images).float(), captions)
        self.log("anchor_loss", losses.mean(), batch_size=len(losses), sync_dist=True, logger=False)
