"""The folder of a compressed model: its weights as factors or dense, its config, its record and its card."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from sap_lightning.checkpoints.checkpoint import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, Checkpoint
from sap_lightning.checkpoints.keys import matched
from sap_lightning.compression.blocks import Blocks, shortened
from sap_lightning.compression.loading import COMPRESSED_FILE, RANKS_FILE, blank, is_clip
from sap_lightning.compression.low_rank import LowRank, rounded
from sap_lightning.errors import InputError
from sap_lightning.files import as_json, sha256_of_file, write_json, write_text
from sap_lightning.fingerprints import sealed
from sap_lightning.io.hub import is_hub_id
from sap_lightning.io.peft_config import public_name
from sap_lightning.io.weights import matrix_shape

Format = Literal["factors", "dense"]
RECORD_FILE = "compress.json"
CARD_FILE = "README.md"
NOT_TAKEN_OVER = (INDEX_FILE, RANKS_FILE)
"""Files beside a model's weights that would say of others what they say of it."""


@dataclass(frozen=True)
class Stored:
    """How a checkpoint calls and stores the weights of its blocks.

    Attributes:
        checkpoint: the model on disk.
        list_name: of the blocks' list in the model.
        keys: the checkpoint's key of every weight of the model by its name.
        renamed: names of weights that transformers takes from keys of other names.
        made: names of weights that it makes of others.
    """

    checkpoint: Checkpoint
    list_name: str
    keys: Mapping[str, str]
    renamed: Collection[str]
    made: Sequence[str]

    @classmethod
    def of(cls, checkpoint: Checkpoint, blocks: Blocks) -> Stored:
        """What a checkpoint has of a model that was loaded from it."""
        with torch.device("meta"):
            weights = blank(checkpoint.folder).state_dict(keep_vars=True)
        keys = matched(list(weights), list(checkpoint.stated))
        found, own = {id(weights[name]) for name in keys}, blocks.tower.state_dict()
        missing = [name for name in weights if id(weights[name]) not in found]
        others = checkpoint.stated.keys() - keys.values()
        renamed = {name: key for name in missing if name in own and (key := _key_of(own[name], checkpoint, others))}
        made = [name for name in missing if name not in renamed]
        return cls(checkpoint, blocks.name, keys | renamed, renamed.keys(), made)

    def key(self, number: int, weight: str) -> str:
        """The key of a block's weight by its name in the block.

        Raises:
            InputError: when the checkpoint has it in another form, which transformers converts.
        """
        name = f"{self.list_name}.{number}.{weight}"
        if name not in self.keys:
            raise InputError(
                f"{self.checkpoint.name}: has no {name}, which transformers makes of other weights; load the model and"
                " save it with save_pretrained"
            )
        return self.keys[name]

    def dtype(self, number: int, weight: str) -> torch.dtype:
        """In which a block's weight is stored.

        Raises:
            InputError: when it is quantised.
        """
        key = self.key(number, weight)
        dtype = self.checkpoint.stated[key].dtype
        if not isinstance(dtype, torch.dtype):
            raise InputError(
                f"{self.checkpoint.name}: {key} is stored as {dtype}; save the model in float32, float16 or bfloat16"
            )
        return dtype

    @cached_property
    def _list_key(self) -> str:
        """What the checkpoint calls the blocks' list."""
        inside = re.compile(rf"{re.escape(self.list_name)}(\.\d+\..+)")
        found = ((key, inside.fullmatch(name)) for name, key in self.keys.items())
        return next(key.removesuffix(end[1]) for key, end in found if end and key.endswith(end[1]))

    def block_of(self, key: str) -> int | None:
        """The number of the block that a key is in, if it is in one."""
        inside = re.match(rf"{re.escape(self._list_key)}\.(\d+)\.", key)
        return int(inside[1]) if inside else None

    def moved(self, key: str, number: int, place: int) -> str:
        """The key of a weight whose block has another place."""
        return f"{self._list_key}.{place}.{key.removeprefix(f'{self._list_key}.{number}.')}"

    @cached_property
    def taken_over(self) -> set[str]:
        """The keys of what makes the model; where no weight is made of others, they are buffers of old versions."""
        return set(self.checkpoint.stated if self.made else self.keys.values())


def _key_of(weight: Tensor, checkpoint: Checkpoint, keys: Collection[str]) -> str | None:
    """Which of the keys has a weight's numbers."""
    rows, _ = matrix_shape(weight.shape)
    alike = (key for key in sorted(keys) if checkpoint.stated[key].shape == weight.shape and checkpoint.is_float(key))
    found = (key for key in alike if torch.equal(checkpoint.rows(key, 0, rows).view_as(weight).to(weight), weight))
    return next(found, None)


@torch.no_grad()
def settle(stored: Stored, blocks: Blocks, changed: Collection[int], format: Format) -> None:
    """Makes of changed blocks what is written of them, so that this is what is measured: dense, and rounded.

    Args:
        stored: how weights are stored.
        blocks: changed in place.
        changed: numbers of those that differ from what is stored.
        format: whether layers of low rank stay two factors or become one dense weight.

    Raises:
        InputError: when numbers are too large for how they are stored.
    """
    for number in changed:
        for name, module in list(blocks[number].named_modules()):
            if isinstance(module, LowRank) and format == "dense":
                blocks.replace(number, name, module.dense())
        for name, tensor in blocks[number].state_dict().items():
            original = _original(name)
            place = f"{stored.checkpoint.name}: {stored.key(number, original)}"
            tensor.copy_(rounded(tensor, stored.dtype(number, original), place))


