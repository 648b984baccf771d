"""The one error a person is meant to read, how others are said, and the checks of settings that raise it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from reprlib import Repr
from typing import Any, Literal, get_args, get_origin, get_type_hints

WHAT_TO_CHECK = "check path, permission and room on the disk, then run the same command again"
SEEDS = 2**32
"""numpy's seeds are below."""


class InputError(ValueError):
    """Bad input: the message says what is wrong, where (file, key, shape got and expected) and what to do.

    The command line prints it as one line without a traceback, whatever stands in the names that it quotes.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def is_said(error: Exception) -> bool:
    """Whether an error ends a command in one line; any other is a fault of ours."""
    return isinstance(error, InputError | OSError) or _is_a_trainer_s(error)


def _is_a_trainer_s(error: Exception) -> bool:
    # By its name: Lightning takes seconds to import, and has been where a Trainer found something.
    return type(error).__name__ == "MisconfigurationException"


def in_one_line(error: Exception) -> str:
    """What a person reads of one of these."""
    if _is_a_trainer_s(error):  # what a Trainer finds only when it trains
        return f"trainer: {first_line(error)}"
    if isinstance(error, OSError):  # what no writer or reader of ours has put into words
        return f"{error.filename}: {error.strerror or error}; {WHAT_TO_CHECK}"
    return str(error)


def printable(text: str) -> str:
    """The text with escapes for what ends a line, steers a terminal, turns the direction of reading or is not seen."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def short(value: object) -> str:
    """A value from outside, escaped and cut to fit into one line."""
    printer = Repr()
    printer.maxstring = 120
    return printer.repr(value)


def first_line(error: Exception) -> str:
    """What a library's error says, as far as it fits into ours."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def check_number(name: str, value: object) -> None:
    """Raises an InputError that names the setting when it is no number, as only Python can give it."""
    if not isinstance(value, Real):
        raise InputError(f"{name} is {short(value)}, expected a number")


def check_share(name: str, value: float) -> None:
    """Raises an InputError that names the setting when it does not lie in [0, 1]."""
    check_number(name, value)
    if not 0 <= value <= 1:
        hint = f"; {value:g} % is {value / 100:g}" if 10 <= value <= 100 else ""
        raise InputError(f"{name} must lie in [0, 1], got {value}{hint}")


def check_at_least(name: str, value: float, least: float) -> None:
    """Raises an InputError that names the setting when it is below the least value, or not finite."""
    check_number(name, value)
    if not least <= value < math.inf:
        hint = "; give a finite number" if value == math.inf else ""
        raise InputError(f"{name} must be at least {least}, got {value}{hint}")


def check_positive(name: str, value: float) -> None:
    """Raises an InputError that names the setting when it is not a finite number above 0."""
    check_number(name, value)
    if not 0 < value < math.inf:
        raise InputError(f"{name} must be above 0, got {value}")


def check_seed(name: str, value: int) -> None:
    """Raises an InputError that names the setting when numpy takes no such seed."""
    check_number(name, value)
    if not 0 <= value < SEEDS:
        raise InputError(f"{name}: {value} lies outside [0, {SEEDS})")


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raises an InputError that names the setting when it is none of those of a ``Literal``."""
    if value not in get_args(choices):
        raise InputError(f"{name} {short(value)}: it takes one of {', '.join(map(str, get_args(choices)))}")


def check_choices(name: str, settings: object) -> None:
    """Checks the choices of an object's fields, whose types are a ``Literal`` or sequences of one.

    Parsers of the command line find the same earlier.
    """
    try:
        hints = get_type_hints(type(settings))
    except NameError:  # a class of one's own may name types that it imports for type checkers alone
        return
    for field, hint in hints.items():
        several = get_origin(hint) is Sequence
        choices = get_args(hint)[0] if several else hint
        if get_origin(choices) is Literal:
            value = getattr(settings, field)
            for one in value if several else [value]:
                check_choice(f"{name}.{field}", one, choices)
