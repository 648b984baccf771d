"""What is wrong with an option, in a line that names it and what it takes; jsonargparse says so in many."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from pydoc import locate
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse import ArgumentParser, Namespace

from sap_lightning.checkpoints.methods import FUSE_METHODS
from sap_lightning.errors import InputError, short
from sap_lightning.merging.method import MergeMethod
from sap_lightning.merging.registry import METHODS, method_named

Types = Mapping[str, Any]
"""Type of every option by name, or of every setting of a class."""


def option_error(message: str, parser: ArgumentParser) -> InputError:
    """The error for what jsonargparse says of a command line or a config file.

    Args:
        message: its words.
        parser: whose options they are about.
    """
    types = types_of(parser)
    first = "".join(message.split("\n    - ")[:2])  # of the types that an option may have, what is wrong as the first
    name = ".".join(re.findall(r'Parser key "([^"]+)":\n', first))
    known = _unknown(name, first, types) or _without_value(first, types) or _faulty(name, first, message, types)
    return known or InputError(" ".join(re.sub(r'Parser key "([^"]+)"', r"\1", message).split()))


def group_error(name: str, parser: ArgumentParser, given: object) -> InputError:
    """The error for a group that is given as something else than its settings."""
    return _no_group(name, types_of(parser), f", got {'null' if given is None else short(given)}")


def refuse_null(config: Namespace, types: Types, within: str = "") -> None:
    """Raises InputError for a setting that is null and takes none, which jsonargparse lets pass in a file.

    Args:
        config: what was parsed.
        types: of its settings.
        within: what stands before their names.
    """
    for group in sorted({name.rpartition(".")[0] for name in types} - {""}):
        if group in config and config[group] is None:
            raise _no_group(f"{within}{group}", {f"{within}{name}": hint for name, hint in types.items()}, ", got null")
    for name, hint in types.items():
        value = config.get(name)
        if name in config and value is None and not _takes_null(hint):
            raise InputError(f"{within}{name}: takes {in_words(hint)}, got null")
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, Namespace) and "init_args" in one:
                refuse_null(one.init_args, _settings_of(locate(one.class_path)), f"{within}{name}.")


def _takes_null(hint: Any) -> bool:
    if get_origin(hint) in (Union, UnionType):
        return any(map(_takes_null, get_args(hint)))
    return hint in (Any, object, NoneType) or (get_origin(hint) is Literal and None in get_args(hint))


def types_of(parser: ArgumentParser) -> Types:
    """What the options of a parser take."""
    typed = [action for action in parser._actions if hasattr(action, "_typehint")]
    return {action.dest: action._typehint for action in typed if not action.dest.endswith(".help")}


def in_words(hint: Any) -> str:
    """A type as a person who sets an option calls it."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if kind in (Union, UnionType):
        return " or ".join(map(in_words, inner))
    if inner:
        return f"a {'mapping' if issubclass(kind, Mapping) else 'list'} of {in_words(inner[-1])}"
    return "null" if hint is NoneType else str(getattr(hint, "__name__", hint))


def _settings_of(made: Any) -> Types:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(made, fail_untyped=False)
    return types_of(parser)


def _unknown(name: str, message: str, types: Types) -> InputError | None:
    """An option that there is not, or a setting that a class does not have."""
    if found := re.search(r"class_path '(.+)':\s+Option '(.+)' is not accepted", message):
        made: Any = locate(found[1])
        settings = ", ".join(f"{setting} ({in_words(hint)})" for setting, hint in _settings_of(made).items())
        called = getattr(made, "name", made.__name__)
        return InputError(f"{name}.{found[2]}: {called} has no such setting; it has {settings or 'none'}")
    found = re.search(
        r"(?:Group '(.+)' does not accept option|^Option|^unrecognized arguments:) '?-*([^\s'=]+)", message
    )
    if found is None:
        return None
    option = ".".join(filter(None, found.groups()))
    near = get_close_matches(option, types, 1)
    return InputError(f"{option}: no such option; {f'did you mean {near[0]}?' if near else '--help shows all'}")


def _without_value(message: str, types: Types) -> InputError | None:
    found = re.search(r"^argument .*--(\S+): expected", message)
    if found is None:
        return None
    takes = f"; it takes {in_words(types[found[1]])}" if found[1] in types else ""
    return InputError(f"{found[1]}: no value is given{takes}")


def _faulty(name: str, first: str, message: str, types: Types) -> InputError | None:
    """A value of another type than that of its option, of its group, or of a setting of its class."""
    if inside := re.findall(r"class_path '(.+)':\s+Parser key \"(.+)\"", first):
        path, setting = inside[-1]
        settings = _settings_of(locate(path))
        if setting in settings:
            return _wrong_type(name, settings[setting], message)
        within = name.removesuffix(setting)
        return _no_group(name, {f"{within}{inner}": hint for inner, hint in settings.items()})
    if name in types:
        return _wrong_type(name, types[name], message)
    return _no_group(name, types) if any(option.startswith(f"{name}.") for option in types) else None


def _no_group(name: str, types: Types, given: str = "") -> InputError:
    members = ", ".join(option for option in types if option.startswith(f"{name}."))
    return InputError(f"{name}: takes a file or a mapping of its settings{given}; they are {members}")


def _wrong_type(name: str, hint: Any, message: str) -> InputError:
    named = re.search(r"(?:import path string: |class_path '|Import path )([^'\s]+)", message)
    if named and MergeMethod in get_args(hint):
        try:
            method_named(named[1], name, FUSE_METHODS if name.startswith("fuse.") else METHODS)
        except InputError as error:
            return error
    setting = re.search(r"value: NestedArg\(key='([^']+)'", message)
    if setting and MergeMethod in get_args(hint):
        return InputError(f"{name}.{setting[1]}: a setting of no method; name its method before it, with --{name}")
    given = re.search(r"(?:Got|Given) value: (?!NestedArg)(.*)", message)
    return InputError(f"{name}: takes {in_words(hint)}{f', got {short(given[1])}' if given else ''}")
