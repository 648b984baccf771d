"""Krum and Multi-Krum: the updates closest to the others (Blanchard et al., NeurIPS 2017, arXiv:1703.02757)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sap_lightning.errors import InputError, check_at_least
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.average import averaged
from sap_lightning.merging.distances import squared_distances
from sap_lightning.merging.method import MergeMethod, Prepared
from sap_lightning.models.probe import AnchorProbe


@dataclass(frozen=True)
class Krum(MergeMethod):
    """The average of the clients whose ΔW have the least sum of squared distances to their K − f − 2 nearest.

    Of equal sums the adapter with the lower sha256 goes first: with three clients the two nearest to each other always
    tie.

    Args:
        byzantine: f, the number of clients that may send anything. The theory wants K ≥ 2f + 3, so the default of 0 is
            all that three clients allow: it still leaves the farthest one out.
        multi: number of clients that are averaged; 1 is Krum, more is Multi-Krum.

    Raises:
        InputError: when a setting is out of range or there are too few clients for it.
    """

    name = "krum"
    merges_prompts = True

    byzantine: int = 0
    multi: int = 1

    def __post_init__(self) -> None:
        check_at_least("merge.method.byzantine", self.byzantine, 0)
        check_at_least("merge.method.multi", self.multi, 1)

    @property
    def uses_weights(self) -> bool:  # type: ignore[override]  # of a single client there is nothing to weigh
        return self.multi > 1

    def prepare(
        self, adapters: Sequence[Adapter], weights: Sequence[float], anchors: AnchorProbe | None = None
    ) -> Prepared:
        self._check_number(len(adapters))
        # The nearest of all is the client itself, at distance 0.
        nearest = squared_distances(adapters).sort(1).values[:, : len(adapters) - self.byzantine - 1]
        scores = nearest.sum(1).tolist()
        chosen = sorted(range(len(adapters)), key=lambda k: (scores[k], adapters[k].sha256))[: self.multi]
        share = sum(weights[k] for k in chosen)
        findings = {"chosen": [adapters[k].name for k in chosen]}
        return averaged([adapters[k] for k in chosen], [weights[k] / share for k in chosen], findings, self.name)

    @property
    def least_clients(self) -> int:
        return max(2 * self.byzantine + 3, self.multi)

    def _check_number(self, clients: int) -> None:
        if clients < 2 * self.byzantine + 3:
            raise InputError(
                f"merge.method.byzantine {self.byzantine} needs at least 2·{self.byzantine} + 3 clients, "
                f"got {clients}; {'lower it or ' if self.byzantine else ''}use another method"
            )
        if clients < self.multi:
            raise InputError(f"merge.method.multi {self.multi} is more than the {clients} clients; lower it")
