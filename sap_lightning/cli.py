"""The parser of all commands: one LightningCLI, in which a setting has one name whatever the command."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.cli import LightningArgumentParser

from sap_lightning.command_cli import TRAINER_DEFAULTS, CommandCLI, client_named, complete
from sap_lightning.compression.compression import Compression
from sap_lightning.data.anchors import AnchorDataModule
from sap_lightning.data.domains import DomainDataModule
from sap_lightning.errors import InputError
from sap_lightning.federation.client import train_client
from sap_lightning.federation.one_shot import OneShotFederation
from sap_lightning.federation.rounds import RoundsFederation
from sap_lightning.federation.run_folder import SERVER_SETTINGS, RunFolder, flat, is_held_to
from sap_lightning.federation.sweep import Sweep
from sap_lightning.merging import SAP, Average, MergeMethod, SAPAuto
from sap_lightning.modules.client import ClientModule
from sap_lightning.modules.clip_lora import CLIPLoRAModule
from sap_lightning.modules.clip_prompt import CLIPPromptModule
from sap_lightning.modules.merge import MergeModule
from sap_lightning.options import (
    TAKEN_BY,
    TRAINING,
    config_files_first,
    path_of,
    refuse_others,
    with_class_paths,
)

MERGE_COMMAND: dict[str, dict[str, Any]] = {
    "output": {"type": str | None, "default": None, "help": "new folder for the merged model"},
    "report": {
        "type": bool,
        "default": False,
        "help": "print for every layer what the merge kept",
    },
    "push_to_hub": {"type": str | None, "default": None, "help": "id of a repository on the hub to upload it to"},
}
REPORT: dict[str, Any] = {"type": bool, "default": True, "help": "write report.html and figures; else the table alone"}
AGGREGATION = "federation.aggregation"
UPLOADS = "PEFT folders, hub ids or our own checkpoints; for test and predict one, or a folder that merge wrote"


class Predict:
    """What predict classifies.

    Args:
        images: folder of images, at any depth.
        output: new file for image, class and probability, of every group's likeliest class if there are groups.
        class_groups: classes of each of several tasks, by its name: probabilities are then of the classes of one task.
    """

    def __init__(
        self, images: str, output: str = "predictions.csv", class_groups: dict[str, list[str]] | None = None
    ) -> None:
        self.images = images
        self.output = output
        self.class_groups = class_groups


class SapCLI(CommandCLI):
    """LightningCLI with the groups anchors, prune, merge and federation beside model, data and trainer.

    All commands read the same config file; what a command does not use of the groups of configs/pacs.yaml is passed
    over. On the command line an option that the command would ignore is refused.

    Args:
        command: one of those in ``EVERY``.
        args: the command line after it.
        description: what the command does, for its help.

    Attributes:
        merge: the server's module; where no method is named ``fit`` merges by SAPAuto, or by SAP if the group prune is
            set, clients cannot say their reach or there are several rounds; other commands merge by SAP.
        uploads: what ``--uploads`` names.

    Raises:
        InputError: for an option of other commands, a faulty setting, a Trainer that trains nothing, or settings of SAP
            in merge.method beside those of the group prune.
    """

    merge: MergeModule

    def __init__(self, command: str, args: Sequence[str], description: str | None = None) -> None:
        self.command = command
        self.line = list(args)
        refuse_others(command, args)
        if sum(bool(re.match(r"--uploads(=|$)", arg)) for arg in args) > 1:
            raise InputError("--uploads is given twice, and the last would count alone; name all uploads after one")
        self.client = client_named(args)
        super().__init__(
            ClientModule if self.client else CLIPLoRAModule,
            DomainDataModule,
            with_class_paths(config_files_first(args)),
            description,
            subclass_mode_model=self.client is not None,
            trainer_defaults=TRAINER_DEFAULTS,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(AnchorDataModule, "anchors")
        parser.add_class_arguments(SAP, "prune")
        parser.add_class_arguments(MergeModule, "merge", skip={"base", "templates"}, instantiate=False)
        parts = {"client", "data", "anchors", "merge", "make_trainer", "plan", "results", "config", "free_settings"}
        parts |= {"uploads", "method", "ask"}
        parser.add_class_arguments(RoundsFederation, "federation", skip=parts, instantiate=False)
        model = "model.init_args" if self.client else "model"
        if self.client:
            parser.set_defaults({"model": {"class_path": path_of(self.client)}})
        for target in ("data.base", "anchors.base"):
            parser.link_arguments(f"{model}.base", target)
        for target in (f"{model}.seed", "data.seed"):
            parser.link_arguments("seed_everything", target)
        if self.command == "sweep":
            parser.add_class_arguments(Sweep, "sweep")
        (parser.groups or {})["federation"].add_argument("--federation.report", **REPORT)
        if self.command == "merge":
            group = (parser.groups or {})["merge"]
            for name, option in MERGE_COMMAND.items():
                group.add_argument(f"--merge.{name}", **option)
        if self.command == "predict":
            parser.add_class_arguments(Predict, "predict")
        if self.command == "compress":
            parser.add_argument("compress.model", help="folder or hub id of the model")
            parser.add_class_arguments(Compression, "compress", skip={"model"})
            parser.link_arguments("seed_everything", "compress.seed")
        if self.command in TAKEN_BY["uploads"]:
            parser.add_argument("--uploads", nargs="+", default=[], help=UPLOADS)

    def put_together(self) -> None:
        self._refuse_of_prompts(self.given(AGGREGATION))
        self.merge = self._merge_module()
        if self.command in TRAINING:
            self._check_that_it_ends()
            self.check_that_it_trains()
        given = self.config.get("uploads") or []
        self.uploads: list[str] = [given] if isinstance(given, str) else list(given)

    def _check_that_it_ends(self) -> None:
        trainer = self.config_init.trainer
        if trainer.max_epochs is None and trainer.max_steps == -1 and trainer.max_time is None:
            raise InputError("trainer.max_epochs is null, which is 1,000 epochs to Lightning; give a number")

    def _merge_module(self) -> MergeModule:
        settings = {name: value for name, value in self.config_init.merge.items() if name not in MERGE_COMMAND}
        method = settings.pop("method")
        if isinstance(settings["weights"], list) and self.command in TAKEN_BY["federation"]:
            raise InputError(
                f"merge.weights {settings['weights']}: numbers are for the uploads that the command merge names; take"
                " uniform, samples or reach"
            )
        if isinstance(method, SAP) and self.command in TAKEN_BY["merge.method"]:
            raise InputError(
                "merge.method: the settings of sap have their place in the group prune, such as --prune.sparsity; name"
                " it --merge.method sap, or leave it out"
            )
        if method is None:
            method = self._usual_method()
        last = self.config_init.federation.last_method if self.command == "fit" else None
        if method == SAP.name:
            method = self.config_init.prune
        elif last != SAP.name and (given := self.given("prune")):
            raise InputError(f"{given}: merge.method is not sap, so nothing would use it; leave one of them out")
        merge = MergeModule(self.model.base, self.model.templates, method, **settings)
        weighed = merge.weights in ("samples", "reach")
        if self.command == "merge" and weighed and not merge.merge_method.uses_weights:
            name = merge.merge_method.name
            raise InputError(f"merge.weights {merge.weights}: clients count alike in {name}; leave it out")
        return merge

    def _usual_method(self) -> MergeMethod | str:
        """What merges where none is named: sap, but sap_auto where clients say their reach and nobody sets sap."""
        if isinstance(self.model, CLIPPromptModule):
            return Average()
        if self.given("prune"):
            self.config.merge.method = SAP.name  # or settings given at their defaults would not say so in the record
            return SAP.name
        if self.config_init.prune != SAP():
            return SAP.name
        is_one_shot = self.command == "fit" and self.config_init.federation.rounds == 1
        return SAPAuto() if is_one_shot and self.model.reach and self.datamodule.val_fraction else SAP.name

    def _refuse_of_prompts(self, aggregation: str | None) -> None:
        if aggregation and isinstance(self.model, CLIPPromptModule):
            raise InputError(f"{aggregation}: is for adapters; rounds of prompts start from their merge; leave it out")

    def given(self, group: str) -> str | None:
        """The first option of a group that stands on the command line."""
        return next((arg.partition("=")[0] for arg in self.line if re.match(rf"--{group}[.=]|--{group}$", arg)), None)

    def check_sweep(self, sweep: Sweep) -> None:
        """Finds settings that a sweep would ignore, or that are none.

        Raises:
            InputError: naming the first of them.
        """
        refuse_others("sweep", [f"--{name}" for name in sweep.over])
        known = dict(flat(self.settings()))
        if unknown := [name for name in sweep.over if name not in known]:
            raise InputError(
                f"sweep.over.{unknown[0]}: no setting of its own; name one such as model.rank, not a group of them and"
                " not what follows from another"
            )
        if AGGREGATION in sweep.over:
            self._refuse_of_prompts(f"sweep.over.{AGGREGATION}")
        varied = next((f"sweep.over.{name}" for name in sweep.over if name.split(".")[0] == "prune"), None)
        if SAP.name not in sweep.methods and (given := self.given("prune") or varied):
            raise InputError(
                f"{given}: sweep.methods does not name sap, so nothing would use it; leave one of them out"
            )

    def train(self) -> Path:
        """Trains the client of data.domain as configured, unless its upload stands, and returns the upload."""
        folder, domain, settings = self.run_folder, self.datamodule.require_domain(), self.settings()
        is_held_to(folder.path, settings, SERVER_SETTINGS)
        return train_client(self.model, self.datamodule, folder, self.make_trainer, f"client {domain}", settings)

    @property
    def run_folder(self) -> RunFolder:
        """Where the run keeps what its clients train and send."""
        return RunFolder(self.config_init.federation.run_dir).of_kind(self.model.kind)

    def federation(self, **others: Any) -> OneShotFederation:
        """The federation as configured, but for the arguments that are given."""
        parts = self.config_init
        settings = {name: value for name, value in parts.federation.items() if name != "report"}
        if settings["last_method"] == SAP.name:
            settings["last_method"] = parts.prune
        return RoundsFederation(
            client=self.model,
            data=self.datamodule,
            anchors=parts.anchors,
            merge=self.merge,
            make_trainer=TrainerMaker(self),
            method=None if parts.merge.method is None else self.merge.method,
            config=self.settings(),
            **{**settings, **others},
        )

    def varied(self, settings: Mapping[str, Any]) -> SapCLI:
        """The same command with other values for some settings, by name such as ``model.rank``."""
        other = copy.copy(self)
        other.config = self.parser.parse_object(nested(settings), cfg_base=self.config)
        complete(other.config, self.parser)
        other._set_seed()
        other.before_instantiate_classes()
        other.instantiate_classes()
        return other

    def settings(self) -> dict[str, Any]:
        """Everything that was configured, as plain values; a class that is the usual one is not named."""
        settings = super().settings()
        if self.client is CLIPLoRAModule:
            settings["model"] = settings["model"]["init_args"]  # as where no class is named
        elif self.client:
            settings["model"]["class_path"] = path_of(self.client)
        return settings


class TrainerMaker:
    """`SapCLI.make_trainer`, for other processes too: there it makes the command anew from its settings."""

    def __init__(self, cli: SapCLI) -> None:
        self.cli = cli

    def __call__(self, **overrides: Any) -> L.Trainer:
        return self.cli.make_trainer(**overrides)

    def __reduce__(self) -> tuple[Any, ...]:
        return trainer_maker, (self.cli.command, yaml.safe_dump(self.cli.settings()))


def trainer_maker(command: str, settings: str) -> TrainerMaker:
    """That of a command with these settings, as YAML."""
    return TrainerMaker(SapCLI(command, ["--config", settings]))


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by name as a config file has them: ``{"model.rank": 8}`` becomes ``{"model": {"rank": 8}}``."""
    config: dict[str, Any] = {}
    for name, value in settings.items():
        *groups, last = name.split(".")
        inner = config
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = copy.deepcopy(value)
    return config
