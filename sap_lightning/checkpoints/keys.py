"""Which tensor of one model is which of another: the same key, or one with another prefix."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from itertools import groupby

from torch import nn

from sap_lightning.checkpoints.checkpoint import Checkpoint
from sap_lightning.errors import InputError, short

Change = tuple[str, str]
"""From one prefix to another."""
_BLOCK = re.compile(r"(?:.*?\.)??(\w+\.\d+\..+)")
"""A key in a block, with what it is called from there on, such as ``layers.0.mlp.up_proj.weight``."""


def matched(keys: Collection[str], others: Collection[str]) -> dict[str, str]:
    """The other model's key for each of these, as far as it has one; none of its keys stands for two.

    A key is itself where the other model has it. Else a prefix such as ``model.`` or ``language_model.model.`` gives
    way to another or to none, as it does for keys of the blocks, whose names from there on tell what they are. A change
    of prefix by which a key would have two counterparts, as one tower's to another's, is none; of two of which this is
    so together, that which finds most is taken, and neither where they find as many.

    Args:
        keys: one model's.
        others: the other's.

    Example:
        >>> from sap_lightning.checkpoints.keys import matched
        >>> matched(["model.layers.0.q.weight", "model.norm.weight", "head"], ["layers.0.q.weight", "norm.weight"])
        {'model.layers.0.q.weight': 'layers.0.q.weight', 'model.norm.weight': 'norm.weight'}
    """
    theirs = set(others)
    found = {key: key for key in keys if key in theirs}
    left = [key for key in keys if key not in theirs]
    changes = _prefix_changes(left, theirs - found.keys())
    claims = [{key: other for key in keys if (other := _changed(key, change)) in theirs} for change in changes]
    for _, rivals in groupby(sorted(claims, key=len, reverse=True), key=len):
        fitting = [claim for claim in rivals if not _collide(claim, found)]
        for claim in fitting:
            if not any(_collide(claim, rival) for rival in fitting):
                found = claim | found
    return {key: found[key] for key in keys if key in found}


def names_in(model: nn.Module, checkpoint: Checkpoint, keys: Collection[str]) -> dict[str, str]:
    """What a model that was loaded from a checkpoint calls weights of it, as far as it uses them.

    Args:
        model: as transformers loads it.
        checkpoint: the model's.
        keys: weights of the checkpoint that are looked for.

    Raises:
        InputError: one of them is not there, and transformers has made weights of others, such as all experts' in one.
    """
    weights = model.state_dict(keep_vars=True)
    names = matched(checkpoint.stated, list(weights))
    there = {id(weights[name]) for name in names.values()}  # as tied weights have several names
    made = (name for name, one in weights.items() if isinstance(one, nn.Parameter) and id(one) not in there)
    lost = [key for key in keys if key not in names]
    if lost and (name := next(made, None)):
        raise InputError(
            f"{checkpoint.name}: {short(lost[0])} is no weight of the loaded model, whose {name} transformers makes of"
            " other weights; take a method that looks at weights alone, such as ties"
        )
    return {key: names[key] for key in keys if key in names}


def _collide(some: Mapping[str, str], others: Mapping[str, str]) -> bool:
    """Whether a key has one counterpart in some, and another in others, whichever of the models it is of."""
    back = {other: key for key, other in others.items()}
    return any(others.get(key, other) != other or back.get(other, key) != key for key, other in some.items())


def layer_of(key: str) -> str:
    """What a layer is called of which a key names a weight or a bias.

    Example:
        >>> from sap_lightning.checkpoints.keys import layer_of
        >>> layer_of("model.layers.0.mlp.up_proj.weight")
        'model.layers.0.mlp.up_proj'
    """
    return key.rpartition(".")[0]


def _prefix_changes(keys: Collection[str], others: Collection[str]) -> list[Change]:
    """From each prefix the one to another that finds most keys, if it is one alone."""
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
    return sorted(best)


def _changed(key: str, change: Change) -> str:
    """A key with another prefix, or nothing."""
    old, new = change
    return f"{new}{key.removeprefix(old)}" if key.startswith(old) else ""


def _prefixes(key: str, other: str) -> Change:
    """What two keys have before the parts at their end that are the same."""
    one, two = key.split("."), other.split(".")
    while one and two and one[-1] == two[-1]:
        one.pop()
        two.pop()
    return "".join(f"{part}." for part in one), "".join(f"{part}." for part in two)
