"""The package's own methods by name, for what takes a method as a setting: a command, a sweep, another method."""

from __future__ import annotations

from collections.abc import Mapping

from sap_lightning.errors import InputError, short
from sap_lightning.merging.method import MergeMethod

METHODS: dict[str, type[MergeMethod]] = {}
"""The package's own methods by name; ``merging`` lists them."""


def method_of(
    given: MergeMethod | str, setting: str = "merge.method", methods: Mapping[str, type[MergeMethod]] = METHODS
) -> MergeMethod:
    """The method that is given, or meant by its name.

    Args:
        given: a method, or the name of one at its default settings.
        setting: what it is given as, for the error.
        methods: those that it may be named of.

    Raises:
        InputError: when it is neither.
    """
    if isinstance(given, str):
        return method_named(given, setting, methods)
    if not isinstance(given, MergeMethod):
        raise InputError(f"{setting} {short(given)}: give a method, such as TIES(sparsity=0.9), or the name of one")
    return given


def method_named(
    name: str, setting: str = "merge.method", methods: Mapping[str, type[MergeMethod]] = METHODS
) -> MergeMethod:
    """The package's own method of that name at its default settings.

    Args:
        name: the method's.
        setting: what names it, for the error.
        methods: those that it may be one of.

    Raises:
        InputError: when there is none of that name.
    """
    if name.startswith("{"):
        raise InputError(
            f"{setting} {name}: names no class that Python can import, or a setting that it does not take; give them"
            f" one by one, --{setting} CLASS --{setting}.SETTING VALUE, to be told which"
        )
    if name not in methods:
        raise InputError(
            f"{setting} {name}: no such method; there are {', '.join(methods)}; a method of your own is named by its"
            " class_path, which Python must be able to import, with settings that it takes"
        )
    return methods[name]()
