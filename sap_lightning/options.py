"""The options of all commands: which command takes which, and how a command line is read before it is parsed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from itertools import islice

import yaml
from jsonargparse import Namespace

from sap_lightning.checkpoints.methods import FUSE_METHODS
from sap_lightning.errors import InputError
from sap_lightning.merging import METHODS, SAP

TRAINING = ("fit", "sweep", "client")
MERGING = ("fit", "sweep", "merge")
LABELLED = (*TRAINING, "test")
ALL = (*TRAINING, "merge", "test", "predict")
EVERY = (*ALL, "fuse", "compress")
TAKEN_BY: dict[str, tuple[str, ...]] = {
    "config": EVERY,
    "print_config": EVERY,
    "help": EVERY,
    "h": EVERY,
    "seed_everything": ("fit", "client", "merge", "test", "predict", "compress"),
    "model": TRAINING,
    "model.base": ALL,
    "model.templates": (*LABELLED, "predict"),
    "data": TRAINING,
    "data.root": LABELLED,
    "data.domain": ("client", "test"),
    "data.class_names": (*LABELLED, "predict"),
    "data.batch_size": (*LABELLED, "predict"),
    "data.cache": LABELLED,
    "data.domain_column": LABELLED,
    "data.label_column": LABELLED,
    "anchors": (*MERGING, "fuse", "compress"),
    "prune": MERGING,
    "merge": MERGING,
    "merge.method": ("fit", "merge"),
    "merge.format": ("fit", "merge"),
    "merge.rank": ("fit", "merge"),
    "merge.output": ("merge",),
    "merge.drop_heads": ("merge",),
    "merge.report": ("merge",),
    "merge.push_to_hub": ("merge",),
    "federation": ("fit", "sweep"),
    "federation.run_dir": ("fit", "sweep", "client", "merge"),
    "federation.unseen": ("fit",),
    "federation.last_method": ("fit",),
    "sweep": ("sweep",),
    "uploads": ("merge", "test", "predict"),
    "predict": ("predict",),
    "fuse": ("fuse",),
    "compress": ("compress",),
    "trainer": TRAINING,
    "trainer.accelerator": ALL,
    "trainer.strategy": (*TRAINING, "merge", "test"),
    "trainer.devices": (*TRAINING, "merge", "test"),
    "trainer.num_nodes": (*TRAINING, "merge", "test"),
    "trainer.precision": ALL,
    "trainer.plugins": ALL,
    "trainer.logger": ALL,
    "trainer.callbacks": ALL,
    "trainer.profiler": ALL,
    "trainer.benchmark": ALL,
    "trainer.deterministic": ALL,
    "trainer.detect_anomaly": ALL,
    "trainer.barebones": ALL,
    "trainer.default_root_dir": (),
    "trainer.enable_checkpointing": (),
    "trainer.limit_test_batches": (),
    "trainer.limit_predict_batches": (),
}
"""Which commands take an option; of a group's options those that do not stand here are taken as the group is."""
METHOD_OPTION = "--merge.method"
METHOD_OPTIONS = rf"({METHOD_OPTION}|--federation\.last_method|--fuse\.method)(\.method)*"
"""Pattern of the options that name a method, or one that another is on top of."""


def takers(option: str) -> tuple[str, ...] | None:
    """The commands that take an option, by its name without dashes; None where there is no such option or group."""
    parts = option.removesuffix("+").split(".")
    names = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((TAKEN_BY[name] for name in names if name in TAKEN_BY), None)


def is_taken(option: str, command: str) -> bool:
    """Whether a command takes an option, or any of a group."""
    below = [commands for name, commands in TAKEN_BY.items() if name.startswith(f"{option}.")]
    return any(command in commands for commands in (takers(option) or (), *below))


def config_files_first(args: Sequence[str]) -> list[str]:
    """The command line with its config files first, in their order: an option wins over a file wherever it stands."""
    files: list[str] = []
    options: list[str] = []
    rest = iter(args)
    for arg in rest:
        if arg in ("--config", "-c"):
            files += [arg, *islice(rest, 1)]
        elif re.match(r"--config=|-c.", arg):
            files.append(arg)
        else:
            options.append(arg)
    return files + options


def refuse_others(command: str, args: Sequence[str]) -> None:
    """Raises InputError for an option that this command would ignore, naming the commands that take it."""
    for index, arg in enumerate(args):
        option, _, value = arg.partition("=")
        if not option.startswith("--"):
            continue
        name = option.removeprefix("--")
        for inner in (name, *_settings_in(name, value or "".join(args[index + 1 : index + 2]))):
            if (found := takers(inner)) is not None and not is_taken(inner, command):
                where = f"it is an option of {', '.join(found)}" if found else "it is set by the commands themselves"
                raise InputError(f"--{inner}: {command} would ignore it; {where}")


def _settings_in(group: str, value: str) -> list[str]:
    """Settings in a group that is given whole, such as ``--data '{domain: photo}'``."""
    if not (group in TAKEN_BY and value.lstrip().startswith("{")):
        return []
    try:
        given = yaml.safe_load(value)
    except yaml.YAMLError:  # which the parser will say
        return []
    return [f"{group}.{name}" for name in given] if isinstance(given, dict) else []


def with_class_paths(args: Sequence[str]) -> list[str]:
    """``--merge.method ties`` stands for that class, so that ``--merge.method.sparsity`` and the like are known.

    So does ``--merge.method.method ties``, of a method that another is on top of, where settings of it are given.
    """
    named = list(args)
    for index, arg in enumerate(named):
        option, equals, name = arg.partition("=")
        if not re.fullmatch(METHOD_OPTIONS, option):
            continue
        has_settings = any(other.startswith(f"{option}.") for other in args)
        if equals:
            named[index] = f"{option}={_class_path(option, name, has_settings)}"
        elif index + 1 < len(named):
            named[index + 1] = _class_path(option, named[index + 1], has_settings)
    return named


def _class_path(option: str, name: str, has_settings: bool) -> str:
    methods = FUSE_METHODS if option.startswith("--fuse.") else METHODS
    # Without settings of its own sap is what the group prune says, and a method under another is recorded by its name.
    if name not in methods or (not has_settings and (name == SAP.name or option != METHOD_OPTION)):
        return name
    return path_of(methods[name])


def path_of(named: type) -> str:
    """The class_path of a class."""
    return f"{named.__module__}.{named.__qualname__}"


def expand_home(config: Namespace, places: Iterable[str]) -> None:
    """Puts a user's folder for ~ where a setting names a place, which no shell has done in a file or after =.

    Args:
        config: what was parsed; changed in place.
        places: settings that name one, or several.
    """
    for name in places:
        for own in (name, name.replace("model.", "model.init_args.")):
            value = config.get(own)
            if isinstance(value, str):
                config[own] = os.path.expanduser(value)
            elif isinstance(value, list):
                config[own] = [os.path.expanduser(one) if isinstance(one, str) else one for one in value]


def first_input_error(error: BaseException | None) -> InputError | None:
    """What a part of ours said, however often jsonargparse has wrapped it: once for each method on top of another."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__
    return error
