"""A merge method on top of another one: it changes what the other is given, or what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from sap_lightning.errors import InputError
from sap_lightning.functional.lora import Update
from sap_lightning.merging.method import MergeMethod, Prepared
from sap_lightning.merging.pruning import Pruning
from sap_lightning.merging.registry import method_of


class OnTop(MergeMethod):
    """A method with a setting ``method``, and whatever that one needs.

    Subclasses are frozen dataclasses that declare the setting. They may themselves be what is under another.

    Attributes:
        method: the name of one of the package's methods, at its default settings, or a method.
    """

    method: MergeMethod | str

    def __post_init__(self) -> None:
        _ = self.inner  # a name that there is not is refused now

    @cached_property
    def inner(self) -> MergeMethod:
        """The method under this one."""
        if self.method is None:  # as a config file can say
            raise InputError(f"merge.method.method is null; name the method under {self.name}, such as average")
        return method_of(self.method, "merge.method.method")

    @property
    def needs_anchors(self) -> bool:  # type: ignore[override]  # as that of the method under this one
        return self.inner.needs_anchors

    @property
    def asks_by_batch(self) -> bool:  # type: ignore[override]
        return self.inner.asks_by_batch

    @property
    def uses_weights(self) -> bool:  # type: ignore[override]
        return self.inner.uses_weights

    @property
    def needs_reach(self) -> bool:  # type: ignore[override]
        return self.inner.needs_reach

    @property
    def weighs_by_reach(self) -> bool:  # type: ignore[override]
        return self.inner.weighs_by_reach

    @property
    def has_masks(self) -> bool:  # type: ignore[override]
        return self.inner.has_masks

    @property
    def sparsity(self) -> float | None:  # type: ignore[override]
        return self.inner.sparsity

    @property
    def least_clients(self) -> int:
        return self.inner.least_clients


@dataclass(frozen=True)
class Changed(Prepared):
    """A prepared merge and what is done to its result.

    Attributes:
        inner: the merge.
        change: from its update by layer to this one's.
        found: what was found out for the change.
    """

    inner: Prepared
    change: Callable[[dict[str, Update]], dict[str, Update]]
    found: Mapping[str, Any] = field(default_factory=dict)

    @property
    def findings(self) -> Mapping[str, Any]:  # type: ignore[override]  # beside what the inner merge found
        return {**self.inner.findings, **self.found}

    def apply(self, sparsity: float | None = None) -> dict[str, Update]:
        return self.change(self.inner.apply(sparsity))


def pruning_in(prepared: Prepared) -> Pruning | None:
    """What a merge prunes of each adapter, itself or under what is done to it; None where it prunes nothing."""
    while isinstance(prepared, Changed):
        prepared = prepared.inner
    return prepared if isinstance(prepared, Pruning) else None
