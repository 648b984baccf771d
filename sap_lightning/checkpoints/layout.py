"""What a result is like that is of another form than the models: its files, and what stands in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from sap_lightning.checkpoints.checkpoint import CONFIG_FILE, INDEX_FILE
from sap_lightning.checkpoints.sources import BLOCK, Rows, Sources
from sap_lightning.io.weights import Stated, bytes_in, head_of, matrix_shape


class Piece(NamedTuple):
    """A weight of one model as it is.

    Attributes:
        model: its number.
        key: the weight's, as the first model calls it.
    """

    model: int
    key: str


@dataclass(frozen=True)
class Layout:
    """The files of a result.

    Attributes:
        shards: of each file the keys, in order. What is neither joined nor given by the method is one of the first
            model's, and fused.
        stated: dtype and shape of every weight by key.
        joined: of weights that are put together, what stands in each, one below the other.
        config: what its config says.
        findings: what is said of it in the record.
    """

    shards: Mapping[str, Sequence[str]]
    stated: Mapping[str, Stated]
    joined: Mapping[str, Sequence[Piece]]
    config: Mapping[str, Any]
    findings: Mapping[str, Any] = field(default_factory=dict)

    def keys_of(self, shard: str) -> Sequence[str]:
        """The keys of a shard in the order of its file."""
        return self.shards[shard]

    def fuses(self, key: str) -> bool:
        """Whether a weight of the first model's is one of the result's too, and fused with the others'."""
        return key in self.stated and key not in self.joined

    def dtype(self, key: str) -> torch.dtype:
        """In which a weight that is joined or given is written."""
        dtype = self.stated[key].dtype
        assert isinstance(dtype, torch.dtype)
        return dtype

    def head(self, shard: str) -> bytes:
        """What stands in a shard's file before its tensors."""
        return head_of({key: self.stated[key] for key in self.shards[shard]})

    def pieces(self, key: str, sources: Sources) -> Iterator[tuple[int, torch.Tensor]]:
        """What stands in a weight that is put together, some rows at a time, with the number of their model."""
        for model, own in self.joined[key]:
            checkpoint, name = sources.models[model], sources.keys[model][own]
            height, width = matrix_shape(checkpoint.stated[name].shape)
            step = max(1, BLOCK // max(1, width))
            for first in range(0, height, step):
                yield model, checkpoint.rows(name, *Rows(first, min(first + step, height)))

    @property
    def beside(self) -> dict[str, Any]:
        """What files beside the weights say that are not the first model's: its config, and where each weight is."""
        if len(self.shards) == 1:
            return {CONFIG_FILE: self.config}
        size = sum(map(bytes_in, self.stated.values()))
        where = {key: shard for shard, keys in self.shards.items() for key in keys}
        return {CONFIG_FILE: self.config, INDEX_FILE: {"metadata": {"total_size": size}, "weight_map": where}}
