"""What parsers of commands share: LightningCLI with errors for people, and help of what a command takes."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Sequence
from pydoc import ErrorDuringImport, locate
from typing import Any, NoReturn

import lightning as L
import yaml
from jsonargparse import SUPPRESS, ArgumentParser, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from sap_lightning.config_files import ConfigFile, config_in, text_of
from sap_lightning.errors import InputError, check_seed, first_line
from sap_lightning.federation.run_folder import flat
from sap_lightning.io.rules import errors_in
from sap_lightning.modules.client import ClientModule
from sap_lightning.modules.clip_lora import CLIPLoRAModule
from sap_lightning.modules.clip_prompt import CLIPPromptModule
from sap_lightning.option_errors import option_error, refuse_null, types_of
from sap_lightning.options import config_files_first, expand_home, first_input_error, is_taken

TRAINER_DEFAULTS = {
    "max_epochs": 5,
    "devices": 1,
    "precision": "32-true",
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "log_every_n_steps": 1,
}
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "32", "16", "bf16")
"""Lightning's, in which weights have 32 bits; the last three are short for the others."""
CLIENTS: dict[str, type[ClientModule]] = {made.__name__: made for made in (CLIPLoRAModule, CLIPPromptModule)}
"""The classes of clients, the usual one first."""
OF_ALL_CLIENTS = {"base", "templates", "seed"}
"""Settings in the group model that clients of every class have."""
PLACES = {
    "anchors.root",
    "compress.model",
    "compress.output",
    "compress.texts",
    "data.root",
    "federation.run_dir",
    "merge.output",
    "merge.push_to_hub",
    "model.base",
    "model.start",
    "predict.images",
    "predict.output",
    "uploads",
}
"""Settings that name a folder, a file or a repository; an empty one would be this folder, or pass for none."""
CLASS_PATH = re.compile(r"[A-Za-z_][\w.]*(?<!\.yaml)(?<!\.yml)")
"""What ``--model`` names a class by, and not a file of its settings."""


class ClientConfigFile(ConfigFile):
    """A config file of whose settings of the usual clients others pass over what they have no use for."""

    def shown(self, config: dict[str, Any], parser: Any) -> dict[str, Any]:
        model = config.get("model")
        usual = parser.client is None or issubclass(parser.client, CLIPLoRAModule)
        if usual or not isinstance(model, dict) or "class_path" in model:
            return config
        others = inspect.signature(CLIPLoRAModule).parameters.keys() - OF_ALL_CLIENTS
        kept = {name: value for name, value in model.items() if name not in others}
        rest = {name: settings for name, settings in config.items() if name != "model"}
        return {**rest, **({"model": kept} if kept else {})}


class CommandParser(LightningArgumentParser):
    """A parser that knows every setting, since a config file may hold it, and whose help shows what a command takes."""

    def __init__(
        self, *args: Any, command: str | None = None, client: type[L.LightningModule] | None = None, **kwargs: Any
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


def complete(config: Namespace, parser: ArgumentParser) -> None:
    """What jsonargparse leaves undone: null is refused where a setting takes none, and ~ is the user's folder."""
    refuse_null(config, types_of(parser))
    expand_home(config, PLACES | {"data.base", "anchors.base"})  # linked to model.base


class CommandCLI(LightningCLI):
    """LightningCLI for one command, which makes Trainers of its own.

    Attributes:
        command: its name.
        client: the class of clients that is named; None where none is.
    """

    command: str
    client: type[L.LightningModule] | None

    def __init__(
        self,
        model: type[L.LightningModule],
        data: type[L.LightningDataModule],
        args: Sequence[str],
        description: str | None,
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            data,
            save_config_callback=None,
            seed_everything_default=0,
            parser_kwargs={"prog": f"python -m sap_lightning {self.command}", "description": description},
            args=list(args),
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            **options,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses, and looks at what Python or Lightning would stumble over later."""
        super().parse_arguments(parser, args)
        complete(self.config, parser)
        for name, value in flat(self.config.as_dict()):
            if isinstance(value, str) and "\0" in value:
                raise InputError(f"{name}: has a NUL character, which is part of no name; take it out")
            if name in PLACES and "" in (value if isinstance(value, list) else [value]):
                raise InputError(f"{name} is empty; give it a value (of a folder, . is this one), or leave it out")
        if isinstance(seed := self.config.seed_everything, int):
            check_seed("seed_everything", seed)
        precision = self.config.trainer.precision
        if precision is not None and str(precision) not in PRECISIONS:
            raise InputError(
                f"trainer.precision {precision}: what is trained stays in float32; bf16-mixed computes in 16 bits"
            )

    def instantiate_classes(self) -> None:
        """Makes the parts; what one of them says of bad input is said as it is, not as jsonargparse wraps it."""
        try:
            super().instantiate_classes()
            self.put_together()
        except ValueError as error:
            if (said := first_input_error(error)) is not None:
                raise said from None
            raise

    def put_together(self) -> None:
        """Makes what the parser does not, and looks at whether settings go together."""

    def check_that_it_trains(self) -> None:
        """Raises InputError where nothing would be: what was not trained is no upload."""
        for name in ("max_epochs", "max_steps", "limit_train_batches"):
            if self.config_init.trainer[name] == 0:
                raise InputError(
                    f"trainer.{name} is 0, at which nothing is trained; set it to 1 or more, or leave it out"
                )

    def settings(self) -> dict[str, Any]:
        """Everything that was configured, as plain values."""
        settings = yaml.safe_load(self.parser.dump(self.config, skip_none=False, skip_link_targets=True))
        return {name: value for name, value in settings.items() if name != "config"}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = CommandParser(command=self.command, client=self.client, **kwargs)
        parser.allow_abbrev = False  # what a short form stands for is not looked up in TAKEN_BY
        parser.add_argument("-c", "--config", action=ClientConfigFile, help="configuration file, or several in turn")
        return parser

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


def class_named(args: Sequence[str]) -> str | None:
    """The class of the clients that a command line names, or else the last of its config files that does."""
    named = None
    line = config_files_first(args)
    for arg, following in zip(line, [*line, ""][1:], strict=True):
        option, equals, value = arg.partition("=")
        value = value if equals else following
        if option in ("--config", "-c"):
            named = _class_in(value) or named
        elif option.startswith("-c"):
            named = _class_in(option.removeprefix("-c")) or named
        elif option == "--model.class_path" or (option == "--model" and CLASS_PATH.fullmatch(value)):
            named = value
    return named


def client_named(args: Sequence[str]) -> type[ClientModule] | None:
    """That class, of clients that send adapters or prompts of CLIP; None where none is named.

    Raises:
        InputError: there is no such class.
    """
    named = class_named(args)
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
            + "; VLMLoRAModule is for fit alone" * name.endswith("VLMLoRAModule")
        )
    return found


def _class_in(config_file: str) -> str | None:
    """The class of the clients that a config file names."""
    with errors_in(config_file):
        model = config_in(text_of(config_file)).get("model")
    return str(model["class_path"]) if isinstance(model, dict) and "class_path" in model else None
