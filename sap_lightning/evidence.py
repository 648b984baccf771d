"""What a report shows beside the results: clients, masks, features, confusions and pictures."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sap_lightning.adapter import Adapter
from sap_lightning.errors import InputError
from sap_lightning.functional.agreement import principal_components
from sap_lightning.functional.outliers import robust_z_scores
from sap_lightning.functional.traffic import sparse_upload, triplets_upload
from sap_lightning.merging import SAP, Average, SAPAuto
from sap_lightning.merging.method import PruningMethod
from sap_lightning.probe import AnchorProbe
from sap_lightning.report import NO_MASKS, Client, Evidence, Projection, evidence_of_masks, gallery
from sap_lightning.results import ZERO_SHOT, Predictions, Result

if TYPE_CHECKING:
    from sap_lightning.federation import OneShotFederation, Point

log = logging.getLogger(__name__)

PROJECTED_IMAGES = 105
"""Images of each domain in the projection: enough to see clusters, few enough to compute in seconds."""
PICTURES = 12
"""Images in each gallery, over all unseen domains."""


def collect_evidence(federation: OneShotFederation) -> Evidence:
    """Looks at a federation that has measured everything; about its SAP, or its last method if it has none."""
    return Inspection(federation).evidence()


class Pruning(NamedTuple):
    """Adapters that a method is prepared for, and the sparsity it prunes them to."""

    method: PruningMethod
    adapters: Sequence[Adapter]
    sparsity: float

    def upload_bytes(self, adapter: Adapter) -> int:
        """What an upload would take had its client pruned it."""
        kept = self.method.kept(adapter, self.sparsity)
        if self.method.space == "singular":
            return triplets_upload(kept, {name: layer.shape for name, layer in adapter.layers.items()})
        return sparse_upload(kept)


class Inspection:
    """One merge of a finished federation, looked at from all sides."""

    def __init__(self, federation: OneShotFederation) -> None:
        self.federation = federation
        self.merge = federation.merge
        methods = list(federation.methods.values())
        self.method = next((method for method in methods if isinstance(method, SAP)), methods[-1])
        own = self.method.sparsity
        self.sparsity = own if own is None else min(federation.sparsities or [own], key=lambda rho: abs(rho - own))
        self.sent = sorted(federation.sent, key=lambda adapter: adapter.name)

    def evidence(self) -> Evidence:
        """All of it."""
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
        losses = self.merge.losses_alone(anchors)
        sound = [adapter for adapter, loss in zip(self.sent, losses, strict=True) if math.isfinite(loss)]
        pruning = self.pruning(sound, anchors)
        share_kept, overlap, conflict = evidence_of_masks(*pruning) if pruning else NO_MASKS
        return Evidence(
            merged=self.point(shown).result.label,
            clients=self.clients(losses, pruning),
            share_kept=share_kept,
            overlap=overlap,
            conflict=conflict,
            projection=self.projection(shown),
            unseen_in_projection=shown,
            confusion=counts,
            class_names=class_names,
            fixed=fixed,
            broken=broken,
        )

    def point(self, unseen: str) -> Point:
        """The merge of honest clients that this is about, on one unseen domain."""
        points = self.federation.points(unseen)
        return next(
            point
            for point in points
            if point.method is self.method
            and point.result.sparsity in (None, self.sparsity)
            and set(point.result.sources) <= self.federation.honest
        )

    def before_and_after(self, unseen: str) -> tuple[Predictions, Predictions]:
        """What zero-shot and the merge said of the unseen domain."""
        zero_shot = next(p.result for p in self.federation.points(unseen) if p.result.model == ZERO_SHOT)
        return self.predictions(zero_shot), self.predictions(self.point(unseen).result)

    def predictions(self, result: Result) -> Predictions:
        return self.federation.results.predictions(result)

    def anchors(self) -> AnchorProbe:
        """The anchors, to be looked at through the base with what every client sent."""
        self.merge.set_update({})
        self.merge.adapters, self.merge.method = self.sent, Average()
        rejects, self.merge.reject_outliers = self.merge.reject_outliers, False
        self.federation.server.validate(self.merge, datamodule=self.federation.anchors, verbose=False)
        self.merge.reject_outliers = rejects
        self.federation._prepared = None  # the module has merged something else since
        return self.merge.probe()

    def pruning(self, adapters: Sequence[Adapter], anchors: AnchorProbe) -> Pruning | None:
        """How the method prunes these clients; None where it prunes nothing, or cannot score them."""
        if not isinstance(self.method, PruningMethod | SAPAuto) or not adapters:
            return None
        try:
            self.method.prepare(adapters, [1 / len(adapters)] * len(adapters), anchors)
        except InputError as error:
            log.warning("the report has no masks: %s", error)
            return None
        if isinstance(self.method, SAPAuto):
            return Pruning(self.method.sap, adapters, self.method.chosen.sparsity)
        assert self.sparsity is not None
        return Pruning(self.method, adapters, self.sparsity)

    def clients(self, losses: Sequence[float], pruning: Pruning | None) -> list[Client]:
        """What each client sent, and how it stands out on the anchors."""
        scores = robust_z_scores(torch.tensor(losses)).tolist()
        return [
            Client(
                adapter.name,
                size_of(self.federation.folder_of(adapter)),
                pruning.upload_bytes(adapter) if pruning and adapter in pruning.adapters else None,
                loss,
                z_score,
                self.poison(adapter),
            )
            for adapter, loss, z_score in zip(self.sent, losses, scores, strict=True)
        ]

    def poison(self, adapter: Adapter) -> str:
        """What was done to an adapter; empty for an honest one."""
        return "" if adapter.sha256 in self.federation.honest else self.federation.poison.label

    def projection(self, unseen: str) -> Projection:
        """Image features of every domain in two dimensions, by the base and by the merge for an unseen domain."""
        zero_shot, merge = next(self.federation.points(unseen)), self.point(unseen)
        before, after = self.features(zero_shot), self.features(merge)
        domains, labels = before[1], before[2]
        classes = [self.federation.data.class_names[label] for label in labels]
        return Projection(principal_components(before[0]), principal_components(after[0]), domains, classes)

    def features(self, point: Point) -> tuple[Tensor, list[str], list[int]]:
        """Features (n, d) of some images of every domain, and the domain and class of each."""
        self.federation.wear(point)
        features, domains, labels = [], [], []
        for domain, (rows, classes) in self._tested():
            features.append(rows)
            domains += [domain] * len(rows)
            labels += classes
        return torch.cat(features), domains, labels

    def _tested(self) -> Iterator[tuple[str, tuple[Tensor, list[int]]]]:
        for domain in self.federation.data.domains:
            data = self.federation.data.for_domain(domain)
            data.test_images = PROJECTED_IMAGES
            self.merge.remember_stem(())
            self.federation.evaluator.test(self.merge, datamodule=data, verbose=False)
            yield domain, (self.merge.tested_features, self.merge.predictions.labels.tolist())


def confusion(predictions: Predictions) -> Tensor:
    """How many images of each class (row) were taken for which (column), shape (C, C)."""
    classes = predictions.probabilities.shape[1]
    cells = predictions.labels * classes + predictions.predicted
    return torch.bincount(cells, minlength=classes**2).view(classes, classes)


def gain(before: Predictions, after: Predictions) -> float:
    """How much accuracy was won."""
    return float(after.correct.float().mean() - before.correct.float().mean())


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
