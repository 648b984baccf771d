"""What values from outside must be, in rules and in words, and how errors call them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sap_lightning.errors import InputError, short

MAX_FLOAT32 = torch.finfo(torch.float32).max
NOT_FINITE = "has numbers that are not finite, NaN or infinite; its training went wrong, or the file is damaged"
_MAX_RANK = 4096


class Rule(NamedTuple):
    """What a value from outside must be, as a test and in words."""

    holds: Callable[[Any], bool]
    words: str


def matches(pattern: str) -> Callable[[Any], bool]:
    """The test whether a value is a text of this pattern, in ASCII."""
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value, re.ASCII) is not None


def is_text(value: Any) -> bool:
    """Whether a value is one printable line."""
    return isinstance(value, str) and value.isprintable()


def is_integer(value: Any, least: int, most: int = 2**63 - 1) -> bool:
    """Whether a value is an integer, and no bool, in this range."""
    return type(value) is int and least <= value <= most


TEXT = Rule(is_text, "one line of text")
TEXT_BY_NAME = Rule(
    lambda value: isinstance(value, dict) and all(map(is_text, (*value, *value.values()))), "texts by name"
)
NUMBER = Rule(lambda value: type(value) in (int, float) and abs(value) < MAX_FLOAT32, "a finite number")
RANK = Rule(lambda value: is_integer(value, 1, _MAX_RANK), f"an integer from 1 to {_MAX_RANK}")
OBJECT = Rule(lambda value: isinstance(value, dict), "an object")


def require(name: str, value: Any, rule: Rule) -> None:
    """Raises InputError when a value breaks a rule."""
    if not rule.holds(value):
        raise InputError(f"{name} is {short(value)}, expected {rule.words}")


@contextmanager
def errors_in(place: str | Path) -> Iterator[None]:
    """Puts the place before what is wrong there."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}: {error}") from None


def object_from(content: bytes) -> dict[str, Any]:
    """The object that JSON text holds.

    Raises:
        InputError: no JSON, no object, or one with a key twice, of which readers take either.
    """
    try:
        value = json.loads(content.decode(), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON, {short(str(error))}; save it again") from None
    require("the file", value, OBJECT)
    return dict(value)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"{key!r} stands there twice")
        content[key] = value
    return content


def json_bytes(content: dict[str, Any]) -> bytes:
    """An object as JSON text; equal ones give equal bytes."""
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