def write_weights(folder: Path, stored: Stored, blocks: Blocks, changed: Collection[int]) -> None:
    """Writes all weights: changed blocks as they are now, the others bit for bit as they are on disk.

    Args:
        folder: to write to.
        stored: how they are stored.
        blocks: those that are left, settled.
        changed: numbers of those that differ from what is stored.
    """
    tensors = dict(_unchanged(stored, blocks.numbers, changed))
    for number in changed:
        for name, tensor in blocks[number].state_dict().items():
            original, last = _original(name), name.rpartition(".")[2]
            key = stored.key(number, original).removesuffix(original.rpartition(".")[2]) + last
            place = blocks.numbers.index(number)
            tensors[stored.moved(key, number, place)] = tensor.to(stored.dtype(number, original)).contiguous()
    ranks = _ranks(stored.list_name, blocks)
    if ranks:  # load_compressed goes by the model's own names
        names = {stored.keys[name]: name for name in stored.renamed}
        tensors = {names.get(key, key): tensor for key, tensor in tensors.items()}
    save_file(tensors, folder / (COMPRESSED_FILE if ranks else WEIGHTS_FILE), {"format": "pt"})
    if ranks:
        write_json(folder / RANKS_FILE, {"ranks": ranks})


def _unchanged(stored: Stored, numbers: Sequence[int], changed: Collection[int]) -> Iterator[tuple[str, Tensor]]:
    checkpoint = stored.checkpoint
    for shard in checkpoint.shards:
        with safe_open(checkpoint.folder / shard, framework="pt") as file:
            for key in checkpoint.keys_of(shard):
                number = stored.block_of(key)
                if key not in stored.taken_over:
                    continue
                if number is None:
                    yield key, file.get_tensor(key)
                elif number in numbers and number not in changed:
                    yield stored.moved(key, number, numbers.index(number)), file.get_tensor(key)


def _original(name: str) -> str:
    """The weight that a weight of a block stands for, by their names in it."""
    layer, _, last = name.rpartition(".")
    return f"{layer}.weight" if last in ("down", "up") else name


def _ranks(list_name: str, blocks: Blocks) -> dict[str, int]:
    """The rank of every layer of low rank by its name in the model."""
    return {
        f"{list_name}.{place}.{name}": module.rank
        for place, block in enumerate(blocks)
        for name, module in block.named_modules()
        if isinstance(module, LowRank)
    }


def write_beside(folder: Path, checkpoint: Checkpoint, blocks: Blocks) -> None:
    """Puts beside the weights what makes them a model, with a config of as many blocks as there are."""
    for name, path in checkpoint.beside().items():
        if name not in NOT_TAKEN_OVER:
            shutil.copyfile(path, folder / name)
    numbers, config = blocks.numbers, as_json(checkpoint.config)
    if len(numbers) < blocks.at_first:
        own = config.setdefault("vision_config", {}) if is_clip(checkpoint) else config
        own |= {_length_key(checkpoint): len(numbers), **shortened(own, numbers, blocks.at_first)}
        write_json(folder / CONFIG_FILE, config)


def _length_key(checkpoint: Checkpoint) -> str:
    """How a config calls the number of its blocks."""
    names = type(AutoConfig.from_pretrained(checkpoint.folder)).attribute_map
    return str(names.get("num_hidden_layers", "num_hidden_layers"))


def parameters_in(files: Collection[Path]) -> int:
    """How many parameters stand in weights files."""
    total = 0
    for path in files:
        with safe_open(path, framework="pt") as file:
            total += sum(torch.Size(file.get_slice(key).get_shape()).numel() for key in file.keys())  # noqa: SIM118
    return total


def write_record(folder: Path, checkpoint: Checkpoint, record: Mapping[str, Any], findings: Mapping[str, Any]) -> None:
    """Writes what decided the result, what was found out on the way, and a card that shows both."""
    weights = [checkpoint.folder / shard for shard in checkpoint.shards], list(folder.glob("*.safetensors"))
    sizes = {
        "parameters": [parameters_in(files) for files in weights],
        "bytes": [sum(path.stat().st_size for path in files) for files in weights],
    }
    whole = as_json({"model": public_name(checkpoint.name), **record, **sizes, "findings": findings})
    data = ModelCardData(
        base_model=checkpoint.name if is_hub_id(checkpoint.name) else None,
        library_name="sap_lightning" if (folder / RANKS_FILE).is_file() else "transformers",
        tags=["compressed", "sap_lightning", record["method"]],
    )
    template = Path(__file__).with_name("card.md.j2")
    write_text(folder / CARD_FILE, f"{ModelCard.from_template(data, template_path=str(template), record=whole)}\n")
    files = {path.name: sha256_of_file(path) for path in folder.iterdir()}
    write_json(folder / RECORD_FILE, sealed({**whole, "files": files}))
