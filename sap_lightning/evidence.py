"""What a report shows beside the results: clients, masks, features, confusions and pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sap_lightning.adapter import Adapter
from sap_lightning.functional.agreement import principal_components
from sap_lightning.functional.outliers import robust_z_scores
from sap_lightning.functional.traffic import sparse_upload, triplets_upload
from sap_lightning.merging import SAP
from sap_lightning.report import Client, Evidence, Projection, evidence_of_masks, gallery
from sap_lightning.results import ZERO_SHOT, Predictions, Result

if TYPE_CHECKING:
    from sap_lightning.federation import OneShotFederation, Point

PROJECTED_IMAGES = 105
"""Images of each domain in the projection: enough to see clusters, few enough to compute in seconds."""
PICTURES = 12
"""Images in each gallery, over all unseen domains."""


def collect_evidence(federation: OneShotFederation) -> Evidence:
    """Looks at a federation that has measured everything; about its SAP, or its last method if it has none."""
    return Inspection(federation).evidence()


class Inspection:
    """One merge of a finished federation, looked at from all sides."""

    def __init__(self, federation: OneShotFederation) -> None:
        self.federation = federation
        self.merge = federation.merge
        methods = list(federation.methods.values())
        saps = [method for method in methods if isinstance(method, SAP)]
        self.sap = saps[0] if saps else federation.prune.method_for(federation.merge)
        self.method = saps[0] if saps else methods[-1]
        own = self.sap.sparsity if self.method.sparsity is None else self.method.sparsity
        self.sparsity = min(federation.sparsities or [own], key=lambda rho: abs(rho - own))

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
        clients = self.clients()
        sent = sorted(self.federation.sent, key=lambda adapter: adapter.name)
        share_kept, overlap, conflict = evidence_of_masks(self.sap, sent, self.sparsity)
        return Evidence(
            merged=self.point(shown).result.label,
            clients=clients,
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

    def clients(self) -> list[Client]:
        """What each client sent, and how it stands out on the anchors."""
        federation = self.federation
        self.merge.set_update({})
        self.merge.adapters, self.merge.method = list(federation.sent), self.sap
        rejects, self.merge.reject_outliers = self.merge.reject_outliers, False
        federation.server.validate(self.merge, datamodule=federation.anchors, verbose=False)
        self.merge.reject_outliers = rejects
        federation._prepared = None  # the module has merged something else since
        losses = self.merge.losses_alone(self.merge.probe())
        scores = robust_z_scores(torch.tensor(losses)).tolist()
        rows = zip(federation.sent, losses, scores, strict=True)
        return sorted(Client(a.name, *self.traffic(a), loss, z, self.poison(a)) for a, loss, z in rows)

    def traffic(self, adapter: Adapter) -> tuple[int, int]:
        """Bytes of an upload, and of one that its client pruned first."""
        folder = self.federation.folder_of(adapter)
        kept = self.sap.kept(adapter, self.sparsity)
        if self.sap.space == "singular":
            shapes = {name: layer.shape for name, layer in adapter.layers.items()}
            return size_of(folder), triplets_upload(kept, shapes)
        return size_of(folder), sparse_upload(kept)

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
