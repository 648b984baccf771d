"""A whole model as transformers saves it: safetensors, in one file or in shards, read a part of a tensor at a time."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sap_lightning.errors import InputError
from sap_lightning.fingerprints import file_fingerprint
from sap_lightning.io.hub import from_hub, is_hub_id
from sap_lightning.io.rules import NOT_FINITE, errors_in, object_from, short
from sap_lightning.io.upload_files import regular_file
from sap_lightning.io.weights import OpenFile, SafetensorsFile, Stated, is_finite

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
BESIDE_WEIGHTS = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*")
"""Files of a model that are text: its config, its tokenizer, its licence."""
OF_RUNS = ("merge.json", "compress.json", "plan.json")
"""Files in which our commands say what they made of a model; beside another they would be false."""
_MAX_INDEX_BYTES = 2**26
_NUMBER = re.compile(r"\d+(?=-of-\d+\.safetensors$)")
"""A shard's, in its name."""


class Checkpoint:
    """A model's tensors by key, each read when it is looked at; its files are open only while they are.

    Args:
        model: a folder, or an id on the hub.

    Attributes:
        name: what it was called.
        folder: where it is.
        shards: the files of its tensors by name, in order.
        stated: dtype and shape of every tensor by key.

    Raises:
        InputError: there is no such model, it has no safetensors, or its files are faulty.
    """

    def __init__(self, model: str) -> None:
        self.name = model
        self.folder = from_hub(model, ["*.safetensors", *BESIDE_WEIGHTS]) if is_hub_id(model) else Path(model)
        placed = _placed(self.folder)
        names = sorted(set(placed.values())) if placed else [_one_file(self.folder)]
        self.shards = {name: SafetensorsFile.at(regular_file(self.folder, name)) for name in names}
        self.stated: dict[str, Stated] = {}
        self._shard_of: dict[str, str] = {}
        for name in self.shards:
            with self.opened(name) as tensors:
                for key in tensors.in_order():
                    if key in self.stated:
                        raise InputError(f"{short(key)} is in {self._shard_of[key]} too; save the model again")
                    self.stated[key] = tensors.stated(key)
                    self._shard_of[key] = name
        if placed:
            _check_index(self.folder, placed, self._shard_of)

    @contextmanager
    def opened(self, shard: str) -> Iterator[OpenFile]:
        """A shard's tensors; what is wrong with them is said to be wrong here."""
        with self.shards[shard].opened() as tensors:
            yield tensors

    def rows(self, key: str, first: int, last: int) -> torch.Tensor:
        """Rows of a tensor as a matrix (see `matrix_shape`), from first up to last.

        Raises:
            InputError: when a number of them is not finite.
        """
        with self.opened(self._shard_of[key]) as tensors:
            rows = tensors.rows(key, first, last)
            if not is_finite(rows):
                raise InputError(f"{short(key)} {NOT_FINITE}")
            return rows

    def keys_of(self, shard: str) -> list[str]:
        """The keys of a shard in the order of its file."""
        return [key for key, name in self._shard_of.items() if name == shard]

    def head(self, shard: str) -> bytes:
        """What stands in a shard's file before its tensors."""
        with self.opened(shard) as tensors:
            return tensors.head()

    def chunks(self, key: str) -> Iterator[bytes]:
        """The bytes of a tensor, of whatever dtype, in pieces of bounded size."""
        with self.opened(self._shard_of[key]) as tensors:
            yield from tensors.chunks(key)

    def is_float(self, key: str) -> bool:
        """Whether a tensor has numbers that can be merged, and not integers or quantised ones."""
        return isinstance(self.stated[key].dtype, torch.dtype)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by key."""
        return {key: stated.shape for key, stated in self.stated.items()}

    @property
    def config(self) -> Mapping[str, Any]:
        """What its config says; nothing where there is none."""
        if not os.path.lexists(self.folder / CONFIG_FILE):
            return {}
        return _object_in(self.folder, CONFIG_FILE)

    @property
    def fingerprint(self) -> str:
        """Tells its files from others, config and tokenizer too, and changes when they do, without reading them."""
        return file_fingerprint([*(regular_file(self.folder, name) for name in self.shards), *self.beside().values()])

    def beside(self) -> dict[str, Path]:
        """The files beside its weights that make it a model, by name."""
        found = {path.name for pattern in BESIDE_WEIGHTS for path in self.folder.glob(pattern)}
        left = {*OF_RUNS, *([INDEX_FILE] if WEIGHTS_FILE in self.shards else [])}
        return {name: regular_file(self.folder, name) for name in sorted(found - left) if not name.startswith(".")}


def _one_file(folder: Path) -> str:
    """Name of the file that holds all tensors of a model without shards."""
    if os.path.lexists(folder / WEIGHTS_FILE):
        return WEIGHTS_FILE
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected a model as save_pretrained writes it")
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise InputError(f"{folder}: {pickles[0]} is a pickle, never read; save the model as safetensors")
    raise InputError(f"{folder}: has no {WEIGHTS_FILE}; save the model with save_pretrained")


def _placed(folder: Path) -> dict[str, str]:
    """The shard of every key, as the index says; nothing where one file has all, which transformers looks for first."""
    if os.path.lexists(folder / WEIGHTS_FILE) or not os.path.lexists(folder / INDEX_FILE):
        return {}
    placed = _object_in(folder, INDEX_FILE).get("weight_map")
    with errors_in(folder / INDEX_FILE):
        if not (isinstance(placed, dict) and placed and all(map(_is_shard, placed.values()))):
            raise InputError("weight_map does not name safetensors files of this folder; save the model again")
        series = {_NUMBER.sub("", name) for name in placed.values() if _NUMBER.search(name)}
        for name in sorted(path.name for path in folder.glob("*-of-*.safetensors")):
            if _NUMBER.sub("", name) in series and name not in placed.values():
                raise InputError(f"does not name {name}, which stands beside its shards; save the model again")
    return placed


def _check_index(folder: Path, placed: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Raises InputError when the index does not say of every key in which shard it was found."""
    for key in sorted(placed.keys() | found.keys()):
        if (said := placed.get(key)) != (shard := found.get(key)):
            where = f"has {short(key)} in {said}" if said else f"has no {short(key)}"
            there = f"it is in {shard}" if shard else f"{said} has no such tensor"
            raise InputError(f"{folder / INDEX_FILE}: {where}, and {there}; save the model again")


def _is_shard(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name and name.isprintable()


def _object_in(folder: Path, name: str) -> dict[str, Any]:
    path = regular_file(folder, name)
    with errors_in(path):
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise InputError(f"larger than {_MAX_INDEX_BYTES} bytes; save the model again")
        return object_from(path.read_bytes())
