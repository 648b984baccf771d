"""Federated instruction tuning: clients of several tasks tune one vision–language model in turns, in several ways."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from sap_lightning.callbacks.progress import training_progress
from sap_lightning.callbacks.tensorboard import EventLogger, tensorboards
from sap_lightning.data.instructions import InstructionDataModule
from sap_lightning.errors import InputError, check_at_least, check_share
from sap_lightning.federation.client import UNTRAINED, TrainerFactory, fit_at_home
from sap_lightning.federation.instruction_checks import BaseFacts, InstructionChecks, base_facts
from sap_lightning.federation.provenance import provenance
from sap_lightning.federation.run_folder import RunFolder, config_file, require_settings, write_settings
from sap_lightning.federation.systems import ALL, SYSTEMS, Server, System, aggregated
from sap_lightning.federation.turns import taking_part
from sap_lightning.federation.unseen_task import check_methods, one_shot
from sap_lightning.files import (
    as_json,
    clear_unfinished_at,
    locked,
    read_tensors,
    sha256_of_file,
    write_tensors,
    write_text,
)
from sap_lightning.fingerprints import digest
from sap_lightning.functional import answers
from sap_lightning.functional.lora import LoRALayer
from sap_lightning.functional.rounds import mean_factors
from sap_lightning.instruction_results import InstructionResult, InstructionResults
from sap_lightning.io.instruction_upload import (
    InstructionUpload,
    ReadUpload,
    read_instruction_upload,
    write_instruction_upload,
)
from sap_lightning.merging import MergeMethod
from sap_lightning.merging.registry import method_of
from sap_lightning.models.llava import encoder_of
from sap_lightning.modules.vlm_lora import Start, VLMLoRAModule

log = logging.getLogger(__name__)
BASE = "base"
"""What tables call the base as it is."""
KEPT = "kept.safetensors"
"""What a client keeps at home from one turn to the next, in its folder."""
STARTED_FILE = "start.sha256"
"""In it a client says what its upload was trained from."""
ONE_SHOT = "one shot"
"""What the log calls the one turn whose uploads are merged."""
SCORES = {"exact": answers.exact, "f1": answers.f1, "iou": answers.iou}
FREE_SETTINGS = ("federation.run_dir", "federation.systems", "federation.methods")
"""Settings that may change from one start to the next."""


class InstructionFederation:
    """Tunes one base in several ways, in a run folder, and continues there what was interrupted.

    Every client trains 1 + R times, and what it sends is made into what it goes on from: by Pilot the first time with a
    task's features apart from its own, then R times with a mixture of all tasks; by the others in one way throughout,
    so that all train as long. After each turn every client's model is measured by its own test conversations.

    Args:
        client: the module that every client trains a copy of.
        data: the clients' conversations.
        make_trainer: gives a Lightning Trainer for keyword arguments that override its own.
        run_dir: folder of the run.
        rounds: R.
        epochs_per_round: of a client in a turn.
        share: of the clients that take part in a turn, drawn anew for each; at least one does.
        systems: ways to be measured, of ``SYSTEMS``.
        methods: merge methods that are measured in one shot: on each task, its clients left out, after one turn with
            one connector for all.
        config: settings that the run folder is held to; a folder of other settings is refused.

    Raises:
        InputError: for a number out of range, a system that there is not, or one that needs images of a base that sees
            none.
    """

    def __init__(
        self,
        client: VLMLoRAModule,
        data: InstructionDataModule,
        make_trainer: TrainerFactory = L.Trainer,
        run_dir: str = "runs/instructions",
        rounds: int = 3,
        epochs_per_round: int = 1,
        share: float = 1.0,
        systems: Sequence[str] = ("local", "fedit", "pilot"),
        methods: Sequence[MergeMethod | str] = (),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        check_at_least("federation.rounds", rounds, 1)
        check_at_least("federation.epochs_per_round", epochs_per_round, 1)
        check_share("federation.share", share)
        if not systems or len(set(systems)) < len(systems) or not set(systems) <= SYSTEMS.keys():
            raise InputError(f"federation.systems {list(systems)}: name some of {', '.join(SYSTEMS)}, each once")
        self.client = client
        self.data = data
        self.make_trainer = make_trainer
        self.folder = Path(run_dir)
        self.rounds = rounds
        self.epochs = epochs_per_round
        self.share = share
        self.systems = list(systems)
        self.methods = [method_of(one, "federation.methods") for one in methods]
        check_methods(self.methods)
        self.config = dict(config or {})
        self.results = InstructionResults(self.folder)

    def run(self) -> InstructionResults:
        """Trains, aggregates and measures whatever is not done yet.

        Raises:
            InputError: when the settings differ from the run folder's, or conversations or an upload are faulty.
        """
        self._check()
        if self.config:
            contents = {"contents": {client: self.data.contents(client) for client in self.data.clients}}
            settings = {**self.config, "data": {**self.config.get("data", {}), **contents}}
            require_settings(self.folder, settings, FREE_SETTINGS)
            write_settings(self.folder / config_file(self.config), as_json(self.config))
        self._measure(BASE, 0, SYSTEMS["fedit"], Server(), [])
        for name in self.systems:
            self._play(name, SYSTEMS[name])
        if self.methods:
            self._merge_in_one_shot()
        self.results.write_csv()
        return self.results

    def _check(self) -> None:
        """Raises InputError for what cannot work, before anything is trained."""
        checks = InstructionChecks(self.client.base, self.data)
        checks.scores()  # before the base, which may be long in coming
        checks.images(self._base, self.systems)
        checks.boxes()
        if self.methods:
            checks.one_shot(self.methods, self.chosen(0))
        if any(method.needs_anchors for method in self.methods):
            checks.anchors(self._base, self._encoder)
        if not (self.config and self.results.all):  # which were made of the same conversations
            checks.conversations(self._base, self._encoder)

    @cached_property
    def _provenance(self) -> dict[str, str]:
        return provenance(self.config)

    @cached_property
    def _encoder(self) -> Any:
        return encoder_of(self.client.base, self.data.longest)

    @cached_property
    def _base(self) -> BaseFacts:
        return base_facts(self.client.base)

    # Turns

    def chosen(self, number: int) -> list[str]:
        """The clients of a turn, sorted."""
        return taking_part(self.data.clients, self.share, self.data.seed + number)

    def _play(self, name: str, system: System) -> None:
        server = Server()
        for number in range(1 + self.rounds):
            uploads = self._turn(name, system, number, server)
            server = aggregated(system, server, uploads, self.data.tasks)
            self._measure(name, number + 1, system, server, uploads)
        self._keep_models(name, system, server)

    def _merge_in_one_shot(self) -> None:
        system = SYSTEMS["fedit"]
        uploads = self._turn(ONE_SHOT, system, 0, Server())
        looks = any(method.needs_anchors for method in self.methods)
        seen = (self.data.anchors, self._encoder) if looks else None
        for method in self.methods:
            looked_at = sha256_of_file(self.data.anchors) if method.needs_anchors else ""
            sources = digest(method.record, looked_at, *sorted(one.sha256 for one in uploads))
            for task in sorted(set(self.data.tasks.values())):
                clients = [client for client, of in self.data.tasks.items() if of == task]
                new = [client for client in clients if not self.results.has(method.name, 1, client, sources)]
                start = one_shot(self.client.base, task, uploads, self.data.tasks, method, seen) if new else Start()
                for client in new:
                    module = self._module(start, system)
                    self.results.add(self._measured(method.name, 1, client, module, sources, 0))

    def _turn(self, name: str, system: System, number: int, server: Server) -> list[ReadUpload]:
        """What the clients of a turn send, which are trained if they have not been."""
        folder = self._turn_folder(name, system, number)
        for place, client in enumerate(self.chosen(number), start=1):
            title = f"{name}, turn {number + 1} of {1 + self.rounds}, client {place} ({client})"
            self._train(folder, title, client, self._start(name, system, number, server, client), system)
        return [self._read(folder, client, number) for client in self.chosen(number)]

    def _turn_folder(self, name: str, system: System, number: int) -> RunFolder:
        """Where a turn's clients train; the first turn is the same for all ways that begin alike."""
        if number:
            return RunFolder(self.folder / name / "turns" / str(number))
        return RunFolder(self.folder / "first" / (system.first if system.difference else f"{system.first}_not_apart"))

    def _start(self, name: str, system: System, number: int, server: Server, client: str) -> Start:
        """What a client begins a turn with, or is measured with after the turn before."""
        return Start(
            number,
            system.stage(number),
            self.data.tasks[client],
            server.layers.get(client, {}),
            self._connectors_for(system, server, client),
            self._kept(name, system, number, client),
        )

    def _connectors_for(self, system: System, server: Server, client: str) -> Mapping[str, Mapping[str, Tensor]]:
        """The connectors that a client gets: its own, the one for all, or one of each task."""
        if system.by_task:
            return {task: server.connectors.get(task, {}) for task in sorted(set(self.data.tasks.values()))}
        if not system.is_alone:
            return server.connectors
        return {ALL: server.connectors[client]} if client in server.connectors else {}

    def _kept(self, name: str, system: System, number: int, client: str) -> dict[str, Tensor]:
        """What a client's last turn before this has kept at home."""
        for earlier in reversed(range(number)):
            if client in self.chosen(earlier):
                file = self._turn_folder(name, system, earlier).client(client) / KEPT
                found = read_tensors(file)
                if found is None:
                    upload = self._turn_folder(name, system, earlier).upload(client)
                    raise InputError(
                        f"{file}: is missing or damaged, and the client goes on from it; remove {upload}, and both"
                        " are made anew"
                    )
                return found
        return {}

    def _train(self, folder: RunFolder, title: str, client: str, start: Start, system: System) -> None:
        upload, home = folder.upload(client), folder.client(client)
        if upload.exists():
            _require_start(upload, home / STARTED_FILE, start)
            return
        module = self._module(start, system)
        data = self.data.for_client(client, self._encoder, start.number * self.epochs)
        shown = training_progress(title)
        with locked(home):
            clear_unfinished_at(upload)
            trainer = fit_at_home(
                home, title, module, data, self.make_trainer, shown, max_epochs=self.epochs, limit_val_batches=0
            )
            if trainer.is_global_zero:
                write_tensors(home / KEPT, module.kept())
                write_text(home / STARTED_FILE, start.sha256)
                module.write_upload(upload, client, data.num_samples)
            trainer.strategy.barrier()

    def _module(self, start: Start, system: System) -> VLMLoRAModule:
        module = self.client.starting(start)
        if not system.difference:
            module.losses = replace(module.losses, difference=0.0)
        return module

    def _read(self, folder: RunFolder, client: str, number: int) -> ReadUpload:
        upload = folder.upload(client)
        read = read_instruction_upload(upload, self._base.layers, self._base.fingerprint, self._base.connector)
        manifest, task = read.adapter.manifest, self.data.tasks[client]
        assert manifest is not None
        for what, said, expected in (
            ("domain", manifest.domain, client),
            ("task", manifest.task, task),
            ("round", manifest.round, number),
        ):
            if said != expected:
                raise InputError(f"{upload}: its {what} is {said!r}, expected {expected!r}; remove it, and it is anew")
        self._check_layers(upload, read.adapter.layers)
        return read

    def _check_layers(self, upload: Path, layers: Mapping[str, LoRALayer]) -> None:
        """Raises InputError for an upload that cannot be averaged with the others."""
        if odd := sorted(layers.keys() ^ set(self.client.adapted(list(self._base.layers)))):
            words = "is not among model.targets" if odd[0] in layers else "is missing"
            raise InputError(f"{upload}: layer {odd[0]} {words}; every client trains the same layers")
        for name, layer in layers.items():
            if (layer.rank, layer.scale) != (self.client.rank, self.client.alpha / self.client.rank):
                raise InputError(
                    f"{upload}: {name} is of rank {layer.rank} and scale {layer.scale:g}, expected model.rank"
                    f" {self.client.rank} and model.alpha / model.rank {self.client.alpha / self.client.rank:g}"
                )

    @rank_zero_only
    def _keep_models(self, name: str, system: System, server: Server) -> None:
        """Writes what a newcomer of each task, or of any, begins with: a connector, and the mean of all LoRA."""
        if system.is_alone:
            return
        of_all = list(server.layers.values())
        share = [1 / len(of_all)] * len(of_all)
        layers = {layer: mean_factors([one[layer] for one in of_all], share) for layer in of_all[0]}
        for task, connector in (server.connectors or {ALL: {}}).items():
            folder = self.folder / name / "models" / (task or "all")
            shutil.rmtree(folder, ignore_errors=True)
            write_instruction_upload(folder, InstructionUpload(layers, connector), self.client.base)

    # Measuring

    def _measure(self, name: str, turn: int, system: System, server: Server, uploads: Sequence[ReadUpload]) -> None:
        """Measures what all clients have after so many turns."""
        last = turn - 1
        sources = digest(self._base.fingerprint, last, *(one.sha256 for one in uploads))
        size = 0 if system.is_alone else sum(one.size for one in uploads)
        for client in self.data.clients:
            if self.results.has(name, turn, client, sources):
                continue
            start = replace(self._start(name, system, turn, server, client), stage=system.stage(max(last, 0)))
            self.results.add(self._measured(name, turn, client, self._module(start, system), sources, size))
        for board in self._boards(name):
            for metric, value in self.results.means(name, turn).items():
                board.add_scalar(metric, value, turn)
            board.flush()

    def _boards(self, name: str) -> Iterator[Any]:
        trainer = self.make_trainer(logger=EventLogger(self.folder / "server", name), **UNTRAINED)
        yield from tensorboards(trainer)

    def _measured(
        self, name: str, turn: int, client: str, module: VLMLoRAModule, sources: str, size: int
    ) -> InstructionResult:
        trainer = self.make_trainer(logger=False, **UNTRAINED)
        data = self.data.for_client(client, self._encoder)
        (found,) = trainer.test(module, datamodule=data, verbose=False)
        task = self.data.tasks[client]
        said: list[Mapping[str, str]] = [{"said": said, "answer": answer} for said, answer in module.said]
        scores = self.judged(task, said)
        log.info("%s after turn %d: %s", name, turn, client)
        return InstructionResult(
            system=name,
            turn=turn,
            client=client,
            task=task,
            score=sum(scores) / len(scores),
            perplexity=found["perplexity"],
            perplexity_other_image=found.get("perplexity_other_image"),
            bytes_sent=size,
            sources=sources,
            said=said,
            provenance=self._provenance,
        )

    def judged(self, task: str, said: Sequence[Mapping[str, str]]) -> list[float]:
        """The score of each answer of a task, in [0, 1]."""
        judge = SCORES[self.data.score_of(task)]
        return [judge(one["said"], one["answer"]) for one in said]


def _require_start(upload: Path, file: Path, start: Start) -> None:
    """Raises InputError for the upload of a later turn that was trained from another start than it would be now."""
    if start.number and (not file.is_file() or file.read_text(encoding="utf-8") != start.sha256):
        raise InputError(
            f"{upload}: was not trained from what the turn before gives now; remove it and those of the turns after it,"
            " and they are trained anew"
        )
