"""What a method of whole models alone is; one kind looks at models at work, and then fuses weight after weight."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sap_lightning.checkpoints.examples import Examples
from sap_lightning.checkpoints.sources import Part, Rows, Sources
from sap_lightning.errors import InputError
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.method import MergeMethod, Prepared
from sap_lightning.models.probe import AnchorProbe

Seen = Mapping[str, Tensor]
"""What a look at models gave."""


class OfWholeModels(MergeMethod):
    """Is for two whole models or more, and for no adapters."""

    @property
    def least_clients(self) -> int:
        return 2

    def prepare(
        self, adapters: Sequence[Adapter], weights: Sequence[float], anchors: AnchorProbe | None = None
    ) -> Prepared:
        raise InputError(
            f"merge.method {self.name} fuses whole models, not adapters; it is a method of the command fuse"
        )


class WholeMethod(OfWholeModels):
    """Fuses whole models, of which the first says what the result is like, by what they do with data.

    Attributes:
        needs_base: whether it goes by the model that all were trained from.
        takes_unlike: whether weights of the models may be of other shapes.
        most_models: how many it fuses at most; None for any number.
    """

    uses_weights = False
    needs_base = False
    takes_unlike = False
    most_models: int | None = 2

    @property
    def needs_anchors(self) -> bool:  # type: ignore[override]
        """Whether it has to look at data."""
        return True

    @abstractmethod
    def look(self, sources: Sources, examples: Examples) -> Seen:
        """Looks at the models, one in memory at a time.

        Raises:
            InputError: when they cannot be shown the examples.
        """

    @abstractmethod
    def kept(self, sources: Sources, seen: Seen) -> dict[str, str]:
        """Weights of the first model that stay as they are, by key, and why."""

    def part(self, key: str, rows: Rows, sources: Sources, seen: Seen) -> Part:
        """Rows of a weight from both models."""
        return sources.part(key, rows)

    @abstractmethod
    def fused(self, key: str, part: Part, seen: Seen) -> Tensor:
        """A weight, float32 and of the shape of the part's."""

    def findings(self, seen: Seen) -> dict[str, Any]:
        """What was found out by looking, for the record."""
        return {}

    def check(self, models: Sequence[str], base: str | None, weights: Sequence[float] | None) -> None:
        """Raises InputError for settings of the command that the method has no use for, or lacks."""
        if self.most_models is not None and len(models) > self.most_models:
            raise InputError(
                f"fuse.models {list(models)}: {self.name} fuses {self.most_models} models, got {len(models)}"
            )
        if weights is not None:
            raise InputError(f"fuse.weights {list(weights)}: {self.name} weighs no models; leave it out")
        if self.needs_base and base is None:
            raise InputError(f"fuse.base is not set: {self.name} needs the model that all were trained from")
        if base is not None and not self.needs_base:
            raise InputError(f"fuse.base {base}: {self.name} looks at no base; leave it out")
