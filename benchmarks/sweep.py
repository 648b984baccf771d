"""Points a minute of a sweep, against a fresh model, data module and Trainer for every point.

python benchmarks/sweep.py runs/pacs
python benchmarks/sweep.py runs/pacs --last_layers 3

Both sides measure SAP at the same sparsities on one unseen domain, from the uploads of a finished run, with the decoded
images on disk. A sweep scores once, swaps weights in place, keeps one Trainer and goes through the encoder layers
before the first adapted one once; ``last_layers`` leaves the adapters only on so many of the last ones.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import yaml
from jsonargparse import auto_cli

from sap_lightning.callbacks import SaliencyPruneCallback
from sap_lightning.console import quieten
from sap_lightning.data import AnchorDataModule, DomainDataModule
from sap_lightning.federation.client import UNTRAINED
from sap_lightning.federation.evaluation import Evaluation
from sap_lightning.federation.points import Plan, Points, Sent
from sap_lightning.io.adapter import Adapter, sha256_of
from sap_lightning.merging import SAP
from sap_lightning.models.stem import first_changed
from sap_lightning.modules import MergeModule
from sap_lightning.results import Results

QUIETLY = {**UNTRAINED, "logger": False}


class Parts:
    """What a run was configured with, made anew each time it is asked for."""

    def __init__(self, run: Path) -> None:
        self.config = yaml.safe_load((run / "config.yaml").read_text())
        self.base = self.config["model"]["base"]

    def data(self) -> DomainDataModule:
        return DomainDataModule(**self.config["data"], base=self.base)

    def anchors(self) -> AnchorDataModule:
        return AnchorDataModule(**self.config["anchors"], base=self.base)

    def merge(self) -> MergeModule:
        return MergeModule(self.base, self.config["model"]["templates"])


def main(
    run_dir: str,
    sparsities: tuple[float, ...] = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99),
    last_layers: int | None = None,
    unseen: str | None = None,
) -> None:
    """Prints points a minute of both, and their ratio.

    Args:
        run_dir: a finished run.
        sparsities: a point for each.
        last_layers: leave the adapters only on this many of the last encoder layers; all if not given.
        unseen: the domain to evaluate on; the first if not given.
    """
    quieten()
    parts = Parts(Path(run_dir))
    domain = unseen or parts.data().domains[0]
    module = parts.merge()
    uploads = [folder for folder in sorted((Path(run_dir) / "uploads").iterdir()) if folder.name != domain]
    adapters = [_last(adapter, module, last_layers) for adapter in module.read_uploads(uploads)]
    swept = _minutes_swept(parts, adapters, domain, sparsities)
    fresh = _minutes_fresh(parts, adapters, domain, sparsities)
    points = len(sparsities)
    print(f"sweep {points / swept:.1f} points/min, fresh {points / fresh:.1f} points/min, ratio {fresh / swept:.2f}")


def _last(adapter: Adapter, module: MergeModule, number: int | None) -> Adapter:
    if number is None:
        return adapter
    assert module.tower is not None  # its uploads are read
    first = first_changed(module.tower, ()) - number
    layers = {name: adapter.layers[name] for name in adapter.layers if first_changed(module.tower, [name]) >= first}
    return Adapter(adapter.name, layers, sha256_of(layers))


def _minutes_swept(parts: Parts, adapters: Sequence[Adapter], domain: str, sparsities: Sequence[float]) -> float:
    started = time.perf_counter()
    module, data, anchors = parts.merge(), parts.data(), parts.anchors()
    module.configure_model()
    server, evaluator = L.Trainer(callbacks=[SaliencyPruneCallback()], **QUIETLY), L.Trainer(**QUIETLY)
    plan = Plan({"sap": SAP()}, sparsities, keeps_models=False)
    points = Points(plan, Sent(adapters), data, anchors, module, evaluator.precision, {})
    merges = [point for point in points.on(domain) if point.method]
    module.remember_stem(adapters)
    with tempfile.TemporaryDirectory() as folder:
        evaluation = Evaluation(module, anchors, server, evaluator, Results(Path(folder)))
        evaluation.measure(merges, data.for_domain(domain))
    return (time.perf_counter() - started) / 60


def _minutes_fresh(parts: Parts, adapters: Sequence[Adapter], domain: str, sparsities: Sequence[float]) -> float:
    started = time.perf_counter()
    for sparsity in sparsities:
        module = parts.merge()
        module.configure_model()
        module.use(adapters)
        trainer = L.Trainer(callbacks=[SaliencyPruneCallback(sparsity=sparsity)], **QUIETLY)
        trainer.validate(module, datamodule=parts.anchors(), verbose=False)
        L.Trainer(**QUIETLY).test(module, datamodule=parts.data().for_domain(domain), verbose=False)
    return (time.perf_counter() - started) / 60


if __name__ == "__main__":
    auto_cli(main, as_positional=True)
