"""One-shot federation: clients train and upload once, the server merges for every unseen domain and evaluates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L

from sap_lightning.callbacks.prune import SaliencyPruneCallback
from sap_lightning.callbacks.tensorboard import EventLogger
from sap_lightning.data.anchors import AnchorDataModule
from sap_lightning.data.domains import DomainDataModule
from sap_lightning.errors import InputError, check_at_least
from sap_lightning.federation.client import UNTRAINED, TrainerFactory, require_client
from sap_lightning.federation.evaluation import Evaluation
from sap_lightning.federation.homes import Homes
from sap_lightning.federation.parallel import Training, require_parallel, train_all
from sap_lightning.federation.points import Plan, Point, Points, Sent
from sap_lightning.federation.poison import HONEST, Poison
from sap_lightning.federation.provenance import provenance
from sap_lightning.federation.run_folder import FREE_SETTINGS, RunFolder, config_file, require_settings, write_settings
from sap_lightning.files import as_json
from sap_lightning.io.adapter import WHOLE, Adapter, Expected
from sap_lightning.io.manifest import check_domain
from sap_lightning.merging import SAP, Average, MergeMethod
from sap_lightning.merging.method import check_method
from sap_lightning.merging.selection import check_rejection
from sap_lightning.modules.client import ClientModule
from sap_lightning.modules.clip_prompt import CLIPPromptModule
from sap_lightning.modules.merge import MergeModule
from sap_lightning.modules.turn import ONE_SHOT
from sap_lightning.results import Result, Results


def server_logger(run_dir: str | Path) -> EventLogger:
    """TensorBoard events of the server, in <run_dir>/server."""
    return EventLogger(run_dir, "server")


class OneShotFederation:
    """Runs the whole protocol in a run folder, and continues there what was interrupted.

    Args:
        client: the module that every client trains a copy of.
        data: the domains; each one is a client, and in turn the unseen domain.
        anchors: the server's image–caption pairs.
        merge: merges the uploads and evaluates the result.
        make_trainer: gives a Lightning Trainer for keyword arguments that override its own.
        run_dir: folder of the run: config.yaml, clients, uploads, merged, results and report.
        unseen: domains to hold out in turn; all of them if not given, but for the poisoned client's.
        clients: domains whose clients take part; all of them if not given.
        uploads: what clients sent that trained elsewhere, folders in the run folder; no others take part then. If not
            given, clients are trained here.
        poison: a client that does harm; merges are then measured with and without it.
        parallel: how many clients are trained at once, each in a process of its own.
        plan: which merges are measured; if not given the plain average, and the merge module's method or SAP.
        results: where points are kept, if not in the run folder.
        config: settings that the run folder is held to; a folder of other settings is refused.
        free_settings: those of them that may differ.

    Attributes:
        sent: what the clients sent, once it was gathered.

    Raises:
        InputError: for fewer than two domains where clients are trained here, domains that there are not, or clients
            that cannot be trained at once.
    """

    sent: Sent
    points: Points

    def __init__(
        self,
        client: ClientModule,
        data: DomainDataModule,
        anchors: AnchorDataModule,
        merge: MergeModule,
        make_trainer: TrainerFactory = L.Trainer,
        run_dir: str = "runs/federation",
        unseen: list[str] | str | None = None,
        clients: list[str] | None = None,
        uploads: Sequence[Path] | None = None,
        poison: Poison = HONEST,
        parallel: int = 1,
        plan: Plan | None = None,
        results: Results | None = None,
        config: Mapping[str, Any] | None = None,
        free_settings: Sequence[str] = FREE_SETTINGS,
    ) -> None:
        if uploads is None and len(data.domains) < 2:
            raise InputError(
                f"data.root holds the one domain {', '.join(data.domains)}; a federation needs at least two"
            )
        self.client = client
        self.data = data
        self.anchors = anchors
        self.merge = merge
        self.make_trainer = make_trainer
        self.folder = RunFolder(run_dir).of_kind(client.kind)
        if uploads is not None and poison.domain:
            raise InputError("federation.poison.domain: a poisoned client is one that is trained here; leave it out")
        if uploads is not None and client.kind == "prompt":
            raise InputError("model: prompts are measured at their clients' sites too, so these train here; use fit")
        self.uploads = uploads
        if uploads is None:
            self.clients = chosen_domains("federation.clients", clients, data.domains)
        else:
            self.clients = [upload.name for upload in uploads]
        self.poison = poison if poison.domain else None
        self.unseen = self._unseen(unseen)
        self.plan = plan or Plan({method.name: method for method in (Average(), merge.method or SAP())})
        self.results = results or Results(Path(run_dir))
        self.config = dict(config or {})
        self.free_settings = free_settings
        self.server = make_trainer(callbacks=[SaliencyPruneCallback()], logger=server_logger(run_dir), **UNTRAINED)
        self.evaluator = make_trainer(logger=False, **UNTRAINED)
        self.homes = Homes(client, data, self.evaluator) if isinstance(client, CLIPPromptModule) else None
        kept = self.folder if self.plan.keeps_models else None
        self.evaluation = Evaluation(merge, anchors, self.server, self.evaluator, self.results, kept, self.homes)
        check_at_least("federation.parallel", parallel, 1)
        if parallel > 1:
            require_parallel(parallel, self.evaluator, client, data, make_trainer)
        self.parallel = parallel

    def _unseen(self, unseen: Sequence[str] | str | None) -> list[str]:
        chosen = chosen_domains("federation.unseen", unseen, self.data.domains)
        if self.poison is None:
            return chosen
        chosen_domains("federation.poison.domain", self.poison.domain, self.clients)
        if unseen is not None and self.poison.domain in chosen:
            raise InputError(
                f"federation.unseen {self.poison.domain}: the poisoned client has no part in a merge for its own"
                " domain; leave it out"
            )
        return [domain for domain in chosen if domain != self.poison.domain]

    @property
    def settings(self) -> dict[str, Any]:
        """All that was configured, but for where and how many clients at once."""
        federation = self.config.get("federation", {})
        kept = {name: value for name, value in federation.items() if name not in ("run_dir", "parallel")}
        return {**self.config, "federation": kept}

    @property
    def domains(self) -> list[str]:
        """Domains that some unseen domain needs a client of."""
        return [d for d in self.clients if any(d != unseen for unseen in self.unseen)]

    def run(self) -> Results:
        """Trains, collects, merges and evaluates whatever is not done yet.

        Raises:
            InputError: when the settings differ from the run folder's, or an upload is faulty.
        """
        self.check()
        for domain in self.domains if self.uploads is None else ():
            require_client(self.first_client(domain), self.data.for_domain(domain), self.folder, self.config)
        if self.config:
            require_settings(self.folder.path, self.config, self.free_settings)
        self._keep_settings()
        self.gather()
        for unseen in self.unseen:
            self.merge.remember_stem(self.sent_for(unseen).all)
            self.evaluation.measure(self.points_on(unseen), self.data.for_domain(unseen))
        return self.results

    def gather(self) -> None:
        """Trains what is not trained yet, and takes in what is to be merged and measured."""
        honest = self.collect(self.train() if self.uploads is None else self.uploads)
        self.sent = Sent.of(honest, self._poisoned(), self.poison.label if self.poison else "")
        self.points = self.points_of(self.sent)

    def points_of(self, sent: Sent) -> Points:
        """What is measured of what was sent."""
        made_with = provenance(self.settings)
        precision = self.evaluator.precision
        return Points(self.plan, sent, self.data, self.anchors, self.merge, precision, made_with, self.homes)

    def sent_for(self, unseen: str) -> Sent:
        """What the clients sent for a model of an unseen domain; the domain's own client may be among them."""
        return self.sent

    def points_on(self, unseen: str) -> list[Point]:
        """What is measured on an unseen domain."""
        return list(self.points.on(unseen))

    def senders(self, unseen: str) -> list[str]:
        """The clients whose adapters are merged for an unseen domain."""
        return [domain for domain in self.clients if domain != unseen]

    def _keep_settings(self) -> None:
        """Writes the settings that the rows of the results name by their hash."""
        write_settings(self.results.folder / config_file(self.settings), as_json(self.settings))

    def wanted(self) -> list[Result]:
        """The points that this federation measures, without their metrics."""
        return [point.result for unseen in self.unseen for point in self.points_on(unseen)]

    @property
    def merging(self) -> Mapping[str, MergeMethod]:
        """The methods that merge, by what the table calls them."""
        return self.plan.methods

    def check(self) -> None:
        """Finds a faulty base, faulty anchors, a domain's name or too few clients before clients train for hours.

        Raises:
            InputError: for the first of them.
        """
        self._check_number_of_clients()
        self._check_reach()
        for domain in self.domains:
            check_domain(domain)
        self.check_server()

    def check_server(self) -> None:
        """Finds a faulty base, faulty anchors or a domain that is to be unseen and is not, whoever the clients are.

        Raises:
            InputError: for the first of them.
        """
        for unseen in self.unseen:
            self._keep_from_anchors(unseen)
            check_domain(unseen)
        for method in self.merging.values():
            check_method(method)
        self.merge.configure_model()
        if self.client.kind == "prompt":
            self._check_prompts()
        else:
            self.merge.encode_captions(self.anchors.captions)

    def _check_prompts(self) -> None:
        if not self.data.val_fraction:
            raise InputError(
                "data.val_fraction 0: prompts are measured on images that their clients hold back, too; set it above 0"
            )
        for method in self.merging.values():
            self.merge.check_prompts(method)
        if self.poison and not self.poison.poisons_labels:
            raise InputError(
                f"federation.poison.kind {self.poison.kind} is for adapters; of prompt clients label_flip and"
                " label_shuffle poison the labels"
            )

    def _check_number_of_clients(self) -> None:
        clients = min(len(self.senders(unseen)) for unseen in self.unseen)
        left = "an unseen domain leaves"
        if clients < 1:
            alone = next(unseen for unseen in self.unseen if not self.senders(unseen))
            raise InputError(f"federation.clients: there is none but {alone}, which is to be unseen; name others")
        if self.merge.reject_outliers:
            check_rejection(clients)
            clients -= (clients - 1) // 2  # fewer than half can stand out
            left = "an unseen domain and the rejection of outliers can leave"
        for name, method in self.merging.items():
            if clients < method.least_clients:
                raise InputError(
                    f"merge.method {name} needs at least {method.least_clients} clients at these settings, {left}"
                    f" {clients}; change its settings or the method"
                )

    def _check_reach(self) -> None:
        if self.uploads is None and not (self.client.reach and self.data.val_fraction):
            asking = [f"merge.method {name}" for name, method in self.merging.items() if method.needs_reach]
            if self.merge.weights == "reach":
                asking.append("merge.weights reach")
            if asking:
                raise InputError(
                    f"{asking[0]}: the clients would not say how far their adapters reach; set model.reach true and"
                    " data.val_fraction above 0, or use another"
                )

    def _keep_from_anchors(self, unseen: str) -> None:
        anchors = Path(self.anchors.root).expanduser().resolve()
        images = (Path(self.data.root).expanduser() / unseen).resolve()
        if images.is_dir() and (anchors.is_relative_to(images) or images.is_relative_to(anchors)):
            raise InputError(
                f"anchors.root {self.anchors.root} holds images of {unseen}, which is to be unseen; take anchors from"
                " elsewhere, or name other domains in federation.unseen (sweep.unseen in a sweep)"
            )

    def train(self) -> list[Path]:
        """Trains every client that has not uploaded yet, and returns all honest uploads."""
        self.train_each(self._trainings())
        return [self.folder.upload(domain) for domain in self.domains]

    def _trainings(self) -> list[Training]:
        """The clients, and at the end the poisoned one that trains on wrong labels."""
        trainings = []
        for number, domain in enumerate(self.domains, start=1):
            data, title = self.first_data(domain), f"client {number} of {len(self.domains)} ({domain})"
            trainings.append(self.training(self.first_client(domain), data, self.folder, title))
        if self.poison and self.poison.poisons_labels and self.poison.domain in self.domains:
            domain, folder = self.poison.domain, self.folder.poisoned(self.poison.name)
            data = self.poison.relabelled(self.data.for_domain(domain))
            trainings.append(self.training(self.first_client(domain), data, folder, f"poisoned client {domain}"))
        return trainings

    def first_client(self, domain: str) -> ClientModule:
        """The module that a client trains first, and only once in one shot."""
        return self.client.for_turn(ONE_SHOT)

    def first_data(self, domain: str) -> DomainDataModule:
        """The images that it trains on."""
        return self.data.for_domain(domain)

    def training(self, client: ClientModule, data: DomainDataModule, folder: RunFolder, title: str) -> Training:
        """What a client is trained with."""
        return Training(client, data, folder, self.client_trainer, title, self.config)

    def train_each(self, trainings: Sequence[Training]) -> None:
        """Trains clients that start from the same."""
        train_all(trainings, self.parallel, self.evaluator)

    @property
    def client_trainer(self) -> TrainerFactory:
        """Gives a trainer for a client."""
        return self.make_trainer

    def collect(self, uploads: Sequence[Path], number: int = 0, expected: Expected = WHOLE) -> list[Adapter]:
        """Reads the uploads of a round, each of which must come from its own domain.

        Args:
            uploads: their folders.
            number: of the round.
            expected: what they must be beside whole adapters of the base as it is.

        Raises:
            InputError: when one is faulty, of another domain, or of another round.
        """
        adapters = self.merge.read_uploads(uploads, expected)
        for adapter in adapters:
            if (said := adapter.manifest.round if adapter.manifest else 0) != number:
                raise InputError(
                    f"{uploads[0].parent}: the upload of {adapter.name} says that it is of round {said}, expected"
                    f" {number}; remove it, and its client goes on"
                )
        found, wanted = sorted(adapter.name for adapter in adapters), sorted(upload.name for upload in uploads)
        if found != wanted:
            raise InputError(f"{uploads[0].parent}: uploads are of domains {found}, expected {wanted}")
        return adapters

    def _poisoned(self) -> list[Adapter]:
        """What the poisoned client sends in place of its honest adapter; nothing if there is none."""
        if self.poison is None or self.poison.domain not in self.domains:
            return []
        domain, folder = self.poison.domain, self.folder.poisoned(self.poison.name)
        if self.server.is_global_zero and not folder.upload(domain).exists():
            self.poison.rewrite(self.folder.upload(domain), folder.upload(domain))
        self.server.strategy.barrier()
        return self.collect([folder.upload(domain)])


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
