"""What becomes of each weight of whole models: a merge method at work on a part of one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sap_lightning.checkpoints.checkpoint import Checkpoint
from sap_lightning.checkpoints.layout import Layout
from sap_lightning.checkpoints.method import Seen, WholeMethod
from sap_lightning.checkpoints.scores import Scores
from sap_lightning.checkpoints.sources import BLOCK, Part, Rows, Sources, bytes_of
from sap_lightning.console import track
from sap_lightning.errors import InputError
from sap_lightning.functional.consensus import weighted_sum
from sap_lightning.functional.lora import Update, dense
from sap_lightning.functional.masking import RunningThreshold, running_thresholds
from sap_lightning.functional.spaces import Parameters
from sap_lightning.io.weights import is_finite
from sap_lightning.merging import MergeMethod, PruningMethod


class Tally:
    """What was read of the models for some weights, and how many elements of the first one are as they were.

    Args:
        models: how many there are.
    """

    def __init__(self, models: int) -> None:
        self.digests = [sha256() for _ in range(models)]
        self.elements = 0
        self.unchanged = 0

    def add(self, part: Part, result: Tensor) -> None:
        """Takes a part and what became of it into account."""
        for digest, change in zip(self.digests, part.changes, strict=True):
            digest.update(bytes_of(change.stored))
        self.elements += result.numel()
        self.unchanged += int((result == part.changes[0].stored).sum())

    def record(self) -> dict[str, Any]:
        """The same as JSON knows it."""
        digests = [digest.hexdigest() for digest in self.digests]
        return {"digests": digests, "elements": self.elements, "unchanged": self.unchanged}


@dataclass(frozen=True)
class Fuser:
    """Fuses the weights of whole models.

    A method with one threshold over a whole model finds it by two looks at all weights before the first is written, and
    one with a threshold for each weight by two looks at a weight that is larger than a block.

    Attributes:
        method: the merge method.
        shares: each model's share of the whole.
        sources: the models.
        scores: how much every element of each model's change matters, for a method that asks data.
        seen: what a method of whole models alone has seen of them.
        joint: what the result is like where it is not as the first model; then weights that it is given are in seen.
    """

    method: MergeMethod
    shares: Sequence[float]
    sources: Sources
    scores: Sequence[Scores] = ()
    seen: Seen = field(default_factory=dict)
    joint: Layout | None = None

    @property
    def layout(self) -> Checkpoint | Layout:
        """What the result is like."""
        return self.joint or self.sources.first

    @cached_property
    def kept(self) -> dict[str, str]:
        """Weights that stay as the first model has them, by key, and why."""
        joint = self.joint
        return {key: why for key, why in self._kept.items() if joint is None or joint.fuses(key)}

    @property
    def _kept(self) -> dict[str, str]:
        method, shapes = self.method, self.sources.first.shapes
        if isinstance(method, WholeMethod):
            return method.kept(self.sources, self.seen)
        by_method = {key: f"{method.name} leaves it" for key in shapes if method.keeps(key, shapes[key])}
        return by_method | self.sources.kept

    @cached_property
    def thresholds(self) -> list[RunningThreshold] | None:
        """Each model's threshold over all of its weights; None where the method has none."""
        if isinstance(self.method, PruningMethod) and self.method.scope == "global":
            return self._thresholds_over(self.method, self._pruned_keys)
        return None

    def _thresholds_of(self, key: str) -> list[RunningThreshold] | None:
        """Each model's threshold for a weight: over all weights, or over this one where it is fused in blocks."""
        in_blocks = len(list(self._blocks(key))) > 1
        if self.thresholds is None and in_blocks and isinstance(self.method, PruningMethod):
            return self._thresholds_over(self.method, [key])
        return self.thresholds

    def _thresholds_over(self, method: PruningMethod, keys: Sequence[str]) -> list[RunningThreshold]:
        def shown() -> Iterator[Iterator[Parameters]]:
            for key in track(keys, f"{method.name}: threshold"):
                for part in self.parts(key):
                    yield self._scores(method, key, part)

        return running_thresholds(method.sparsity, len(self.sources.models), shown)

    @property
    def equal_that_go(self) -> list[int]:
        """How many values at each model's threshold are still to go."""
        return [threshold.equal_that_go for threshold in self.thresholds or ()]

    def go_on_from(self, equal_that_go: Sequence[int]) -> None:
        """Goes on after weights of which this was left."""
        for threshold, left in zip(self.thresholds or (), equal_that_go, strict=True):
            threshold.equal_that_go = left

    def write(self, shard: str, file: BinaryIO) -> Tally:
        """Writes a shard of the result.

        Raises:
            InputError: when a weight is not finite.
        """
        tally = Tally(len(self.sources.models))
        file.write(self.layout.head(shard))
        for key in track(self.layout.keys_of(shard), f"{self.method.name}: weights"):
            for content in self._contents(key, tally):
                file.write(content)
        return tally

    def _contents(self, key: str, tally: Tally) -> Iterator[bytes | memoryview]:
        """The bytes of a weight of the result; what was read for them is counted."""
        if key in self.kept:
            for chunk in self.sources.first.chunks(key):
                tally.digests[0].update(chunk)
                yield chunk
        elif self.joint and key in self.joint.joined:
            for model, rows in self.joint.pieces(key, self.sources):
                tally.digests[model].update(bytes_of(rows))
                yield bytes_of(self._checked(key, rows, self.joint.dtype(key)))
        elif self.joint and key in self.seen:
            yield bytes_of(self._checked(key, self.seen[key], self.joint.dtype(key)))
        else:
            thresholds = self._thresholds_of(key)
            for part in self.parts(key):
                result = self._fused(key, part, thresholds)
                tally.add(part, result)
                yield bytes_of(result)

    def _fused(self, key: str, part: Part, thresholds: Sequence[RunningThreshold] | None) -> Tensor:
        """A part in the first model's dtype."""
        return self._checked(key, self._weight(key, part, thresholds), part.changes[0].stored.dtype)

    def _checked(self, key: str, result: Tensor, dtype: torch.dtype) -> Tensor:
        result = result.to(dtype)
        if not is_finite(result):
            raise InputError(
                f"{key}: what {self.method.name} makes of it is not finite in {dtype}; check the models and the"
                f" method's settings, {self.method.settings}"
            )
        return result

    def _weight(self, key: str, part: Part, thresholds: Sequence[RunningThreshold] | None) -> Tensor:
        if isinstance(self.method, WholeMethod):
            return self.method.fused(key, part, self.seen)
        return part.base + dense(self._update(key, part, thresholds))

    def _update(self, key: str, part: Part, thresholds: Sequence[RunningThreshold] | None) -> Update:
        method = self.method
        if self._is_averaged(key):
            return weighted_sum([change.layers[key] for change in part.changes], self.shares)
        if isinstance(method, PruningMethod) and (self.scores or thresholds):
            masks = self._masks(method, key, part, thresholds)
            return method.pruning(part.changes, self.shares).masked_by(masks)[key]
        return method.merge_weight(key, part.changes, self.shares)

    def _masks(
        self, method: PruningMethod, key: str, part: Part, thresholds: Sequence[RunningThreshold] | None
    ) -> Iterator[Mapping[str, Parameters]]:
        """What stays of each model's change."""
        for index, scores in enumerate(self._scores(method, key, part)):
            if thresholds is None:
                yield method.masks({key: scores}, method.sparsity)
            else:
                yield {key: tuple(map(thresholds[index].keep, scores))}

    def _scores(self, method: PruningMethod, key: str, part: Part) -> Iterator[Parameters]:
        """How much what each model has changed matters: as data says, or its own numbers."""
        if self.scores:
            yield from ((own.rows(key, part.rows),) for own in self.scores)
        else:
            pruning = method.pruning(part.changes, self.shares)
            yield from (pruning.scores(change)[key] for change in part.changes)

    def _is_averaged(self, key: str) -> bool:
        """Whether a method that looks at matrices has none here."""
        return self.method.needs_matrices and len(self.sources.first.stated[key].shape) < 2

    @property
    def _pruned_keys(self) -> list[str]:
        every = (key for shard in self.sources.first.shards for key in self.sources.first.keys_of(shard))
        fused = (key for key in every if key not in self.kept and (self.joint is None or self.joint.fuses(key)))
        return [key for key in fused if not self._is_averaged(key)]

    def parts(self, key: str) -> Iterator[Part]:
        """A weight, whole or in blocks of its rows, as the method takes it."""
        for rows in self._blocks(key):
            if isinstance(self.method, WholeMethod):
                yield self.method.part(key, rows, self.sources, self.seen)
            else:
                yield self.sources.part(key, rows)

    def _blocks(self, key: str) -> Iterator[Rows]:
        return self.sources.blocks(key, BLOCK if self.method.by_element else None)
