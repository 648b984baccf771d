"""What is measured: every model on every unseen domain, each point named by all that its metrics depend on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

from torch import nn

from sap_lightning.data.anchors import AnchorDataModule
from sap_lightning.data.domains import DomainDataModule
from sap_lightning.federation.homes import Homes, images_at_home
from sap_lightning.files import as_json
from sap_lightning.fingerprints import digest, fingerprint
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging import SAP
from sap_lightning.merging.method import MergeMethod
from sap_lightning.modules.merge import MergeModule
from sap_lightning.results import AVERAGE, ZERO_SHOT, Kind, Result

COOP, PROMPTFL, PFEDPROMPT = "coop", "promptfl", "pfedprompt"
"""What the table calls a prompt client alone, a merge of prompts, and that where clients remember their images."""


class Point(NamedTuple):
    """A model that is to be measured on an unseen domain.

    Attributes:
        result: what is known of it but the metrics.
        adapters: what it is made of; nothing for zero-shot.
        method: how; None for zero-shot and a client alone.
        poisoned: whether one of the adapters is poisoned.
        remembers: whether its clients add to it, each at home, what they remember of their images.
        reported: whether the report looks at it: zero-shot, or the merge of honest clients that it is about.
    """

    result: Result
    adapters: Sequence[Adapter]
    method: MergeMethod | None = None
    poisoned: bool = False
    remembers: bool = False
    reported: bool = False


@dataclass(frozen=True)
class Plan:
    """Which merges are measured.

    Attributes:
        methods: by what the table calls them.
        sparsities: values of ρ for the methods that prune; each method's own if empty.
        variant: the settings that a sweep changed, by name.
        keeps_models: whether merged models are written to the run folder.
    """

    methods: Mapping[str, MergeMethod]
    sparsities: Sequence[float] = ()
    variant: Mapping[str, Any] = field(default_factory=dict)
    keeps_models: bool = True

    def sparsities_of(self, method: MergeMethod) -> Sequence[float | None]:
        """Where a method is measured."""
        return self.sparsities if self.sweeps(method) else [method.sparsity]

    def sweeps(self, method: MergeMethod) -> bool:
        """Whether a method is measured at several sparsities."""
        return method.sparsity is not None and len(self.sparsities) > 0

    @property
    def reported(self) -> MergeMethod:
        """The method that the report is about: SAP, or the last one if it is not there."""
        methods = list(self.methods.values())
        return next((method for method in methods if method.name == SAP.name), methods[-1])

    @property
    def reported_sparsity(self) -> float | None:
        """The measured sparsity that is nearest to its own."""
        own = self.reported.sparsity
        return own if own is None else min(self.sparsities or [own], key=lambda rho: abs(rho - own))


class Sent(NamedTuple):
    """What the clients sent.

    Attributes:
        honest: every client's own adapter.
        poisoned: what one of them sends in place of its own; nothing without a poisoned client.
        label: what was done to it.
        rounds: how many rounds there were; these are of the last.
        bytes_before: what has crossed the wire before these were sent, up and down.
    """

    honest: Sequence[Adapter]
    poisoned: Sequence[Adapter] = ()
    label: str = ""
    rounds: int = 1
    bytes_before: int = 0

    @classmethod
    def of(cls, honest: Sequence[Adapter], sent: Sequence[Adapter], label: str) -> Sent:
        """What was sent in place of honest adapters; one that a poison left as it was is honest."""
        return cls(honest, [adapter for adapter in sent if adapter not in honest], label)

    @property
    def adapters(self) -> list[Adapter]:
        """What the server gets, in the order of their content."""
        replaced = {adapter.name for adapter in self.poisoned}
        kept = [adapter for adapter in self.honest if adapter.name not in replaced]
        return sorted([*kept, *self.poisoned], key=lambda adapter: adapter.sha256)

    @property
    def all(self) -> list[Adapter]:
        """Honest and poisoned adapters."""
        return [*self.honest, *self.poisoned]

    def label_of(self, adapter: Adapter) -> str:
        """What was done to an adapter; empty for an honest one."""
        return self.label if adapter in self.poisoned else ""


class Points:
    """Lists the points of each unseen domain.

    Args:
        plan: which merges.
        sent: what the clients sent.
        data: the domains.
        anchors: the server's image–caption pairs.
        merge: the module that is measured, with its base loaded.
        precision: that it is evaluated in.
        provenance: what every row was made with.
        homes: where prompts are measured too; None for clients that send adapters.
    """

    def __init__(
        self,
        plan: Plan,
        sent: Sent,
        data: DomainDataModule,
        anchors: AnchorDataModule,
        merge: MergeModule,
        precision: str,
        provenance: dict[str, str],
        homes: Homes | None = None,
    ) -> None:
        self.homes = homes
        self.plan = plan
        self.sent = sent
        self.data = data
        self.anchors = anchors
        self.merge = merge
        self.precision = precision
        self.provenance = provenance
        self._images: dict[str, str] = {}

    def on(self, unseen: str) -> Iterator[Point]:
        """All that is to be measured on an unseen domain, in an order that prepares each method once."""
        honest, poisoned, sent = (
            [adapter for adapter in adapters if adapter.name != unseen]
            for adapters in (self.sent.honest, self.sent.poisoned, self.sent.adapters)
        )
        yield self._point("zero-shot", ZERO_SHOT, unseen, ())
        for adapter in sorted(honest, key=lambda adapter: adapter.name):
            yield self._point("client", self._client_row(adapter), unseen, [adapter])
        for adapter in poisoned:
            yield self._point("client", self._client_row(adapter), unseen, [adapter], condition=self.sent.label)
        for name, method in self.plan.methods.items():
            yield from self._merges(name, unseen, honest, method)
            if poisoned:
                yield from self._merges(name, unseen, sent, method, self.sent.label)

    def _merges(
        self, model: str, unseen: str, adapters: Sequence[Adapter], method: MergeMethod, poison: str = ""
    ) -> Iterator[Point]:
        rejecting = "rejecting outliers" if self.merge.reject_outliers else ""
        condition = ", ".join(filter(None, [poison, rejecting]))
        for sparsity in self.plan.sparsities_of(method):
            yield self._point("merge", self._merge_row(model), unseen, adapters, method, sparsity, condition)
        if self.homes and method.name == AVERAGE:
            yield self._point("merge", PFEDPROMPT, unseen, adapters, method, None, condition, remembers=True)

    def _client_row(self, adapter: Adapter) -> str:
        return f"{COOP if self.homes else 'client'} {adapter.name}"

    def _merge_row(self, model: str) -> str:
        if self.homes is None:
            return model
        return PROMPTFL if model == AVERAGE else f"{PROMPTFL} {model}"

    def _point(
        self,
        kind: Kind,
        model: str,
        unseen: str,
        adapters: Sequence[Adapter],
        method: MergeMethod | None = None,
        sparsity: float | None = None,
        condition: str = "",
        remembers: bool = False,
    ) -> Point:
        settings = settings_of(method, sparsity, self.merge, self.anchors, adapters) if method else {}
        if self.homes and remembers:
            settings["memory"] = self.homes.memory
        sources = [adapter.sha256 for adapter in adapters]
        at_home = [images_at_home(self.data, adapters)] if self.homes and adapters else []
        result = Result(
            kind=kind,
            model=model,
            unseen=unseen,
            measurement=self._measurement(unseen, adapters, settings, at_home),
            sparsity=sparsity,
            swept=method is not None and self.plan.sweeps(method),
            seed=self.data.seed,
            condition=condition,
            variant=dict(self.plan.variant),
            settings=settings,
            sources=sources,
            provenance=self.provenance,
            rounds=self.sent.rounds if adapters else 0,
            bytes=self.sent.bytes_before + sum(adapter.size for adapter in adapters) if adapters else 0,
        )
        poisoned = any(adapter in self.sent.poisoned for adapter in adapters)
        merge = method is self.plan.reported and sparsity == self.plan.reported_sparsity and not poisoned
        return Point(result, adapters, method, poisoned, remembers, merge or result.kind == ZERO_SHOT)

    def stands(self, row: Result, adapters: Sequence[Adapter]) -> bool:
        """Whether an earlier row of these adapters is of the images, base, prompts and precision that there are now."""
        measured = partial(self._measurement, row.unseen, adapters, row.settings)
        # Adapters are measured on the unseen domain alone, prompts at their clients' sites too.
        return row.measurement == measured([]) or row.measurement == measured([images_at_home(self.data, adapters)])

    def _measurement(
        self, unseen: str, adapters: Sequence[Adapter], settings: Mapping[str, Any], at_home: Sequence[Any]
    ) -> str:
        """A digest of all that the metrics of a model depend on."""
        images = [self.data.class_names, unseen, self._images_of(unseen)]
        prompts = [list(self.merge.templates), self._texts, self.merge.logit_scale]
        base = [self.merge.base, self.merge.base_fingerprint, self.precision]
        sources = [adapter.sha256 for adapter in adapters]
        return digest(images, base, prompts, sources, settings, *at_home)

    def _images_of(self, unseen: str) -> str:
        """Changes whenever an image of the domain does; looked up once, as the points of a run are of one state."""
        if unseen not in self._images:
            self._images[unseen] = self.data.fingerprint(unseen)
        return self._images[unseen]

    @cached_property
    def _texts(self) -> str:
        """Tells the base's text tower from others."""
        texts = self.merge.texts
        return fingerprint(nn.ModuleList([texts.model, texts.projection]))


def settings_of(
    method: MergeMethod,
    sparsity: float | None,
    merge: MergeModule,
    anchors: AnchorDataModule,
    adapters: Sequence[Adapter],
) -> dict[str, Any]:
    """What decides the outcome of a merge beside the adapters, as JSON knows it."""
    settings: dict[str, Any] = {"method": method.name, "weights": merge.weights_in(method, adapters)}
    # A setting of such a name, as of a method on top of another, goes by what the command line calls it.
    settings |= {f"method.{name}" if name in settings else name: of for name, of in method.settings.items()}
    if merge.max_share is not None:
        settings["max_share"] = merge.max_share
    if method.code:
        settings["code"] = method.code
    if sparsity is not None:
        settings["sparsity"] = sparsity
    if method.needs_anchors or merge.reject_outliers:
        names = ("root", "num_pairs", "noise", *(["batch_size"] if method.asks_by_batch else []))
        settings["anchors"] = {name: getattr(anchors, name) for name in names}
        settings["anchors"]["content"] = anchors.fingerprint
    if merge.reject_outliers:
        settings["reject_outliers"] = True
    return dict(as_json(settings))
