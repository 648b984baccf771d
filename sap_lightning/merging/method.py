"""What a merge method is: K adapters → one update of the base, in two phases.

``prepare`` does what does not depend on the sparsity, ``apply`` is cheap, so a sweep over sparsities prepares once.
A method of one's own subclasses :class:`LayerwiseMethod` (a function of one layer of every client),
:class:`PruningMethod` (a score) or :class:`MergeMethod` (anything), and is named to the command line by class_path.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import sys
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from sap_lightning.adapter import Adapter
from sap_lightning.errors import InputError
from sap_lightning.functional.consensus import Consensus, WeightedSum
from sap_lightning.functional.lora import LoRALayer, Update
from sap_lightning.functional.masking import Scope, keep_masks
from sap_lightning.functional.rescaling import Rescale, rescaled
from sap_lightning.functional.spaces import SPACES, Parameters, Space, SpaceName
from sap_lightning.probe import AnchorProbe
from sap_lightning.terminal import track


class MergeMethod(ABC):
    """K adapters → one update of the base.

    Attributes:
        name: what tables and the command line call it; the class's name if not given.
        needs_anchors: whether ``prepare`` looks at the server's anchors.
        sparsity: ρ, the share of parameters set to zero; None where nothing is pruned.
    """

    name: ClassVar[str]
    needs_anchors: ClassVar[bool] = False
    sparsity: float | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            cls.name = cls.__name__

    @abstractmethod
    def prepare(
        self, adapters: Sequence[Adapter], weights: Sequence[float], anchors: AnchorProbe | None = None
    ) -> None:
        """Takes the adapters, in an order that depends on their content only, and each one's share of the whole.

        Raises:
            InputError: when these adapters, or no anchors, are not enough for the method.
        """

    @abstractmethod
    def apply(self, sparsity: float | None = None) -> dict[str, Update]:
        """The merged update by layer; for methods that prune, at another sparsity than their own if one is given."""

    def merge(
        self, adapters: Sequence[Adapter], weights: Sequence[float] | None = None, anchors: AnchorProbe | None = None
    ) -> dict[str, Update]:
        """Both phases at once; clients count alike if there are no weights."""
        self.prepare(adapters, weights or [1 / len(adapters)] * len(adapters), anchors)
        return self.apply()

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
        return {name: getattr(self, name) for name in names}

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

    @property
    def findings(self) -> dict[str, Any]:
        """What the method found out and decided while it prepared, for the merge's record."""
        return {}


class LayerwiseMethod(MergeMethod):
    """Merges every layer on its own from the clients' factors, read from disk when they are looked at."""

    def prepare(
        self, adapters: Sequence[Adapter], weights: Sequence[float], anchors: AnchorProbe | None = None
    ) -> None:
        self.adapters = adapters
        self.weights = list(weights)

    def apply(self, sparsity: float | None = None) -> dict[str, Update]:
        layers = list(client_layers(self.adapters).items())
        return {
            name: self.merge_layer(clients, self.weights) for name, clients in track(layers, f"{self.name}: layers")
        }

    @abstractmethod
    def merge_layer(self, layers: Sequence[LoRALayer], weights: Sequence[float]) -> Update:
        """One layer's update, in factor form or dense, from every client's ΔW and its share of the whole."""


