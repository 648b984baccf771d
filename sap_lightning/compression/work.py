"""The compression of one model, block after block; a block that is finished is kept until all is done."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sap_lightning.compression.blocks import Blocks
from sap_lightning.compression.calibration import Calibration
from sap_lightning.compression.gradpruner import GradPruner
from sap_lightning.compression.grasp import Grasp, put_in_place
from sap_lightning.compression.output import Stored
from sap_lightning.console import track
from sap_lightning.errors import InputError
from sap_lightning.files import read_tensors, write_tensors
from sap_lightning.functional.lora import LoRALayer
from sap_lightning.functional.triplets import highest

log = logging.getLogger(__name__)
Layers = float | list[int]


@dataclass(frozen=True)
class Work:
    """A model at work on.

    Attributes:
        blocks: its blocks, which are changed in place.
        stored: how its weights are stored.
        shown: what it is shown, if anything.
        workplace: the folder in which finished blocks stand.
    """

    blocks: Blocks
    stored: Stored
    shown: Calibration | None
    workplace: Path

    def chosen(self, layers: Layers, redundancy: Sequence[float]) -> list[int]:
        """The numbers of the blocks to compress, in order: those named, or such a share of the most redundant.

        Raises:
            InputError: when there is no such block, or the share is none.
        """
        if isinstance(layers, list):
            self._check_numbers(layers)
            return sorted(layers)
        return highest(torch.tensor(redundancy, dtype=torch.float64), self._count(layers)).tolist()

    def run(self, layers: float) -> tuple[list[int], list[float]]:
        """The numbers of a share of the blocks that follow each other, and together turn the answer's token least.

        Returns:
            Their numbers, and of every run the angular distance of what enters and what leaves it.

        Raises:
            InputError: when the share is none.
        """
        assert self.shown is not None
        count = self._count(layers)
        distances = self.shown.angular_distances(self.blocks, count)
        start = distances.index(min(distances))
        return self.blocks.numbers[start : start + count], distances

    def _count(self, layers: float) -> int:
        """How many blocks a share of them is."""
        if not (count := round(layers * len(self.blocks.numbers))):
            raise InputError(f"compress.layers {layers:g}: is no whole block of {len(self.blocks.numbers)}; take more")
        return count

    def _check_numbers(self, layers: list[int]) -> None:
        numbers = self.blocks.numbers
        if not layers or len(set(layers)) < len(layers) or not set(layers) <= set(numbers):
            raise InputError(f"compress.layers {layers}: name some of the blocks 0 to {numbers[-1]}, each once")

    def drop(self, chosen: list[int]) -> None:
        """Takes blocks out, of which one at least is left.

        Raises:
            InputError: when none is.
        """
        if len(chosen) == len(self.blocks.numbers):
            raise InputError(f"compress.layers: all {len(chosen)} blocks would go; leave one at least")
        self.blocks.drop(chosen)

    def gradpruner(self, method: GradPruner, layers: Layers) -> tuple[list[int], list[int], dict[str, Any]]:
        """Drops blocks and merges them into those before them.

        Returns:
            The blocks that went, those that they were merged into, and what was found out.
        """
        assert self.shown is not None
        steps = method.first_steps(self.blocks, self.shown)
        importance = method.importance(steps)
        chosen = self.chosen(layers, [-one for one in importance])
        dropped = {number: self.blocks[number] for number in chosen}
        self.drop(chosen)
        findings = {"importance": importance, "loss without merging": self.shown.loss()}
        changed = set()
        for number, block in dropped.items():
            if before := [kept for kept in self.blocks.numbers if kept < number]:
                method.merge(self.blocks[before[-1]], block, steps[number])
                changed.add(before[-1])
        return chosen, sorted(changed), findings

    def grasp(self, method: Grasp, chosen: list[int]) -> dict[str, Any]:
        """Compresses blocks from the last to the first, and returns which weights stay as they are."""
        dtypes = {number: self._dtypes(number) for number in chosen}  # what cannot be compressed is refused at once
        first = method.first_look(self.blocks, chosen, self.shown)
        kept = []
        for number in track(chosen[::-1], "grasp: blocks"):
            layers = self.blocks.linears(number)
            found = self._finished(number)
            if found is None:
                found = method.compress(self.blocks, number, self.shown, first.get(number), dtypes[number])
                write_tensors(self._file(number), _as_tensors(found))
            else:
                for name, factors in found.items():
                    put_in_place(self.blocks, number, name, factors)
            kept += [f"{self.blocks.name}.{number}.{name}" for name in layers if name not in found]
            log.info("grasp: block %d has %d of %d layers in low rank", number, len(found), len(layers))
        return {"no smaller in low rank": sorted(kept)} if kept else {}

    def _dtypes(self, number: int) -> dict[str, torch.dtype]:
        """In which each linear layer of a block is stored, by its name in the block."""
        return {name: self.stored.dtype(number, f"{name}.weight") for name in self.blocks.linears(number)}

    def _file(self, number: int) -> Path:
        return self.workplace / f"block-{number}.safetensors"

    def _finished(self, number: int) -> dict[str, LoRALayer] | None:
        """The factors of a block that was finished before."""
        tensors = read_tensors(self._file(number))
        if tensors is None:
            return None
        names = [key.removesuffix(".down") for key in tensors if key.endswith(".down")]
        return {name: LoRALayer(tensors[f"{name}.down"], tensors[f"{name}.up"]) for name in names}


def _as_tensors(found: dict[str, LoRALayer]) -> dict[str, Tensor]:
    parts = [{f"{name}.down": factors.A, f"{name}.up": factors.B} for name, factors in found.items()]
    return {key: part for pair in parts for key, part in pair.items()}
