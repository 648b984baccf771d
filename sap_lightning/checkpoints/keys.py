"""Which tensor of one model is which of another: the same key, or one with another prefix."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection

Change = tuple[str, str]
"""From one prefix to another."""
_BLOCK = re.compile(r"(?:.*?\.)??(\w+\.\d+\..+)")
"""A key in a block, with what it is called from there on, such as ``layers.0.mlp.up_proj.weight``."""


def matched(keys: Collection[str], others: Collection[str]) -> dict[str, str]:
    """The other model's key for each of these, as far as it has one.

    A key is itself where the other model has it. Else a prefix such as ``model.`` or ``language_model.model.`` gives
    way to another or to none, as it does for keys of the blocks, whose names from there on tell what they are.

    Args:
        keys: one model's.
        others: the other's.

    Example:
        >>> from sap_lightning.checkpoints.keys import matched
        >>> matched(["model.layers.0.q.weight", "model.norm.weight", "head"], ["layers.0.q.weight", "norm.weight"])
        {'model.layers.0.q.weight': 'layers.0.q.weight', 'model.norm.weight': 'norm.weight'}
    """
    theirs = set(others)
    changes = _prefix_changes([key for key in keys if key not in theirs], theirs)
    candidates = {key: (key, *(_changed(key, change) for change in changes)) for key in keys}
    found = ((key, next((one for one in mine if one in theirs), None)) for key, mine in candidates.items())
    return {key: other for key, other in found if other is not None}


def layer_of(key: str) -> str:
    """What a layer is called of which a key names a weight or a bias.

    Example:
        >>> from sap_lightning.checkpoints.keys import layer_of
        >>> layer_of("model.layers.0.mlp.up_proj.weight")
        'model.layers.0.mlp.up_proj'
    """
    return key.rpartition(".")[0]


def _prefix_changes(keys: Collection[str], others: Collection[str]) -> list[Change]:
    """From each prefix the one to another that finds most keys, if it is one alone; those that find most come first."""
    of_block: dict[str, list[str]] = defaultdict(list)
    for other in others:
        if block := _BLOCK.fullmatch(other):
            of_block[block[1]].append(other)
    blocks = ((key, block[1]) for key in keys if (block := _BLOCK.fullmatch(key)))
    changes = {_prefixes(key, other) for key, block in blocks for other in of_block[block]}
    finds = {change: sum(_changed(key, change) in others for key in keys) for change in changes}
    best: list[Change] = []
    for prefix in {old for old, _ in changes}:
        most = max(finds[change] for change in changes if change[0] == prefix)
        alike = [change for change in changes if change[0] == prefix and finds[change] == most]
        best += alike if len(alike) == 1 else []
    return sorted(best, key=lambda change: (-finds[change], change))


def _changed(key: str, change: Change) -> str | None:
    old, new = change
    return f"{new}{key.removeprefix(old)}" if key.startswith(old) else None


def _prefixes(key: str, other: str) -> Change:
    """What two keys have before the parts at their end that are the same."""
    one, two = key.split("."), other.split(".")
    while one and two and one[-1] == two[-1]:
        one.pop()
        two.pop()
    return "".join(f"{part}." for part in one), "".join(f"{part}." for part in two)
