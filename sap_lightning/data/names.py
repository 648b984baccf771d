"""Names of classes and domains: which are refused, and when two of them are one."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from sap_lightning.errors import InputError, short


def check_names(place: str, kind: str, names: Iterable[str]) -> None:
    """Raises InputError for a name that cannot be told from another one by eye, or cannot be put into a prompt.

    Args:
        place: where the names come from.
        kind: what they are names of.
        names: all of them.
    """
    for name in names:
        if not name or name != name.strip() or not name.isprintable():
            raise InputError(
                f"{place}: {kind} {short(name)}: a name has printable characters only, and no space before or after;"
                " rename it"
            )


def refuse_look_alikes(place: str, kind: str, names: Iterable[str]) -> None:
    """Raises InputError where two names differ in their spelling alone; as for `check_names`."""
    first: dict[str, str] = {}
    for name in names:
        if (other := first.setdefault(spelling(name), name)) != name:
            raise InputError(
                f"{place}: {kind}s {short(other)} and {short(name)} differ in spelling alone; rename one, or join them"
            )


def spelling(name: str) -> str:
    """What all spellings of a name have in common: letters of either case, composed or not, and any spaces for _."""
    return " ".join(unicodedata.normalize("NFC", name).replace("_", " ").casefold().split())
