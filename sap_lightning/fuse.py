"""The command ``fuse``, with a parser of its own: to fuse weights takes neither Lightning nor data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from operator import itemgetter
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from sap_lightning.checkpoints.fusion import Fusion
from sap_lightning.config_files import ConfigFile
from sap_lightning.errors import InputError
from sap_lightning.option_errors import option_error, refuse_null, types_of
from sap_lightning.options import (
    config_files_first,
    expand_home,
    first_input_error,
    is_taken,
    refuse_others,
    takers,
    with_class_paths,
)

COMMAND = "fuse"
PLACES = ("anchors.root", "fuse.base", "fuse.models", "fuse.output", "fuse.texts")
"""Settings that name a folder or a file."""


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
        types = types_of(parser)
        refuse_null(config, {name: types[name] for name in types if name != "anchors.root"})  # null: no anchors
        expand_home(config, PLACES)
        fusion: Fusion = parser.instantiate_classes(config).fuse
    except ValueError as error:
        if (said := first_input_error(error)) is None:
            raise
        # A method does not know how this command calls its settings.
        raise InputError(re.sub(r"merge\.method|\bprune(?=\.)", "fuse.method", str(said))) from None
    return fusion


def _parser(with_anchors: bool) -> ArgumentParser:
    parser = FuseParser(prog=f"python -m sap_lightning {COMMAND}", description=fuse.__doc__, allow_abbrev=False)
    parser.add_argument("-c", "--config", action=FuseConfigFile, help="configuration file, or several in turn")
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


class FuseConfigFile(ConfigFile):
    """A config file of which the groups that other commands take are passed over."""

    def shown(self, config: dict[str, Any], parser: Any) -> dict[str, Any]:
        return {name: group for name, group in config.items() if takers(name) is None or is_taken(name, COMMAND)}
