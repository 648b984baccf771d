"""Measuring points: the merge module becomes each one's model and is tested on the unseen domain."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only

from sap_lightning.console import track
from sap_lightning.data.anchors import AnchorDataModule
from sap_lightning.data.domains import DomainDataModule, spread
from sap_lightning.federation.homes import Homes
from sap_lightning.federation.points import Point
from sap_lightning.federation.run_folder import RunFolder
from sap_lightning.files import write_tensors
from sap_lightning.fingerprints import digest
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.merged import Merged, holds
from sap_lightning.merging.method import MergeMethod
from sap_lightning.modules.merge import MergeModule
from sap_lightning.results import PERSONAL, Result, Results

log = logging.getLogger(__name__)
PROJECTED_IMAGES = 35
"""Images of each domain whose features the report projects: enough to see clusters, few enough for seconds."""


class Preparation(NamedTuple):
    """A merge, and what it was prepared of: a method and adapters by their hashes."""

    method: MergeMethod
    sources: list[str]
    merged: Merged


class Evaluation:
    """Measures what is not known yet.

    Args:
        merge: becomes the model of each point.
        anchors: the server's image–caption pairs.
        server: the trainer that merges on anchors.
        evaluator: the trainer that tests.
        results: where points are kept.
        models: the run folder that merged models are written to; nowhere if not given.
        homes: where prompts are measured too; None for clients that send adapters.
    """

    def __init__(
        self,
        merge: MergeModule,
        anchors: AnchorDataModule,
        server: L.Trainer,
        evaluator: L.Trainer,
        results: Results,
        models: RunFolder | None = None,
        homes: Homes | None = None,
    ) -> None:
        self.merge = merge
        self.anchors = anchors
        self.server = server
        self.evaluator = evaluator
        self.results = results
        self.models = models
        self.homes = homes
        self._prepared: Preparation | None = None

    def measure(self, points: Sequence[Point], data: DomainDataModule) -> None:
        """Measures points of one unseen domain.

        Args:
            points: models to be measured.
            data: the domain.
        """
        lacking = [(point, self._lacks_model(point)) for point in points]
        unknown = [(point, lacks) for point, lacks in lacking if lacks or not self.results.has(point.result)]
        for point, lacks in track(unknown, f"evaluating on {data.domain}"):
            known = None if lacks else self.results.measured(point.result.measurement)
            of = known or self._test(point, data)
            self.results.add(replace(point.result, metrics=of.metrics, rejected=of.rejected, provenance=of.provenance))
        self.results.write_csv()

    def become(self, point: Point) -> Merged | None:
        """Makes the merge module the model of a point; a method is prepared once for the same adapters.

        Returns:
            The merge; None for zero-shot and a client alone.
        """
        if point.method is None:
            self.merge.set_update(point.adapters[0].layers if point.adapters else {})
            return None
        method, sources, merged = self._prepared or (None, [], None)
        self._prepared = None  # two updates of a whole model need not be in memory
        # Not by equality, which a class of one's own may inherit without its settings.
        if merged is None or method is not point.method or sources != point.result.sources:
            self.merge.set_update({})
            merged = self.merge_of(point.adapters, point.method, point.result.sparsity)
        merged = merged.at(point.result.sparsity)
        self._prepared = Preparation(point.method, point.result.sources, merged)
        self.merge.set_update(merged.update)
        return merged

    def merge_of(
        self, adapters: Sequence[Adapter], method: MergeMethod | None, sparsity: float | None = None
    ) -> Merged:
        """The merge of some adapters, which the merge module wears from now on."""
        self.merge.use(adapters, method, sparsity)
        if not self.merge.looks_at_anchors:
            return self.merge.merge()
        self.server.validate(self.merge, datamodule=self.anchors, verbose=False)
        assert self.merge.merged is not None  # validation on anchors merges
        return self.merge.merged

    def _test(self, point: Point, data: DomainDataModule) -> Result:
        """Measures a model, and keeps what it said of each image and, of a merge, the model."""
        merged = self.become(point)
        (metrics,) = self.evaluator.test(self.merge, datamodule=data, verbose=False)
        result, accuracy = point.result, metrics["accuracy"]
        if self.homes and point.adapters:
            prompt = merged.update if merged else point.adapters[0].layers
            metrics = {**metrics, PERSONAL: self.homes.accuracy(point.adapters, prompt, point.remembers)}
        log.info("%s on unseen %s, seed %d: accuracy %.3f", result.label, result.unseen, result.seed, accuracy)
        if point.reported:
            self.keep_features(result, data)
        self.results.keep_predictions(result.measurement, self.merge.predictions)
        if merged is not None and (folder := self._model_folder(point)):
            self._keep_model(merged, folder, {f"accuracy on {result.unseen}": accuracy})
        return replace(result, metrics=dict(metrics), rejected=list(merged.rejected) if merged else [])

    @rank_zero_only
    def keep_features(self, of: Result, data: DomainDataModule) -> None:
        """Stores what the report projects of the last test, so that it needs no other of the same images.

        Args:
            of: of the model that was tested.
            data: what it was tested on.
        """
        shown = spread(torch.arange(len(self.merge.tested_features)), PROJECTED_IMAGES)
        features, labels = self.merge.tested_features[shown], self.merge.predictions.labels[shown]
        write_tensors(features_file(self.results, of, data), {"features": features, "labels": labels})

    def _model_folder(self, point: Point) -> Path | None:
        """Where the merged model of a point is kept; nowhere that of other points."""
        if point.method is None or self.models is None or point.poisoned or point.remembers:
            return None
        rejecting = "-rejecting" if self.merge.reject_outliers else ""
        return self.models.merged(point.result.unseen, f"{point.method.name}{rejecting}")

    def _lacks_model(self, point: Point) -> bool:
        """Whether a merged model that is to be kept is not there, or another in its place."""
        folder = self._model_folder(point)
        return folder is not None and point.method is not None and not holds(folder, point.method, point.result.sources)

    def _keep_model(self, merged: Merged, folder: Path, metrics: dict[str, float]) -> None:
        """Writes the merged model to the run folder, in place of one that was merged otherwise."""
        if self.server.is_global_zero and not merged.stands_in(folder):
            shutil.rmtree(folder, ignore_errors=True)
            merged.save(folder, metrics, self.merge.format, self.merge.rank)
        self.server.strategy.barrier()


def features_file(results: Results, of: Result, data: DomainDataModule) -> Path:
    """Where a run keeps the features that a measured model gives some images of a domain."""
    domain = data.require_domain()
    name = digest(of.measurement, domain, data.fingerprint(domain), PROJECTED_IMAGES)
    return results.folder / "features" / f"{name}.safetensors"
