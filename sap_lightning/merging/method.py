"""What a merge method is: K adapters → one update of the base, in two phases.

``prepare`` does what does not depend on the sparsity and returns it as a :class:`Prepared` merge, whose ``apply`` is
cheap: a sweep over sparsities prepares once. The method itself is its settings and nothing else, so one method can be
prepared for any number of clients. A method of one's own subclasses :class:`LayerwiseMethod` (a function of one layer
of every client), :class:`PruningMethod` (a score) or :class:`MergeMethod` (anything), and is named to the command line
by class_path.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sap_lightning.console import track
from sap_lightning.errors import InputError, check_choices
from sap_lightning.functional.lora import Update
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.clients import Source, Weights, client_layers, client_weights, say_how_far
from sap_lightning.models.probe import AnchorProbe

MOST_WEIGHT = 1e30
"""Of a client; float32, in which updates are summed, ends at 3e38."""


class Prepared(ABC):
    """A merge that is ready but for its sparsity; one that prunes, with masks, is a ``merging.pruning.Pruning``.

    Attributes:
        findings: what the method found out and decided, for the merge's record.
    """

    findings: Mapping[str, Any] = {}

    @abstractmethod
    def apply(self, sparsity: float | None = None) -> dict[str, Update]:
        """The merged update by layer; of methods that prune, at another sparsity than their own if one is given."""


class MergeMethod(ABC):
    """K adapters → one update of the base. Holds settings only; a frozen dataclass is the shortest way to write one.

    What is no setting has no annotation in a subclass, or the dataclass would take it for one.

    Attributes:
        name: what tables and the command line call it; the class's name if not given.
        needs_anchors: whether ``prepare`` looks at the server's anchors.
        has_masks: whether what it prepares is, or changes the result of, a ``merging.pruning.Pruning``, which says what
            is pruned of each adapter.
        sparsity: ρ, the share of parameters set to zero; None where nothing is pruned.
        asks_by_batch: whether what ``prepare`` is told depends on how the anchors are batched.
        uses_weights: whether clients' weights have a say.
        takes_any_weights: whether they may also be negative.
        merges_prompts: whether its result moves as all updates are moved. A context needs that, whose numbers are no
            changes of a base's, of which nothing would be 0.
        merges_weights: whether ``merge_weight`` merges the weights of whole models, one at a time.
        by_element: whether each element of that depends on this element of the models alone, so that a weight may be
            merged in parts.
        needs_matrices: whether it looks at rows, columns or singular triplets, which a bias or a norm has not.
        needs_factors: whether it looks at A and B apart, which only a LoRA has.
        needs_manifests: whether it looks at what clients say of their training.
        needs_reach: whether they must say how far their adapters reach.
        weighs_by_reach: whether clients count by that, where all of them say it and nothing else is asked for.
    """

    name = ""
    needs_anchors = False
    asks_by_batch = False
    uses_weights = True
    takes_any_weights = False
    merges_prompts = False
    merges_weights = False
    by_element = False
    needs_matrices = False
    needs_factors = False
    needs_manifests = False
    needs_reach = False
    weighs_by_reach = False
    has_masks = False
    sparsity: float | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            cls.name = cls.__name__

    @abstractmethod
    def prepare(
        self, adapters: Sequence[Adapter], weights: Sequence[float], anchors: AnchorProbe | None = None
    ) -> Prepared:
        """Does all that does not depend on the sparsity.

        Args:
            adapters: in an order that depends on their content only.
            weights: each one's share of the whole.
            anchors: the server's, for methods that look at them.

        Raises:
            InputError: when these adapters, or no anchors, are not enough for the method.
        """

    def merge(
        self, adapters: Sequence[Adapter], weights: Sequence[float] | None = None, anchors: AnchorProbe | None = None
    ) -> dict[str, Update]:
        """Both phases at once; clients count as the method has it if there are no weights."""
        weights = weights or client_weights(adapters, self.own_weights(adapters))
        return self.prepare(adapters, weights, anchors).apply()

    def own_weights(self, adapters: Sequence[Adapter]) -> Weights:
        """How clients count where nobody asks for another way."""
        return "reach" if self.weighs_by_reach and say_how_far(adapters) else "uniform"

    def merge_weight(self, name: str, models: Sequence[Source], weights: Sequence[float]) -> Update:
        """The update of one weight of whole models.

        Args:
            name: the weight's.
            models: each with the one layer of that name.
            weights: each one's share of the whole.
        """
        raise NotImplementedError(f"{self.name} does not merge one weight after another")

    def keeps(self, name: str, shape: Sequence[int]) -> bool:
        """Whether a weight of whole models is to stay as the first of them has it."""
        return False

    @property
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments by name, each of which is stored under that name.

        Raises:
            InputError: naming an argument that is not.
        """
        names = list(inspect.signature(type(self)).parameters)
        if hidden := [name for name in names if not hasattr(self, name)]:
            raise InputError(
                f"{type(self).__name__}: store the argument {hidden[0]} as self.{hidden[0]}, for the record"
            )
        return {name: _plain(getattr(self, name)) for name in names}

    @property
    def record(self) -> dict[str, Any]:
        """What of the method decides a merge; of a method that is another one's setting, it is the setting's value."""
        return {"method": self.name, "code": self.code, "settings": self.settings}

    @property
    def code(self) -> str:
        """Which code a method of one's own is: its class's path and a digest of its source file; empty for ours."""
        own = type(self)
        if own.__module__.startswith("sap_lightning."):
            return ""
        try:
            source = inspect.getsource(sys.modules[own.__module__])
        except (OSError, TypeError):  # typed into a session
            source = ""
        return f"{own.__module__}.{own.__qualname__} {hashlib.sha256(source.encode()).hexdigest()[:12]}"

    @property
    def least_clients(self) -> int:
        """How many adapters the method needs at its settings."""
        return 1


