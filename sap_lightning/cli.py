"""The parser of all commands: one LightningCLI, in which a setting has one name whatever the command."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from pydoc import ErrorDuringImport, locate
from typing import Any, NoReturn

import lightning as L
import yaml
from jsonargparse import SUPPRESS, ActionConfigFile
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from sap_lightning.data.anchors import AnchorDataModule
from sap_lightning.data.domains import DomainDataModule
from sap_lightning.errors import InputError, first_line
from sap_lightning.federation.client import train_client
from sap_lightning.federation.one_shot import OneShotFederation
from sap_lightning.federation.rounds import RoundsFederation
from sap_lightning.federation.run_folder import SERVER_SETTINGS, RunFolder, flat, is_held_to
from sap_lightning.federation.sweep import Sweep
from sap_lightning.io.rules import errors_in
from sap_lightning.merging import SAP, Average
from sap_lightning.modules.client import ClientModule
from sap_lightning.modules.clip_lora import CLIPLoRAModule
from sap_lightning.modules.clip_prompt import CLIPPromptModule
from sap_lightning.modules.merge import MergeModule
from sap_lightning.option_errors import option_error
from sap_lightning.options import (
    TAKEN_BY,
    TRAINING,
    config_files_first,
    config_in,
    first_input_error,
    is_taken,
    path_of,
    refuse_others,
    with_class_paths,
)

TRAINER_DEFAULTS = {
    "max_epochs": 5,
    "devices": 1,
    "precision": "32-true",
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "log_every_n_steps": 1,
}
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
UPLOADS = "PEFT folders, hub ids or our own checkpoints; for test and predict one, or a folder that merge wrote"


CLIENTS: dict[str, type[ClientModule]] = {made.__name__: made for made in (CLIPLoRAModule, CLIPPromptModule)}
"""The classes of clients, the usual one first."""
OF_ALL_CLIENTS = {"base", "templates", "seed"}
"""Settings in the group model that clients of every class have."""
CLASS_PATH = re.compile(r"[A-Za-z_][\w.]*(?<!\.yaml)(?<!\.yml)")
"""What ``--model`` names a class by, and not a file of its settings."""


class Predict:
    """What predict classifies.

    Args:
        images: folder of images, at any depth.
        output: new file for image, class and probability.
    """

    def __init__(self, images: str, output: str = "predictions.csv") -> None:
        self.images = images
        self.output = output


class ConfigFile(ActionConfigFile):
    """A config file, which is named before what is wrong in it.

    One that names no class of clients has the settings of the usual one, and clients of another class pass them over.
    """

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        with errors_in(values):
            super().__call__(parser, cfg, self._for_clients_of(parser.client, values), option_string)

    def _for_clients_of(self, client: type[ClientModule] | None, file: str) -> str:
        """The file, or its text without what other clients have no use for."""
        config = config_in(file)
        model = config.pop("model", None)
        usual = client is None or issubclass(client, CLIPLoRAModule)
        if usual or not isinstance(model, dict) or "class_path" in model:
            return file
        others = inspect.signature(CLIPLoRAModule).parameters.keys() - OF_ALL_CLIENTS
        kept = {name: value for name, value in model.items() if name not in others}
        return yaml.safe_dump({**config, **({"model": kept} if kept else {})})


class CommandParser(LightningArgumentParser):
    """A parser that knows every setting, since a config file may hold it, and whose help shows what a command takes."""

    def __init__(
        self, *args: Any, command: str | None = None, client: type[ClientModule] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.command = command
        self.client = client

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if self.command is None:  # jsonargparse tries this parser, and says itself what comes of it
            super().error(message, ex)
        raise (ex if isinstance(ex, InputError) else option_error(message, self)) from None

    def format_help(self, *args: Any) -> str:
        if self.command is None:  # jsonargparse makes more of this class, of a merge method's settings
            return str(super().format_help(*args))
        groups: Any = self._action_groups
        before = groups[:], [(action, action.help) for action in self._actions]
        try:
            for action in self._actions:
                if not any(is_taken(option.lstrip("-"), self.command) for option in action.option_strings):
                    action.help = SUPPRESS
            # The title of a group of which nothing is shown would stand there.
            groups[:] = [group for group in groups if any(a.help != SUPPRESS for a in group._group_actions)]
            return str(super().format_help(*args))
        finally:
            groups[:] = before[0]
            for action, text in before[1]:
                action.help = text


class SapCLI(LightningCLI):
    """LightningCLI with the groups anchors, prune, merge and federation beside model, data and trainer.

    All commands read the same config file; what a command does not use of the groups of configs/pacs.yaml is passed
    over. On the command line an option that the command would ignore is refused.

    Args:
        command: one of those in ``EVERY``.
        args: the command line after it.
        description: what the command does, for its help.

    Attributes:
        merge: the server's module; it merges by SAP, as the group prune says, where no method is named.
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
            subclass_mode_model=self.client is not None,
            save_config_callback=None,
            seed_everything_default=0,
            trainer_defaults=TRAINER_DEFAULTS,
            parser_kwargs={"prog": f"python -m sap_lightning {command}", "description": description},
            args=with_class_paths(config_files_first(args)),
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = CommandParser(command=self.command, client=self.client, **kwargs)
        parser.allow_abbrev = False  # what a short form stands for is not looked up in TAKEN_BY
        parser.add_argument("-c", "--config", action=ConfigFile, help="configuration file, or several in turn")
        return parser

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
        if self.command in TAKEN_BY["uploads"]:
            parser.add_argument("--uploads", nargs="+", default=[], help=UPLOADS)

    def instantiate_classes(self) -> None:
        """Makes the parts; what one of them says of bad input is said as it is, not as jsonargparse wraps it."""
        try:
            super().instantiate_classes()
            self.merge = self._merge_module()
            if self.command in TRAINING:
                self._check_that_it_trains()
            given = self.config.get("uploads") or []
            self.uploads: list[str] = [given] if isinstance(given, str) else list(given)
        except ValueError as error:
            if (said := first_input_error(error)) is not None:
                raise said from None
            raise

    def _merge_module(self) -> MergeModule:
        settings = {name: value for name, value in self.config_init.merge.items() if name not in MERGE_COMMAND}
        method = settings.pop("method")
        if not isinstance(settings["weights"], str) and self.command in TAKEN_BY["federation"]:
            raise InputError(
                f"merge.weights {settings['weights']}: numbers are for the uploads that the command merge names; take"
                " uniform or samples"
            )
        if isinstance(method, SAP) and self.command in TAKEN_BY["merge.method"]:
            raise InputError(
                "merge.method: the settings of sap have their place in the group prune, such as --prune.sparsity; name"
                " it --merge.method sap, or leave it out"
            )
        if method is None and isinstance(self.model, CLIPPromptModule):
            method = Average()
        last = self.config_init.federation.last_method if self.command == "fit" else None
        if method in (None, SAP.name):
            method = self.config_init.prune
        elif last != SAP.name and (given := self._given("prune")):
            raise InputError(f"{given}: merge.method is not sap, so nothing would use it; leave one of them out")
        return MergeModule(self.model.base, self.model.templates, method, **settings)

    def _check_that_it_trains(self) -> None:
        """An adapter that was not trained is no upload."""
        for name in ("max_epochs", "max_steps", "limit_train_batches"):
            if self.config_init.trainer[name] == 0:
                raise InputError(
                    f"trainer.{name} is 0, at which nothing is trained; set it to 1 or more, or leave it out"
                )

    def _given(self, group: str) -> str | None:
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
        varied = next((f"sweep.over.{name}" for name in sweep.over if name.split(".")[0] == "prune"), None)
        if SAP.name not in sweep.methods and (given := self._given("prune") or varied):
            raise InputError(
                f"{given}: sweep.methods does not name sap, so nothing would use it; leave one of them out"
            )

    def make_trainer(self, callbacks: Sequence[L.Callback] = (), **overrides: Any) -> L.Trainer:
        """A Trainer as configured, with these callbacks besides the configured ones and these overrides."""
        trainer = self.config_init.trainer
        if trainer.logger not in (None, True):
            overrides.pop("logger", None)
        if trainer.enable_progress_bar is False:
            overrides["enable_progress_bar"] = False
            callbacks = [callback for callback in callbacks if not isinstance(callback, ProgressBar)]
        return self.instantiate_trainer(callbacks, **overrides)

    def instantiate_trainer(self, callbacks: Sequence[L.Callback] = (), **overrides: Any) -> L.Trainer:
        """A Trainer as configured, with these callbacks besides the configured ones and these overrides.

        Raises:
            InputError: with what Lightning says of the options.
        """
        # A copy: a Trainer adds to the very list of callbacks that it is given.
        configured = copy.deepcopy(self.config_init.trainer.callbacks or [])
        if isinstance(configured, L.Callback):
            configured = [configured]
        try:
            return super().instantiate_trainer(callbacks=[*configured, *callbacks], **overrides)
        except (MisconfigurationException, ImportError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"trainer: {first_line(error)}") from error

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
        other._set_seed()
        other.before_instantiate_classes()
        other.instantiate_classes()
        return other

    def settings(self) -> dict[str, Any]:
        """Everything that was configured, as plain values."""
        settings = yaml.safe_load(self.parser.dump(self.config, skip_none=False, skip_link_targets=True))
        if self.client is CLIPLoRAModule:
            settings["model"] = settings["model"]["init_args"]  # as where no class is named
        elif self.client:
            settings["model"]["class_path"] = path_of(self.client)
        return {name: value for name, value in settings.items() if name != "config"}


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


