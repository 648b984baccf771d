"""One-shot federation: clients train and upload once, the server merges for every unseen domain and evaluates."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from torch import nn

from sap_lightning.adapter import Adapter, check_domain, fingerprint
from sap_lightning.callbacks.figures import tensorboards
from sap_lightning.callbacks.progress import training_progress
from sap_lightning.callbacks.prune import SaliencyPruneCallback
from sap_lightning.data.anchors import AnchorDataModule
from sap_lightning.data.domains import DomainDataModule
from sap_lightning.data.fingerprints import digest
from sap_lightning.errors import InputError
from sap_lightning.evidence import collect_evidence
from sap_lightning.files import as_json, write_csv, write_text
from sap_lightning.merging.average import Average
from sap_lightning.merging.method import MergeMethod
from sap_lightning.modules.clip_lora import CLIPLoRAModule
from sap_lightning.modules.merge import MergeModule
from sap_lightning.output import holds
from sap_lightning.poison import HONEST, Poison
from sap_lightning.provenance import provenance
from sap_lightning.report import Client, write_report
from sap_lightning.results import (
    CLIENT,
    ZERO_SHOT,
    Result,
    Results,
    TableRow,
    left_out,
    markdown_table,
    rich_table,
    tabulate,
)
from sap_lightning.run_folder import FREE_SETTINGS, RunFolder, config_file, hold_to
from sap_lightning.terminal import on_terminal, track

log = logging.getLogger(__name__)
LOG_WIDTH = 160
"""Columns of the table where no terminal sets them."""
TrainerFactory = Callable[..., L.Trainer]
UNTRAINED: dict[str, Any] = {
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "limit_val_batches": 1.0,
    "limit_test_batches": 1.0,
    "fast_dev_run": False,
}
"""Trainer arguments where nothing is trained: a merge looks at all anchors, and a result is of all images."""


def server_logger(run_dir: str) -> TensorBoardLogger:
    """TensorBoard events of the server, in <run_dir>/server."""
    return TensorBoardLogger(run_dir, name="", version="server", default_hp_metric=False)


def train_client(
    module: CLIPLoRAModule, data: DomainDataModule, folder: RunFolder, make_trainer: TrainerFactory, title: str
) -> Path:
    """Trains a client on its domain, from its last checkpoint if it was interrupted, and writes its upload.

    A client whose upload stands is done and is not trained again.

    Raises:
        InputError: when the data names no domain, or one that an upload cannot name.
    """
    if data.domain is None:
        raise InputError(f"data.domain is not set; choose one of {', '.join(data.domains)}")
    check_domain(data.domain)
    upload = folder.upload(data.domain)
    if upload.exists():
        log.info("%s: upload stands in %s, not trained again", title, upload)
        return upload
    home = folder.client(data.domain)
    checkpoint = home / "last.ckpt"
    trainer = make_trainer(
        logger=TensorBoardLogger(home.parent, name="", version=home.name, default_hp_metric=False),
        callbacks=[_last_checkpoint(home), training_progress(title)],
        default_root_dir=home,
        enable_checkpointing=True,
        enable_progress_bar=on_terminal(),
    )
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint if checkpoint.is_file() else None, weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt
    if trainer.is_global_zero:
        module.write_upload(upload, data.domain, data.num_samples)
    trainer.strategy.barrier()
    return upload


def _last_checkpoint(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(
        folder, filename="last", every_n_epochs=1, save_on_train_epoch_end=True, enable_version_counter=False
    )


class Point(NamedTuple):
    """A model that is to be measured on an unseen domain.

    Attributes:
        result: what is known of it but the metrics.
        adapters: what it is made of; nothing for zero-shot.
        method: how; None for zero-shot and a client alone.
    """

    result: Result
    adapters: Sequence[Adapter]
    method: MergeMethod | None = None


class OneShotFederation:
    """Runs the whole protocol in a run folder, and continues there what was interrupted.

    Args:
        client: the module that every client trains a copy of.
        data: the domains; each one is a client, and in turn the unseen domain.
        anchors: the server's image–caption pairs.
        prune: scores and prunes the uploads.
        merge: merges and evaluates them.
        make_trainer: gives a Lightning Trainer for keyword arguments that override its own.
        run_dir: folder of the run: config.yaml, clients, uploads, merged, results and report.
        unseen: domains to hold out in turn; all of them if not given, but for the poisoned client's.
        clients: domains whose clients take part; all of them if not given.
        poison: a client that does harm; merges are then measured with and without it.
        config: settings that the run folder is held to; a folder of other settings is refused.
    """

    keeps_models = True

    def __init__(
        self,
        client: CLIPLoRAModule,
        data: DomainDataModule,
        anchors: AnchorDataModule,
        prune: SaliencyPruneCallback,
        merge: MergeModule,
        make_trainer: TrainerFactory = L.Trainer,
        run_dir: str = "runs/federation",
        unseen: list[str] | str | None = None,
        clients: list[str] | None = None,
        poison: Poison = HONEST,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.client = client
        self.data = data
        self.anchors = anchors
        self.prune = prune
        self.merge = merge
        methods = [Average(), merge.method or prune.method_for(merge)]
        self.methods: dict[str, MergeMethod] = {method.name: method for method in methods}
        self.sparsities: Sequence[float] = ()
        self.variant: dict[str, Any] = {}
        self.make_trainer = make_trainer
        self.folder = RunFolder(run_dir)
        if len(data.domains) < 2:
            raise InputError(
                f"data.root holds the one domain {', '.join(data.domains)}; a federation needs at least two"
            )
        self.clients = chosen_domains("federation.clients", clients, data.domains)
        self.poison = poison
        self.unseen = self._unseen(unseen)
        self.config = config
        self.free_settings: Sequence[str] = FREE_SETTINGS
        self.server = make_trainer(callbacks=[prune], logger=server_logger(run_dir), **UNTRAINED)
        self.evaluator = make_trainer(logger=False, **UNTRAINED)
        self._prepared: Preparation | None = None

    def _unseen(self, unseen: Sequence[str] | str | None) -> list[str]:
        poisoned = self.poison.domain
        chosen = chosen_domains("federation.unseen", unseen, self.data.domains)
        if poisoned is None:
            return chosen
        chosen_domains("federation.poison.domain", poisoned, self.clients)
        if unseen is not None and poisoned in chosen:
            raise InputError(
                f"federation.unseen {poisoned}: the poisoned client has no part in a merge for its own domain; leave"
                " it out"
            )
        return [domain for domain in chosen if domain != poisoned]

    @cached_property
    def results(self) -> Results:
        """The points that are known; of this run folder, if not set to others'."""
        return Results(self.folder.path)

    @cached_property
    def provenance(self) -> dict[str, str]:
        """What each row of the results was made with, wherever the run folder lies."""
        return provenance(self.settings)

    @property
    def settings(self) -> dict[str, Any]:
        """All that was configured but the run folder."""
        config = dict(self.config or {})
        config["federation"] = {k: v for k, v in config.get("federation", {}).items() if k != "run_dir"}
        return config

    @property
    def domains(self) -> list[str]:
        """Domains that some unseen domain needs a client of."""
        return [d for d in self.clients if any(d != unseen for unseen in self.unseen)]

    def run(self) -> Results:
        """Trains, collects, merges and evaluates whatever is not done yet, prints the table and writes the report.

        Raises:
            InputError: when the settings differ from the run folder's, or an upload is faulty.
        """
        self.measure()
        self.show(self.comparable())
        return self.results

    def measure(self) -> None:
        """Trains, collects, merges and evaluates whatever is not done yet."""
        self.check()
        if self.config is not None:
            hold_to(self.folder.path, self.config, self.free_settings)
        self.keep_settings()
        self.adapters = self.collect(self.train())
        self.honest = {adapter.sha256 for adapter in self.adapters}
        self.sent = self.with_poison(self.adapters)
        for unseen in self.unseen:
            self.evaluate(unseen)
        self.results.write()

    @rank_zero_only
    def keep_settings(self) -> None:
        """Writes the settings that the rows of the results name by their hash."""
        file = self.results.folder / config_file(self.settings)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, yaml.safe_dump(as_json(self.settings), sort_keys=False, allow_unicode=True))

    def wanted(self) -> list[Result]:
        """The points that this federation measures, without their metrics."""
        return [point.result for unseen in self.unseen for point in self.points(unseen)]

    def comparable(self) -> Results:
        """The points of this run and, to stand beside them, earlier merges of the same clients for the same domains."""
        wanted = self.wanted()
        cells = {point.cell for point in wanted}
        clients = {(point.unseen, *point.sources) for point in wanted}
        earlier = [
            row
            for row in self.results.rows
            if (row.seed, row.variant) == (self.data.seed, self.variant)
            and row.cell not in cells
            and (row.unseen, *row.sources) in clients
        ]
        latest = {row.label: row.settings for row in earlier}
        return self.results.only([*wanted, *(row for row in earlier if row.settings == latest[row.label])])

    def check(self) -> None:
        """Finds a faulty base, faulty anchors, a domain's name or too few clients before clients train for hours."""
        clients = min(len(set(self.clients) - {unseen}) for unseen in self.unseen)
        self.merge.check_rejection(clients)
        left = "an unseen domain leaves"
        if self.merge.reject_outliers:
            clients -= (clients - 1) // 2  # fewer than half can stand out
            left = "an unseen domain and the rejection of outliers can leave"
        for name, method in self.methods.items():
            if clients < max(method.least_clients, 1):
                raise InputError(
                    f"merge.method {name} needs at least {method.least_clients} clients at these settings, {left}"
                    f" {clients}; change its settings or the method"
                )
        for unseen in self.unseen:
            self._keep_from_anchors(unseen)
        for domain in self.domains:
            check_domain(domain)
        self.merge.configure_model()
        self.merge.encode_captions(self.anchors.captions)

    def _keep_from_anchors(self, unseen: str) -> None:
        anchors = Path(self.anchors.root).expanduser().resolve()
        images = (Path(self.data.root).expanduser() / unseen).resolve()
        if images.is_dir() and (anchors.is_relative_to(images) or images.is_relative_to(anchors)):
            raise InputError(
                f"anchors.root {self.anchors.root} holds images of {unseen}, which is to be unseen; take anchors from"
                " elsewhere, or name other domains in federation.unseen (sweep.unseen in a sweep)"
            )

    def train(self) -> list[Path]:
        """Trains every client that has not uploaded yet, and returns all uploads."""
        uploads = []
        for number, domain in enumerate(self.domains, start=1):
            title = f"client {number} of {len(self.domains)} ({domain})"
            client = copy.deepcopy(self.client)
            uploads.append(train_client(client, self.data.for_domain(domain), self.folder, self.make_trainer, title))
        return uploads

    def collect(self, uploads: Sequence[Path]) -> list[Adapter]:
        """Reads the uploads, each of which must come from its own domain."""
        adapters = self.merge.read_uploads(uploads)
        found, expected = sorted(adapter.name for adapter in adapters), sorted(upload.name for upload in uploads)
        if found != expected:
            raise InputError(f"{uploads[0].parent}: uploads are of domains {found}, expected {expected}")
        return adapters

    def with_poison(self, honest: Sequence[Adapter]) -> list[Adapter]:
        """The adapters as they are sent: the poisoned client's in place of its honest one."""
        domain = self.poison.domain
        if domain is None or domain not in self.domains:
            return list(honest)
        folder = self.folder.poisoned(self.poison.name)
        if self.poison.poisons_labels:
            data = self.poison.relabelled(self.data.for_domain(domain))
            train_client(copy.deepcopy(self.client), data, folder, self.make_trainer, f"poisoned client {domain}")
        elif self.server.is_global_zero and not folder.upload(domain).exists():
            self.poison.rewrite(self.folder.upload(domain), folder.upload(domain))
        self.server.strategy.barrier()
        others = [adapter for adapter in honest if adapter.name != domain]
        return sorted([*others, *self.collect([folder.upload(domain)])], key=lambda adapter: adapter.sha256)

    def evaluate(self, unseen: str) -> None:
        """Measures zero-shot, each client alone and each merge of the clients on a domain none of them has seen."""
        data = self.data.for_domain(unseen)
        self.merge.remember_stem([*self.adapters, *self.sent])
        todo = [point for point in self.points(unseen) if self.lacks(point) or not self.results.has(point.result)]
        for point in track(todo, f"evaluating on {unseen}"):
            known = None if self.lacks(point) else self.results.measured(point.result.measurement)
            of = known or self.test(point, data)
            result = replace(point.result, metrics=of.metrics, rejected=of.rejected, provenance=of.provenance)
            self.results.add(result)

    def test(self, point: Point, data: DomainDataModule) -> Result:
        """Measures a model, and keeps what it said of each image and, of a merge, the model."""
        self.wear(point)
        (metrics,) = self.evaluator.test(self.merge, datamodule=data, verbose=False)
        log.info("%s on unseen %s, seed %d: accuracy %.3f", *point.result.cell, metrics["accuracy"])
        self.results.keep_predictions(point.result.measurement, self.merge.predictions)
        if folder := self.model_folder(point):
            self.keep(folder, {f"accuracy on {point.result.unseen}": metrics["accuracy"]})
        rejected = self.merge.rejected if point.method is not None else []
        return replace(point.result, metrics=dict(metrics), rejected=rejected)

    def points(self, unseen: str) -> Iterator[Point]:
        """All that is to be measured on an unseen domain, in an order that prepares each method once."""
        honest, sent = ([a for a in adapters if a.name != unseen] for adapters in (self.adapters, self.sent))
        yield self.point(ZERO_SHOT, unseen, ())
        for adapter in sorted(honest, key=lambda adapter: adapter.name):
            yield self.point(f"{CLIENT}{adapter.name}", unseen, [adapter])
        poisoned = [adapter for adapter in sent if adapter.sha256 not in self.honest]
        for adapter in poisoned:
            point = self.point(f"{CLIENT}{adapter.name}", unseen, [adapter])
            yield point._replace(result=replace(point.result, condition=self.poison.label))
        for name, method in self.methods.items():
            yield from self.swept(name, unseen, honest, method)
            if poisoned:
                yield from self.swept(name, unseen, sent, method, self.poison.label)

    def swept(
        self, model: str, unseen: str, adapters: Sequence[Adapter], method: MergeMethod, poison: str = ""
    ) -> Iterator[Point]:
        """A merge at each sparsity, or at the method's own."""
        swept = method.sparsity is not None and len(self.sparsities) > 0
        rejecting = "rejecting outliers" if self.merge.reject_outliers else ""
        condition = ", ".join(filter(None, [poison, rejecting]))
        for sparsity in self.sparsities if swept else [method.sparsity]:
            point = self.point(model, unseen, adapters, method, sparsity)
            yield point._replace(result=replace(point.result, swept=swept, condition=condition))

    def point(
        self,
        model: str,
        unseen: str,
        adapters: Sequence[Adapter],
        method: MergeMethod | None = None,
        sparsity: float | None = None,
    ) -> Point:
        """A point, and all that its metrics depend on."""
        settings = self.settings_of(method, sparsity) if method else {}
        sources = [adapter.sha256 for adapter in adapters]
        images = [self.data.class_names, unseen, self.data_fingerprints[unseen]]
        prompts = [list(self.merge.templates), self.text_fingerprint, self.merge.logit_scale]
        base = [self.merge.base, self.merge.base_fingerprint, self.evaluator.precision]
        measurement = digest(images, base, prompts, sources, settings)
        result = Result(
            model=model,
            unseen=unseen,
            measurement=measurement,
            sparsity=sparsity,
            seed=self.data.seed,
            variant=self.variant,
            settings=settings,
            sources=sources,
            provenance=self.provenance,
        )
        return Point(result, adapters, method)

    @cached_property
    def data_fingerprints(self) -> dict[str, str]:
        """For each unseen domain what changes whenever one of its images does."""
        return {unseen: self.data.fingerprint(unseen) for unseen in self.unseen}

    @cached_property
    def text_fingerprint(self) -> str:
        """Tells the base's text tower from others."""
        texts = self.merge.texts
        return fingerprint(nn.ModuleList([texts.model, texts.projection]))

    def settings_of(self, method: MergeMethod, sparsity: float | None) -> dict[str, Any]:
        """What decides the outcome of a merge beside the adapters, as JSON knows it."""
        settings = {"method": method.name, **method.settings, "weights": self.merge.weights}
        if method.code:
            settings["code"] = method.code
        if sparsity is not None:
            settings["sparsity"] = sparsity
        if method.needs_anchors or self.merge.reject_outliers:
            settings["anchors"] = {name: getattr(self.anchors, name) for name in ("root", "num_pairs", "noise")}
            settings["anchors"]["content"] = self.anchors.fingerprint
        if self.merge.reject_outliers:
            settings["reject_outliers"] = True
        return dict(as_json(settings))

    def wear(self, point: Point) -> None:
        """Makes the merge module the model of a point; a method is prepared once for the same adapters."""
        if point.method is None:
            self.merge.set_update(point.adapters[0].layers if point.adapters else {})
            return
        preparation = Preparation(point.method, [adapter.sha256 for adapter in point.adapters])
        self.merge.sparsity = point.result.sparsity
        if preparation == self._prepared:
            self.merge.apply_method()
            return
        self._prepared = None
        self.merge.set_update({})
        self.merge.adapters, self.merge.method = list(point.adapters), point.method
        if self.merge.looks_at_anchors:
            self.server.validate(self.merge, datamodule=self.anchors, verbose=False)
        else:
            self.merge.merge()
        self._prepared = preparation

    def folder_of(self, adapter: Adapter) -> Path:
        """The upload that an adapter was read from."""
        folder = self.folder if adapter.sha256 in self.honest else self.folder.poisoned(self.poison.name)
        return folder.upload(adapter.name)

    def show(self, results: Results) -> None:
        """Prints these results as a table, writes the report, and puts both into TensorBoard."""
        self.server.strategy.barrier()
        folder, rows = results.folder, tabulate(results, self.unseen)
        if self.server.is_global_zero:
            self.print_table(results, rows)
        evidence = collect_evidence(self)
        if not self.server.is_global_zero:
            return
        write_csv(folder / "clients.csv", [Client._fields, *evidence.clients])
        boards = tensorboards(self.server)
        report = write_report(folder, results, rows, self.unseen, evidence, self.settings, boards)
        for board in boards:
            board.add_text("results", markdown_table(rows, self.unseen))
            board.flush()
        print(f"Report: {report}\nTable: {results.csv}\nFigures: tensorboard --logdir {folder}")

    def print_table(self, results: Results, rows: Sequence[TableRow]) -> None:
        """Prints the table, and which clients were left out of which merges."""
        console = Console(width=None if on_terminal() else LOG_WIDTH)
        console.print(rich_table(rows, self.unseen))
        for sentence in left_out(results):
            console.print(sentence, highlight=False)

    def model_folder(self, point: Point) -> Path | None:
        """Where the merged model of a point is kept; nowhere that of other points."""
        if point.method is None or not self.keeps_models or not set(point.result.sources) <= self.honest:
            return None
        rejecting = "-rejecting" if self.merge.reject_outliers else ""
        return self.folder.merged(point.result.unseen, f"{point.method.name}{rejecting}")

    def lacks(self, point: Point) -> bool:
        """Whether a merged model that is to be kept is not there, or another in its place."""
        folder = self.model_folder(point)
        return folder is not None and point.method is not None and not holds(folder, point.method, point.result.sources)

    def keep(self, folder: Path, metrics: Mapping[str, float]) -> None:
        """Writes the merged model to the run folder, in place of one that was merged otherwise."""
        merged = self.merge.merged(metrics)
        if self.server.is_global_zero and not merged.stands_in(folder):
            shutil.rmtree(folder, ignore_errors=True)
            merged.save(folder, self.merge.format, self.merge.rank)
        self.server.strategy.barrier()


class Preparation(NamedTuple):
    """What a method was last prepared for: adapters by their hashes."""

    method: MergeMethod
    sources: list[str]


def chosen_domains(setting: str, chosen: Sequence[str] | str | None, domains: Sequence[str]) -> list[str]:
    """The domains that a setting names, all where it names none.

    Raises:
        InputError: naming the setting, when it is empty, names others or one twice.
    """
    names = list(domains) if chosen is None else [chosen] if isinstance(chosen, str) else list(chosen)
    if unknown := sorted(set(names) - set(domains)):
        raise InputError(f"{setting} {', '.join(unknown)}: no such domain; there are {', '.join(domains)}")
    if not names:
        raise InputError(f"{setting} is empty; choose from {', '.join(domains)}, or null for all")
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"{setting} names {twice[0]} twice")
    return names
