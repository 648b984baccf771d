"""The command ``fuse``, with a parser of its own: to fuse weights takes neither Lightning nor data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from operator import itemgetter
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser

from sap_lightning.checkpoints.fusion import Fusion
from sap_lightning.errors import InputError
from sap_lightning.io.rules import errors_in
from sap_lightning.option_errors import option_error
from sap_lightning.options import (
    config_files_first,
    config_in,
    first_input_error,
    is_taken,
    refuse_others,
    takers,
    with_class_paths,
)

COMMAND = "fuse"


def fuse(args: Sequence[str]) -> None:
    """Fuse whole models (--fuse.models [A,B] --fuse.base C) into --fuse.output. Continues an interrupted run."""
    fusion = configured(args)
    print(f"Fused {len(fusion.models)} models by {fusion.method.name}: {fusion.run()}")


def configured(args: Sequence[str]) -> Fusion:
    """The fusion that a command line asks for.

    Raises:
        InputError: for an option of other commands, or a faulty setting.
    """
    refuse_others(COMMAND, args)
    try:
        parser = _parser(with_anchors=not all(re.match(r"--fuse\.|[^-]", arg) for arg in args))
        config = parser.parse_args(with_class_paths(config_files_first(args)))
        fusion: Fusion = parser.instantiate_classes(config).fuse
    except ValueError as error:
        if (said := first_input_error(error)) is None:
            raise
        # A method does not know how this command calls its settings.
        raise InputError(re.sub(r"merge\.method|\bprune(?=\.)", "fuse.method", str(said))) from None
    return fusion


def _parser(with_anchors: bool) -> ArgumentParser:
    parser = FuseParser(prog=f"python -m sap_lightning {COMMAND}", description=fuse.__doc__, allow_abbrev=False)
    parser.add_argument("-c", "--config", action=ConfigFile, help="configuration file, or several in turn")
    if with_anchors:
        from sap_lightning.data.anchors import AnchorDataModule  # which takes seconds

        parser.add_class_arguments(AnchorDataModule, "anchors")
        parser.set_defaults({"anchors.root": None})
        parser.add_class_arguments(Fusion, "fuse")
        parser.link_arguments("fuse.models", "anchors.base", compute_fn=itemgetter(0))
        parser.link_arguments("anchors", "fuse.anchors", compute_fn=_if_named, apply_on="instantiate")
    else:
        parser.add_class_arguments(Fusion, "fuse", skip={"anchors"})
    return parser


def _if_named(anchors: Any) -> Any:
    """Anchors of which it is said where they are."""
    return anchors if anchors.root else None


class FuseParser(ArgumentParser):
    """A parser whose errors are for people."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # jsonargparse makes more of this class, of a method's settings, and says the rest
            super().error(message, ex)
        raise (ex if isinstance(ex, InputError) else option_error(message, self)) from None


class ConfigFile(ActionConfigFile):
    """A config file, which is named before what is wrong in it; groups that other commands take are passed over."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        with errors_in(values):
            super().__call__(parser, cfg, _without_others(values), option_string)


def _without_others(file: str) -> str:
    """The file, or its text without what is for other commands."""
    config = config_in(file)
    kept = {group: settings for group, settings in config.items() if takers(group) is None or is_taken(group, COMMAND)}
    return file if kept == config else yaml.safe_dump(kept)