def client_named(args: Sequence[str]) -> type[ClientModule] | None:
    """The class of the clients that a command line names, or else the last of its config files that does.

    Raises:
        InputError: there is no such class.
    """
    named = None
    line = config_files_first(args)
    for arg, following in zip(line, [*line[1:], ""], strict=True):
        option, equals, value = arg.partition("=")
        value = value if equals else following
        if option in ("--config", "-c"):
            named = _client_in(value) or named
        elif option.startswith("-c"):
            named = _client_in(option.removeprefix("-c")) or named
        elif option == "--model.class_path" or (option == "--model" and CLASS_PATH.fullmatch(value)):
            named = value
    return None if named is None else client_class(named)


def client_class(name: str) -> type[ClientModule]:
    """A class of clients by its name, or one of a person's own by its path.

    Raises:
        InputError: there is none.
    """
    try:
        found = CLIENTS.get(name) or locate(name)
    except ErrorDuringImport as error:
        raise InputError(f"model {name}: cannot be imported: {first_line(error)}") from error
    if not (isinstance(found, type) and issubclass(found, ClientModule)):
        raise InputError(
            f"model {name}: no such class of clients; there are {', '.join(CLIENTS)}, or name your own by its path"
        )
    return found


def _client_in(config_file: str) -> str | None:
    """The class of the clients that a config file names."""
    model = config_in(config_file).get("model")
    return str(model["class_path"]) if isinstance(model, dict) and "class_path" in model else None


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
