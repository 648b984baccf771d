"""What a report shows beside the results: clients, masks, features, confusions and pictures."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from sap_lightning.errors import InputError
from sap_lightning.federation.evaluation import PROJECTED_IMAGES, features_file
from sap_lightning.federation.one_shot import OneShotFederation
from sap_lightning.federation.points import Point
from sap_lightning.files import read_tensors
from sap_lightning.functional.agreement import overlap, principal_components, share_kept, sign_conflict
from sap_lightning.functional.lora import dense
from sap_lightning.functional.spaces import Parameters
from sap_lightning.functional.traffic import sparse_upload, triplets_upload
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging import Pruning
from sap_lightning.merging.clients import Source, layer_names
from sap_lightning.merging.on_top import pruning_in
from sap_lightning.merging.pruning import masked
from sap_lightning.merging.selection import losses_alone, standings
from sap_lightning.models.probe import AnchorProbe
from sap_lightning.reporting.drift import Drift, drift_of
from sap_lightning.results import Predictions, Result

log = logging.getLogger(__name__)

PICTURES = 12
"""Images in each gallery, over all unseen domains."""


class Projection(NamedTuple):
    """Features of the same n images in a plane.

    Attributes:
        before: those of the base, shape (n, 2).
        after: those of the merged model, shape (n, 2).
        domains: of each image.
        classes: of each image.
    """

    before: Tensor
    after: Tensor
    domains: list[str]
    classes: list[str]


class Client(NamedTuple):
    """One row of the table of clients.

    Attributes:
        name: its domain.
        upload_bytes: of the adapter that it sent.
        sparse_bytes: of the adapter had the client pruned it; None where the merge prunes nothing of it.
        anchor_loss: mean loss of the base with this adapter on the anchors; not finite if the adapter breaks the base.
        margin: how much closer the anchors' images are to their own captions than to the others, with it alone.
        stands_out: whether that is far below the median of the clients.
        poison: what was done to it on purpose; empty if it is honest.
    """

    name: str
    upload_bytes: int
    sparse_bytes: int | None
    anchor_loss: float
    margin: float
    stands_out: bool
    poison: str


class GalleryPicture(NamedTuple):
    """One image of the gallery.

    Attributes:
        pixels: shape (3, H, W), uint8.
        unseen: its domain.
        truth: its class.
        before: the class that zero-shot gave it.
        after: the class that the merged model gave it.
    """

    pixels: Tensor
    unseen: str
    truth: str
    before: str
    after: str


@dataclass
class Evidence:
    """What the report shows beside the results; of one merge and one seed.

    Attributes:
        merged: the label of the merge that it is about, such as "sap ρ=0.8".
        clients: in the order of the table.
        share_kept: client → layer → share of the parameters that pruning kept; empty where nothing is pruned.
        overlap: Jaccard index of two clients' masks, shape (K, K), in the order of share_kept.
        conflict: layer → sign conflict of the clients' updates before and after pruning.
        projection: image features of the base and of the merge, if there are any.
        unseen_in_projection: the domain that no client of the merge has seen.
        confusion: unseen domain → images by true and predicted class (C, C), of zero-shot and of the merge.
        class_names: of the C classes.
        fixed: images that zero-shot got wrong and the merge right.
        broken: the other way round.
        drift: how alike the clients are after every epoch by tower; empty but for clients that adapt both.
    """

    merged: str
    clients: list[Client]
    share_kept: dict[str, dict[str, float]]
    overlap: Tensor
    conflict: dict[str, tuple[float, float]]
    projection: Projection | None
    unseen_in_projection: str
    confusion: dict[str, tuple[Tensor, Tensor]]
    class_names: list[str]
    fixed: list[GalleryPicture]
    broken: list[GalleryPicture]
    drift: Drift = field(default_factory=dict)


class MaskEvidence(NamedTuple):
    """What pruning left of the clients; see :class:`Evidence`.

    Attributes:
        share_kept: as there.
        overlap: as there.
        conflict: as there.
        sizes: bytes of each upload, by its sha256, had its client pruned it.
    """

    share_kept: dict[str, dict[str, float]]
    overlap: Tensor
    conflict: dict[str, tuple[float, float]]
    sizes: dict[str, int]


NO_MASKS = MaskEvidence({}, torch.empty(0, 0), {}, {})


def evidence_of_masks(pruning: Pruning, sparsity: float | None) -> MaskEvidence:
    """Share kept, mask overlap, sign conflict and bytes of clients pruned to a sparsity.

    The masks of all clients are in memory together, a byte for each parameter; their updates one layer at a time.
    """
    adapters = pruning.adapters
    masks = [pruning.kept(adapter, sparsity) for adapter in adapters]
    sizes = {one.sha256: pruned_bytes(pruning, one, kept) for one, kept in zip(adapters, masks, strict=True)}
    shares = {adapter.name: share_kept(kept) for adapter, kept in zip(adapters, masks, strict=True)}
    matrix = torch.tensor([[overlap(one, other) for other in masks] for one in masks], dtype=torch.float64)
    conflict = {}
    for name in layer_names(adapters):
        whole, pruned = [], []
        for adapter, kept in zip(adapters, masks, strict=True):
            for space in pruning.spaces(adapter, [name]).values():
                whole.append(dense(adapter.layers[name]))
                pruned.append(dense(space.update(masked(space.parameters, kept[name]))))
        conflict[name] = sign_conflict(whole), sign_conflict(pruned)
    return MaskEvidence(shares, matrix, conflict, sizes)


def gallery(
    before: Predictions, after: Predictions, images: np.ndarray, class_names: Sequence[str], unseen: str, limit: int
) -> tuple[list[GalleryPicture], list[GalleryPicture]]:
    """The images that a merge fixed and those that it broke, those first of which it is surest.

    Args:
        before: zero-shot's predictions on the unseen domain.
        after: the merged model's, of the same images.
        images: the domain's, uint8 (N, 3, H, W).
        class_names: in label order.
        unseen: the domain.
        limit: the most pictures of either kind.

    Raises:
        ValueError: the predictions are of different images.
    """
    before, after = _in_order(before), _in_order(after)
    if not torch.equal(before.images, after.images):
        raise ValueError(f"predictions of different images of {unseen}: {len(before.images)} and {len(after.images)}")
    confidence = after.probabilities.max(1).values

    def pictures(chosen: Tensor) -> list[GalleryPicture]:
        surest = chosen.nonzero().flatten()
        surest = surest[confidence[surest].argsort(descending=True, stable=True)][:limit]
        return [
            GalleryPicture(
                torch.from_numpy(np.array(images[int(after.images[i])])),
                unseen,
                *(class_names[int(of[i])] for of in (after.labels, before.predicted, after.predicted)),
            )
            for i in surest
        ]

    return pictures(~before.correct & after.correct), pictures(before.correct & ~after.correct)


def _in_order(predictions: Predictions) -> Predictions:
    order = predictions.images.argsort(stable=True)
    return Predictions(*(tensor[order] for tensor in predictions))


def collect_evidence(federation: OneShotFederation) -> Evidence:
    """Looks at a federation that has measured everything; about its SAP, or its last method if it has none."""
    return Inspection(federation).evidence()


class Inspection:
    """One merge of a finished federation, looked at from all sides."""

    def __init__(self, federation: OneShotFederation) -> None:
        self.federation = federation
        self.merge = federation.merge
        self.method, self.sparsity = federation.plan.reported, federation.plan.reported_sparsity
        self.sent = sorted(federation.sent.adapters, key=lambda adapter: adapter.name)

    def evidence(self) -> Evidence:
        """What the report shows beside the results."""
        pairs = {unseen: self.before_and_after(unseen) for unseen in self.federation.unseen}
        counts = {unseen: (confusion(before), confusion(after)) for unseen, (before, after) in pairs.items()}
        class_names = self.federation.data.class_names
        fixed, broken = [], []
        for unseen, (before, after) in pairs.items():
            images = self.federation.data.for_domain(unseen).images()
            pictures = gallery(before, after, images, class_names, unseen, max(1, PICTURES // len(pairs)))
            fixed += pictures[0]
            broken += pictures[1]
        shown = max(pairs, key=lambda unseen: gain(*pairs[unseen]))
        anchors = self.anchors()
        losses = losses_alone(self.sent, anchors)
        sound = [adapter for adapter, loss in zip(self.sent, losses, strict=True) if math.isfinite(loss)]
        pruning = self.pruning(sound, anchors)
        share_kept, overlap, conflict, sizes = evidence_of_masks(pruning, self.sparsity) if pruning else NO_MASKS
        return Evidence(
            merged=self.point(shown).result.label,
            clients=self.clients(losses, anchors, sizes),
            share_kept=share_kept,
            overlap=overlap,
            conflict=conflict,
            projection=self.projection(shown),
            unseen_in_projection=shown,
            confusion=counts,
            class_names=class_names,
            fixed=fixed,
            broken=broken,
            drift=drift_of([self.federation.folder.epochs(domain) for domain in self.federation.domains]),
        )

    def point(self, unseen: str) -> Point:
        """The merge of honest clients that this is about, on one unseen domain."""
        return next(point for point in self.federation.points_on(unseen) if point.reported and point.method)

    def zero_shot(self, unseen: str) -> Point:
        """The base on one unseen domain."""
        return next(point for point in self.federation.points_on(unseen) if point.reported and not point.method)

    def before_and_after(self, unseen: str) -> tuple[Predictions, Predictions]:
        """What zero-shot and the merge said of the unseen domain."""
        predictions = self.federation.results.predictions
        return predictions(self.zero_shot(unseen).result), predictions(self.point(unseen).result)

    def anchors(self) -> AnchorProbe:
        """The anchors, to be looked at through the base with what every client sent."""
        server = self.federation.server
        self.merge.set_update({})
        self.merge.use(())
        if server.val_dataloaders is None:  # everything was known, and the server has looked at no anchors
            server.validate(self.merge, datamodule=self.federation.anchors, verbose=False)
        self.merge.trainer = server
        return self.merge.probe()

    def pruning(self, adapters: Sequence[Adapter], anchors: AnchorProbe) -> Pruning | None:
        """How the method prunes these clients; None where it prunes nothing, or cannot score them."""
        if not (adapters and self.method.has_masks):
            return None
        try:
            prepared = self.method.prepare(adapters, self.merge.weights_of(adapters, self.method), anchors)
        except InputError as error:
            log.warning("the report has no masks: %s", error)
            return None
        return pruning_in(prepared)

    def clients(self, losses: Sequence[float], anchors: AnchorProbe, sizes: Mapping[str, int]) -> list[Client]:
        """What each client sent, its size if that were pruned, and how it stands on the anchors."""
        return [
            Client(
                adapter.name,
                adapter.size,
                sizes.get(adapter.sha256),
                loss,
                one.margin,
                one.stands_out,
                self.federation.sent.label_of(adapter),
            )
            for adapter, loss, one in zip(self.sent, losses, standings(self.sent, anchors), strict=True)
        ]

    def projection(self, unseen: str) -> Projection:
        """Image features of every domain in two dimensions, by the base and by the merge for an unseen domain."""
        before, after = self.features(self.zero_shot(unseen)), self.features(self.point(unseen))
        domains, labels = before[1], before[2]
        classes = [self.federation.data.class_names[label] for label in labels]
        return Projection(principal_components(before[0]), principal_components(after[0]), domains, classes)

    def features(self, point: Point) -> tuple[Tensor, list[str], list[int]]:
        """Features (n, d) of some images of every domain, and the domain and class of each; computed once in a run."""
        of = {domain: self._measured_on(domain, point).result for domain in self.federation.data.domains}
        known = {domain: read_tensors(self._features_file(result, domain)) for domain, result in of.items()}
        if missing := {domain: of[domain] for domain, part in known.items() if part is None}:
            self._compute_features(point, missing)
        parts = {domain: part or load_file(self._features_file(of[domain], domain)) for domain, part in known.items()}
        domains = [domain for domain, part in parts.items() for _ in part["labels"]]
        labels = torch.cat([part["labels"] for part in parts.values()]).tolist()
        return torch.cat([part["features"] for part in parts.values()]), domains, labels

    def _measured_on(self, domain: str, point: Point) -> Point:
        """The same model, measured on this domain if it was."""
        return self.zero_shot(domain) if point.method is None and domain in self.federation.unseen else point

    def _features_file(self, result: Result, domain: str) -> Path:
        return features_file(self.federation.results, result, self.federation.data.for_domain(domain))

    def _compute_features(self, point: Point, results: Mapping[str, Result]) -> None:
        self.federation.evaluation.become(point)
        self.merge.remember_stem(())
        for domain, result in results.items():
            # In the very batches that it was measured in, as the last bits of a feature depend on them.
            number = None if result.unseen == domain else PROJECTED_IMAGES
            data = self.federation.data.for_domain(domain, test_images=number)
            self.federation.evaluator.test(self.merge, datamodule=data, verbose=False)
            self.federation.evaluation.keep_features(result, data)
        self.federation.server.strategy.barrier()


def pruned_bytes(pruning: Pruning, source: Source, kept: Mapping[str, Parameters]) -> int:
    """What an upload would take had its client pruned it to this."""
    if pruning.method.space == "singular":
        shapes = {name: (layer.shape[0], layer.shape[1]) for name, layer in source.layers.items()}
        return triplets_upload(kept, shapes)
    return sparse_upload(kept)


def confusion(predictions: Predictions) -> Tensor:
    """How many images of each class (row) were taken for which (column), shape (C, C)."""
    classes = predictions.probabilities.shape[1]
    return multiclass_confusion_matrix(predictions.predicted, predictions.labels, num_classes=classes)


def gain(before: Predictions, after: Predictions) -> float:
    """How much accuracy was won."""
    return float(after.correct.float().mean() - before.correct.float().mean())