class PruningMethod(MergeMethod):
    """score × mask × rescale × consensus: each client's parameters are scored, and the lowest share ρ is zeroed.

    Subclasses set ``sparsity`` and define ``scores``; one that looks at anchors does so in ``examine``, once for every
    adapter for as long as the method lives. What it keeps of them takes memory that grows with K.

    Attributes:
        space: what is scored and masked: elements of A and B, elements of ΔW, or singular triplets of ΔW.
        scope: one threshold for a whole adapter, or one for each layer.
        rescale: how a pruned adapter is scaled up again, see ``functional.rescaling``.
        rescale_scope: whether l1 and l2 restore the norm of each layer or of the whole adapter.
    """

    sparsity: float
    space: SpaceName = "delta"
    scope: Scope = "layer"
    rescale: Rescale = "none"
    rescale_scope: Scope = "layer"

    def prepare(
        self, adapters: Sequence[Adapter], weights: Sequence[float], anchors: AnchorProbe | None = None
    ) -> None:
        self.adapters = adapters
        self.weights = list(weights)
        if self.needs_anchors:
            probe = required(anchors, self)
            self._asked = probe.fingerprint
            new = [adapter for adapter in adapters if (self._asked, adapter.sha256) not in self.answers]
            for adapter in track(new, f"{self.name}: scoring"):
                self.answers[self._asked, adapter.sha256] = self.examine(adapter, probe)

    @cached_property
    def answers(self) -> dict[tuple[str, str], dict[str, Parameters]]:
        """What ``examine`` found, by the fingerprint of the anchors and the sha256 of the adapter."""
        return {}

    def evidence(self, adapter: Adapter) -> dict[str, Parameters]:
        """What the anchors said of an adapter."""
        return self.answers[self._asked, adapter.sha256]

    def examine(self, adapter: Adapter, anchors: AnchorProbe) -> dict[str, Parameters]:
        """What the anchors say of an adapter, for ``scores``."""
        raise NotImplementedError(f"{self.name} needs anchors and must say what for")

    @abstractmethod
    def scores(self, adapter: Adapter, spaces: Mapping[str, Space]) -> Mapping[str, Parameters]:
        """How much each parameter matters, by layer, for at least the layers in ``spaces``.

        With scope ``layer`` these are one layer at a time, else all layers of the adapter.
        """

    def masks(self, scores: Mapping[str, Parameters], sparsity: float) -> Mapping[str, Parameters]:
        """True for the parameters that stay, of the layers whose scores are given (one, or all: see ``scores``)."""
        return keep_masks(scores, sparsity, self.scope)

    def consensus(self) -> Consensus:
        """How the clients' pruned updates of one layer become one."""
        return WeightedSum()

    def spaces(
        self, adapter: Adapter, names: Iterable[str] | None = None, device: torch.device | str = "cpu"
    ) -> dict[str, Space]:
        """An adapter's layers, or those of these names, as parameters."""
        return {name: self.space_of(name, layer.to(device)) for name, layer in _layers(adapter, names).items()}

    def space_of(self, name: str, layer: LoRALayer) -> Space:
        """One layer as parameters."""
        return SPACES[self.space](layer)

    def kept(self, adapter: Adapter, sparsity: float) -> Mapping[str, Parameters]:
        """The masks of one adapter."""
        return self.masks(self.scores(adapter, self.spaces(adapter)), sparsity)

    def pruned(self, adapter: Adapter, sparsity: float, names: Iterable[str] | None = None) -> dict[str, Update]:
        """One adapter, or its layers of these names, pruned but not yet rescaled."""
        spaces = self.spaces(adapter, names)
        scores = self.scores(adapter, spaces)
        masks = self.masks({name: scores[name] for name in spaces}, sparsity)
        return {name: space.update(_masked(space.parameters, masks[name])) for name, space in spaces.items()}

    def apply(self, sparsity: float | None = None) -> dict[str, Update]:
        sparsity = self.sparsity if sparsity is None else sparsity
        names = layer_names(self.adapters)
        if "global" in (self.scope, self.rescale_scope):
            return self._merge_layers(names, sparsity, f"{self.name}: clients")
        merged: dict[str, Update] = {}
        for name in track(names, f"{self.name}: layers"):
            merged |= self._merge_layers([name], sparsity)
        return merged

    def _merge_layers(self, names: Sequence[str], sparsity: float, progress: str | None = None) -> dict[str, Update]:
        """Prunes these layers together and merges them, one client in memory at a time."""
        merged: dict[str, Consensus] = defaultdict(self.consensus)
        clients = list(zip(self.adapters, self.weights, strict=True))
        for adapter, weight in track(clients, progress) if progress else clients:
            pruned: Mapping[str, Update] = self.pruned(adapter, sparsity, names)
            if self.rescale != "none":
                pruned = rescaled(_layers(adapter, names), pruned, self.rescale, self.rescale_scope, sparsity)
            for name, update in pruned.items():
                merged[name].add(update, weight)
        return {name: merged[name].result() for name in names}


class ClientLayers(Sequence[LoRALayer]):
    """One layer of every client, read when it is looked at; a client that lacks the layer has ΔW = 0 of rank 0."""

    def __init__(self, adapters: Sequence[Adapter], name: str) -> None:
        self.adapters = adapters
        self.name = name
        self.shape = next(adapter.layers[name].shape for adapter in adapters if name in adapter.layers)

    def __len__(self) -> int:
        return len(self.adapters)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        layers = self.adapters[index].layers
        return layers[self.name] if self.name in layers else self._missing()

    def _missing(self) -> LoRALayer:
        d_out, d_in = self.shape
        return LoRALayer(torch.zeros(0, d_in), torch.zeros(d_out, 0))


def client_layers(adapters: Sequence[Adapter]) -> dict[str, ClientLayers]:
    """Every layer that some client adapts, by name in order, as all of them have it."""
    return {name: ClientLayers(adapters, name) for name in layer_names(adapters)}


def layer_names(adapters: Sequence[Adapter]) -> list[str]:
    """Names of the layers that some client adapts, in order."""
    return sorted({name for adapter in adapters for name in adapter.layers})


def required(anchors: AnchorProbe | None, method: MergeMethod) -> AnchorProbe:
    """The anchors, or an InputError that says which method cannot do without."""
    if anchors is None:
        raise InputError(f"merge.method {method.name} looks at anchors; give --anchors.root")
    return anchors


def check_share(name: str, value: float) -> float:
    """A number in [0, 1], or an InputError that names the setting."""
    if not 0 <= value <= 1:
        hint = f"; {value:g} % is {value / 100:g}" if 10 <= value <= 100 else ""
        raise InputError(f"{name} must lie in [0, 1], got {value}{hint}")
    return value


def check_at_least(name: str, value: float, least: float) -> None:
    """Raises an InputError that names the setting when it is below the least value."""
    if not value >= least:
        raise InputError(f"{name} must be at least {least}, got {value}")


def check_positive(name: str, value: float) -> None:
    """Raises an InputError that names the setting when it is not a finite number above 0."""
    if not 0 < value < math.inf:
        raise InputError(f"{name} must be above 0, got {value}")


def _layers(adapter: Adapter, names: Iterable[str] | None) -> Mapping[str, LoRALayer]:
    if names is None:
        return adapter.layers
    return {name: adapter.layers[name] for name in names if name in adapter.layers}


def _masked(parameters: Parameters, masks: Sequence[Tensor]) -> Parameters:
    return tuple(theta * mask for theta, mask in zip(parameters, masks, strict=True))
