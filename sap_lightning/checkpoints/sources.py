"""The models that are fused and the base that they were trained from, under the keys of the first of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import NamedTuple

import torch
from torch import Tensor

from sap_lightning.checkpoints.checkpoint import Checkpoint
from sap_lightning.checkpoints.keys import matched
from sap_lightning.errors import InputError, short
from sap_lightning.io.peft_config import public_name
from sap_lightning.io.weights import matrix_shape

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight")
HEADS = ("lm_head.weight", "embed_out.weight")
"""How keys of embeddings end, and of heads that may be tied to them."""
BLOCK = 2**22
"""Elements of a weight that are looked at, scored or copied at a time."""


class Rows(NamedTuple):
    """Some rows of a weight as a matrix: from first up to last."""

    first: int
    last: int


class Change:
    """What one model has changed of some rows of a weight: a `Source` of this one layer.

    Args:
        name: the model's.
        key: the weight's.
        stored: the rows as the model has them.
        base: the base's in float32.
    """

    def __init__(self, name: str, key: str, stored: Tensor, base: Tensor) -> None:
        self.name = name
        self.stored = stored
        self.layers: Mapping[str, Tensor] = {key: stored.float() - base}

    @cached_property
    def sha256(self) -> str:
        """A digest of the rows."""
        return sha256(bytes_of(self.stored)).hexdigest()


class Part(NamedTuple):
    """Some rows of a weight as the base has them, in float32, and what every model has changed of them."""

    rows: Rows
    base: Tensor
    changes: Sequence[Change]


@dataclass(frozen=True)
class Sources:
    """Models and their base, under the keys of the first model.

    Attributes:
        models: the models, the first of which says what the result is like.
        base: the base.
        keys: each model's own key of every weight that it has.
        base_keys: the base's.
    """

    models: Sequence[Checkpoint]
    base: Checkpoint
    keys: Sequence[Mapping[str, str]]
    base_keys: Mapping[str, str]

    @classmethod
    def of(cls, models: Sequence[Checkpoint], base: Checkpoint, unlike: bool = False) -> Sources:
        """Finds each weight of the first model in the others.

        Raises:
            InputError: when one of them has none of these weights in these shapes, or all have none that can be fused,
                unless they may be unlike.
        """
        first = models[0]
        found = {id(one): _keys_in(one, first) for one in (*models, base)}
        for other in (*models, base):
            keys = found[id(other)]
            if not unlike and not any(first.stated[key].shape == other.stated[own].shape for key, own in keys.items()):
                raise InputError(
                    f"{other.name}: has none of the weights of {first.name}, such as {next(iter(first.stated), '')!r};"
                    " fuse models of one architecture"
                )
        sources = cls(models, base, [found[id(one)] for one in models], found[id(base)])
        if not unlike and len(kept := sources.kept) == len(first.stated):
            key = next(iter(kept))
            raise InputError(f"{first.name}: none of its weights can be fused; the first, {short(key)}, is {kept[key]}")
        return sources

    @property
    def first(self) -> Checkpoint:
        """The model that says what the result is like."""
        return self.models[0]

    @cached_property
    def kept(self) -> dict[str, str]:
        """Weights that cannot be fused by key, and why: they stay as the first model has them."""
        return {key: why for key in self.first.stated if (why := self._obstacle(key)) is not None}

    def _obstacle(self, key: str) -> str | None:
        for name, one, keys in self._everyone:
            if key not in keys:
                return f"not in {name}"
            if not one.is_float(keys[key]):
                return f"not of floating point numbers in {name}"
            if (shape := one.stated[keys[key]].shape) != self.first.stated[key].shape:
                return f"of shape {shape} in {name}"
        return None

    @cached_property
    def _everyone(self) -> list[tuple[str, Checkpoint, Mapping[str, str]]]:
        """The models and the base with their keys, called as others may know them; those called alike are numbered."""
        pairs = [*zip(self.models, self.keys, strict=True), (self.base, self.base_keys)]
        names = _told_apart([public_name(one.name) for one, _ in pairs])
        return [(name, one, keys) for name, (one, keys) in zip(names, pairs, strict=True)]

    @property
    def names(self) -> list[str]:
        """What the models are called, each otherwise than the others."""
        return _told_apart([public_name(one.name) for one in self.models])

    @property
    def unused(self) -> dict[str, list[str]]:
        """Keys of the other models and of the base that are no weight of the first model's."""
        every = self._everyone
        return {name: left for name, one, keys in every if (left := sorted(one.stated.keys() - set(keys.values())))}

    @property
    def renamed(self) -> dict[str, dict[str, str]]:
        """The other models' and the base's own keys of weights that they call otherwise."""
        others = {name: {key: own for key, own in keys.items() if key != own} for name, _, keys in self._everyone}
        return {name: keys for name, keys in others.items() if keys}

    def blocks(self, key: str, elements: int | None) -> Iterator[Rows]:
        """A weight's rows in blocks of about so many elements, or all at once."""
        height, width = matrix_shape(self.first.stated[key].shape)
        step = height if elements is None else max(1, elements // max(1, width))
        for first in range(0, height, max(1, step)):
            yield Rows(first, min(first + step, height))

    def whole(self, key: str) -> Part:
        """A weight from all of the models, all of its rows."""
        (rows,) = self.blocks(key, None)
        return self.part(key, rows)

    def part(self, key: str, rows: Rows) -> Part:
        """Rows of a weight from all of the models."""
        base = self._base_rows(key, rows)
        return Part(rows, base, [self._change(index, key, rows, base) for index in range(len(self.models))])

    def change(self, index: int, key: str, rows: Rows) -> Change:
        """What the model of this number has changed of rows of a weight."""
        return self._change(index, key, rows, self._base_rows(key, rows))

    def _change(self, index: int, key: str, rows: Rows, base: Tensor) -> Change:
        model = self.models[index]
        return Change(model.name, key, model.rows(self.keys[index][key], *rows), base)

    def _base_rows(self, key: str, rows: Rows) -> Tensor:
        return self.base.rows(self.base_keys[key], *rows).float()


def _keys_in(model: Checkpoint, first: Checkpoint) -> dict[str, str]:
    """A model's own key of every weight of the first model that it has, a head that is tied among them."""
    keys = matched(first.stated, model.stated)
    if model.config.get("tie_word_embeddings") is True:
        embedding = next((own for key, own in keys.items() if key.endswith(EMBEDDINGS)), None)
        head = next((key for key in first.stated if key.endswith(HEADS) and key not in keys), None)
        if embedding and head:
            keys[head] = embedding
    return keys


def _told_apart(names: Sequence[str]) -> list[str]:
    """Names of which those that are alike are numbered."""
    return [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names, start=1)]


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's bytes as a file has them."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