@dataclass(frozen=True)
class PreparedLayers(Prepared):
    """A merge of every layer on its own.

    Attributes:
        names: of the layers, in order.
        merge_layer: one layer's update from its name.
        findings: as for any prepared merge.
        title: what a progress bar calls it.
    """

    names: Sequence[str]
    merge_layer: Callable[[str], Update]
    findings: Mapping[str, Any] = field(default_factory=dict)
    title: str = "merge"

    def apply(self, sparsity: float | None = None) -> dict[str, Update]:
        return {name: self.merge_layer(name) for name in track(self.names, f"{self.title}: layers")}


@dataclass(frozen=True)
class SparseLayers(Prepared):
    """A merge of every layer on its own, at the method's sparsity or another.

    Attributes:
        names: of the layers, in order.
        merge_layer: one layer's update from its name and a sparsity.
        sparsity: the method's own.
        title: what a progress bar calls it.
    """

    names: Sequence[str]
    merge_layer: Callable[[str, float], Update]
    sparsity: float
    title: str

    def apply(self, sparsity: float | None = None) -> dict[str, Update]:
        sparsity = self.sparsity if sparsity is None else sparsity
        return {name: self.merge_layer(name, sparsity) for name in track(self.names, f"{self.title}: layers")}


class LayerwiseMethod(MergeMethod):
    """Merges every layer on its own from the clients' updates, read from disk when they are looked at."""

    merges_weights = True

    def prepare(
        self, adapters: Sequence[Adapter], weights: Sequence[float], anchors: AnchorProbe | None = None
    ) -> Prepared:
        layers = client_layers(adapters)
        return PreparedLayers(list(layers), lambda name: self.merge_layer(layers[name], weights), {}, self.name)

    def merge_weight(self, name: str, models: Sequence[Source], weights: Sequence[float]) -> Update:
        return self.merge_layer([model.layers[name] for model in models], weights)

    @abstractmethod
    def merge_layer(self, layers: Sequence[Update], weights: Sequence[float]) -> Update:
        """One layer's update, in factor form or dense, from every client's ΔW and its share of the whole."""


class SparseLayerwiseMethod(MergeMethod):
    """Merges every layer on its own from all clients' updates at a sparsity, which each ``apply`` may choose."""

    merges_weights = True

    sparsity: float

    def prepare(
        self, adapters: Sequence[Adapter], weights: Sequence[float], anchors: AnchorProbe | None = None
    ) -> Prepared:
        layers = client_layers(adapters)
        return SparseLayers(
            list(layers),
            lambda name, sparsity: self.merge_layer(layers[name], weights, sparsity),
            self.sparsity,
            self.name,
        )

    def merge_weight(self, name: str, models: Sequence[Source], weights: Sequence[float]) -> Update:
        return self.merge_layer([model.layers[name] for model in models], weights, self.sparsity)

    @abstractmethod
    def merge_layer(self, layers: Sequence[Update], weights: Sequence[float], sparsity: float) -> Update:
        """One layer's update, in factor form or dense, from every client's ΔW, its share of the whole, and ρ."""


def _plain(value: Any) -> Any:
    """A setting's value as a record knows it."""
    if isinstance(value, MergeMethod):
        return value.record
    return list(value) if isinstance(value, tuple) else value


def check_method(method: MergeMethod) -> None:
    """Raises InputError for a setting of a method, or of that under it, whose value is none of those that there are."""
    check_choices(method.name, method)
    if isinstance(under := getattr(method, "inner", None), MergeMethod):
        check_method(under)


def check_weights(method: MergeMethod, weights: Sequence[float], setting: str = "merge.weights") -> None:
    """Raises InputError when a method cannot give its clients these weights."""
    if not (all(abs(weight) <= MOST_WEIGHT for weight in weights) and any(weights)):
        raise InputError(f"{setting} {weights}: must be finite numbers up to {MOST_WEIGHT:g}, not all of them 0")
    if not method.uses_weights:
        raise InputError(f"{setting} {weights}: clients count alike in {method.name}; leave it out")
    if min(weights) < 0 and not method.takes_any_weights:
        raise InputError(f"{setting} {weights}: {method.name} takes none below 0; average and task_arithmetic do")


def refuse_unused(method: MergeMethod, settings: Sequence[str], given: str, group: str = "merge.method") -> None:
    """Raises InputError when a method would ignore settings that are not its defaults, as another is given."""
    for name in settings:
        if (value := getattr(method, name)) != getattr(type(method), name):
            raise InputError(f"{group}.{name} {value}: {method.name} ignores it where {given} is given; leave one out")


def required(anchors: AnchorProbe | None, method: MergeMethod) -> AnchorProbe:
    """The anchors, or an InputError that says which method cannot do without."""
    if anchors is None:
        raise InputError(f"merge.method {method.name} looks at anchors; give --anchors.root")
    return anchors
