"""Methods that prune: score × mask × rescale × consensus."""

from __future__ import annotations

import hashlib
import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, Literal, cast

import torch
from torch import Tensor

from sap_lightning.console import track
from sap_lightning.errors import InputError, check_share
from sap_lightning.functional.consensus import Consensus, FactorSum, WeightedSum
from sap_lightning.functional.lora import Update, times
from sap_lightning.functional.masking import RunningThreshold, Scope, keep_masks, running_thresholds
from sap_lightning.functional.rescaling import Rescale, rescaled
from sap_lightning.functional.saliency import AnchorLoss
from sap_lightning.functional.spaces import SPACES, Parameters, Space, SpaceName
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.clients import Source, layer_names, layers_named
from sap_lightning.merging.method import MergeMethod, Prepared, required
from sap_lightning.models.probe import AnchorProbe, Answer
from sap_lightning.models.scores import ScoreFile

MeanOf = Literal["delta", "factors"]
NOTHING = Answer({}, float("nan"))
"""What anchors say that were not asked."""


class PruningMethod(MergeMethod):
    """score × mask × rescale × consensus: each client's parameters are scored, and the lowest share ρ is zeroed.

    Subclasses have a ``sparsity`` and define ``scores``; one that looks at anchors does so in ``examine``, once for
    every adapter and ``question``: the anchors' probe remembers, and what it was told is on disk.

    Attributes:
        space: what is scored and masked: elements of A and B, elements of ΔW, or singular triplets of ΔW.
        scope: one threshold for a whole adapter, one for each layer, or one for each of its tensors.
        rescale: how a pruned adapter is scaled up again, see ``functional.rescaling``.
        rescale_scope: whether l1 and l2 restore the norm of each layer, of its A and its B, or of the whole adapter.
        rescale_cap: the largest factor of l1 and l2; any if not given.
        mean_of: whether the pruned ΔW are averaged, or their A and B apart, in factor space.
        loss: the anchors' loss that ``examine`` looks at.
        not_asked: names of settings that ``examine`` does not depend on.
        scores_elements: whether an element's score in delta space depends on this element alone.
        has_one_threshold: whether, where the scope is global, ``masks`` keeps what is above one threshold.
    """

    sparsity: float
    # Without annotations, which the command line's parser would look up in the modules of subclasses.
    space = cast(SpaceName, "delta")
    scope = cast(Scope, "layer")
    rescale = cast(Rescale, "none")
    rescale_scope = cast(Scope, "layer")
    rescale_cap = cast(float | None, None)
    mean_of = cast(MeanOf, "delta")
    loss = cast(AnchorLoss, "cosine")
    not_asked = frozenset({"sparsity"})
    has_masks = True
    merges_weights = True
    scores_elements = False
    has_one_threshold = True

    @property
    def needs_factors(self) -> bool:  # type: ignore[override]  # follows from the space
        return self.space == "factor"

    @property
    def needs_matrices(self) -> bool:  # type: ignore[override]
        return self.space == "singular"

    @property
    def by_element(self) -> bool:  # type: ignore[override]  # but for the threshold, which is known before
        return self.space == "delta" and self.scores_elements and self.rescale not in ("l1", "l2")

    def merge_weight(self, name: str, models: Sequence[Source], weights: Sequence[float]) -> Update:
        return self.pruning(models, weights).apply()[name]

    def pruning(
        self, adapters: Sequence[Source], weights: Sequence[float], answers: Mapping[str, Answer] | None = None
    ) -> Pruning:
        """Clients, or whole models, ready to be pruned with these answers of the anchors."""
        return Pruning(self, adapters, weights, lambda name, layer: SPACES[self.space](layer), answers or {})

    def prepare(
        self, adapters: Sequence[Adapter], weights: Sequence[float], anchors: AnchorProbe | None = None
    ) -> Pruning:
        answers = self._ask(adapters, required(anchors, self)) if self.needs_anchors else {}
        return self.pruning(adapters, weights, answers)

    def _ask(self, adapters: Sequence[Adapter], anchors: AnchorProbe) -> dict[str, Answer]:
        file = ScoreFile()

        def ask(adapter: Adapter) -> Answer:
            answer = self.examine(adapter, anchors)
            return answer._replace(of=file.keep(answer.of))

        return {
            adapter.sha256: anchors.recall(self.question, adapter.sha256, partial(ask, adapter))
            for adapter in track(adapters, f"{self.name}: scoring")
        }

    @property
    def question(self) -> str:
        """Names what ``examine`` asks: methods of one class that ask the same share the answer."""
        asked = {name: value for name, value in self.settings.items() if name not in self.not_asked}
        return f"{type(self).__module__}.{type(self).__qualname__} {asked}"

    def examine(self, adapter: Adapter, anchors: AnchorProbe) -> Answer:
        """What the anchors say of an adapter, for ``scores``; whatever the sparsity."""
        raise NotImplementedError(f"{self.name} needs anchors and must say what for")

    @abstractmethod
    def scores(self, source: Source, spaces: Mapping[str, Space], answer: Answer) -> Mapping[str, Parameters]:
        """How much each parameter matters, by layer, for at least the layers in ``spaces``.

        A layer's depend on this layer and what the anchors said alone.

        Args:
            source: whose parameters they are.
            spaces: its layers as parameters.
            answer: what ``examine`` returned of it; empty without anchors.
        """

    def masks(self, scores: Mapping[str, Parameters], sparsity: float) -> Mapping[str, Parameters]:
        """True for the parameters that stay, of the layers whose scores are given: all, where the scope is global."""
        return keep_masks(scores, sparsity, self.scope)

    def made_up(self, source: Source, pruned: Mapping[str, Update], sparsity: float) -> Mapping[str, Update]:
        """An adapter's pruned layers, scaled up to make up for what is gone."""
        if self.rescale == "none":
            return pruned
        whole = layers_named(source, pruned)
        cap = math.inf if self.rescale_cap is None else self.rescale_cap
        return rescaled(whole, pruned, self.rescale, self.rescale_scope, sparsity, cap)

    def new_consensus(self) -> Consensus:
        """How the clients' pruned updates of one layer become one."""
        return FactorSum() if self.mean_of == "factors" else WeightedSum()

    def factor(self, clients: int) -> float:
        """What the consensus of this many clients is multiplied by."""
        return 1.0

    def spaces_on(self, device: torch.device, adapter: Adapter) -> dict[str, Space]:
        """An adapter's layers as parameters where the anchors are."""
        return {name: SPACES[self.space](layer.to(device)) for name, layer in adapter.layers.items()}


@dataclass(frozen=True)
class Pruning(Prepared):
    """Clients that a method is ready to prune, rescale and merge.

    Attributes:
        method: the method.
        adapters: the clients', or whole models.
        weights: each one's share of the whole.
        space_of: a layer, by its name, as parameters.
        answers: what the anchors said of each client, by its sha256.
        findings: as for any prepared merge.
    """

    method: PruningMethod
    adapters: Sequence[Source]
    weights: Sequence[float]
    space_of: Callable[[str, Update], Space]
    answers: Mapping[str, Answer] = field(default_factory=dict, repr=False)
    findings: Mapping[str, Any] = field(default_factory=dict)

    def answer(self, source: Source) -> Answer:
        """What the anchors said of an adapter; empty where they were not asked."""
        return self.answers.get(source.sha256, NOTHING)

    def spaces(self, source: Source, names: Iterable[str] | None = None) -> dict[str, Space]:
        """A client's layers, or those of these names, as parameters."""
        return {name: self.space_of(name, layer) for name, layer in layers_named(source, names).items()}

    def kept(self, source: Source, sparsity: float | None = None) -> Mapping[str, Parameters]:
        """The masks of one client: True for the parameters that stay."""
        return self.method.masks(self.scores(source), self._sparsity(sparsity))

    def scores(self, source: Source, names: Iterable[str] | None = None) -> dict[str, Parameters]:
        """How much each parameter of a client matters, of its layers or those of these names."""
        return self._scored(source, self.spaces(source, names))

    def _scored(self, source: Source, spaces: Mapping[str, Space]) -> dict[str, Parameters]:
        scores = self.method.scores(source, spaces, self.answer(source))
        return {name: scores[name] for name in spaces}

    def pruned(self, source: Source, sparsity: float | None = None) -> dict[str, Update]:
        """One client's update, pruned but not yet rescaled."""
        spaces = self.spaces(source)
        return masked_layers(spaces, self.method.masks(self._scored(source, spaces), self._sparsity(sparsity)))

    def apply(self, sparsity: float | None = None) -> dict[str, Update]:
        method, names, share = self.method, layer_names(self.adapters), self._sparsity(sparsity)
        if method.rescale_scope == "global" or (method.scope == "global" and not method.has_one_threshold):
            clients = map(partial(self.pruned, sparsity=share), track(self.adapters, f"{method.name}: clients"))
            return self._merged(names, clients, share)
        thresholds = self._thresholds(names, share) if method.scope == "global" else None
        merged: dict[str, Update] = {}
        for name in track(names, f"{method.name}: layers"):
            merged |= self._merged([name], self._layer_of_each(name, share, thresholds), share)
        return merged

    def _thresholds(self, names: Sequence[str], sparsity: float) -> list[RunningThreshold]:
        """Each client's threshold over these layers, of which one is in memory at a time."""

        def shown(source: Source) -> Iterator[list[Iterator[Tensor]]]:
            for name in names:
                yield [chain.from_iterable(self.scores(source, [name]).values())]

        thresholds: list[RunningThreshold] = []
        for source in track(self.adapters, f"{self.method.name}: thresholds"):  # one's counts in memory at a time
            thresholds += running_thresholds(sparsity, 1, partial(shown, source))
        return thresholds

    def _layer_of_each(
        self, name: str, sparsity: float, thresholds: Sequence[RunningThreshold] | None
    ) -> Iterator[dict[str, Update]]:
        """A layer of one client after another, pruned by its threshold over all layers, if there is one."""
        for index, source in enumerate(self.adapters):
            spaces = self.spaces(source, [name])
            scores = self._scored(source, spaces)
            if thresholds is None:
                masks = self.method.masks(scores, sparsity)
            else:
                masks = {of: tuple(map(thresholds[index].keep, layer)) for of, layer in scores.items()}
            yield masked_layers(spaces, masks)

    def masked_by(self, masks: Iterable[Mapping[str, Parameters]]) -> dict[str, Update]:
        """The merge at the method's sparsity where the masks of each client are known otherwise than by its layers."""
        pruned = (masked_layers(self.spaces(source), own) for source, own in zip(self.adapters, masks, strict=True))
        return self._merged(layer_names(self.adapters), pruned)

    def _merged(
        self, names: Sequence[str], pruned: Iterable[Mapping[str, Update]], sparsity: float | None = None
    ) -> dict[str, Update]:
        """Merges these layers of all clients, pruned together, one client in memory at a time."""
        method = self.method
        merged: dict[str, Consensus] = defaultdict(method.new_consensus)
        for source, weight, layers in zip(self.adapters, self.weights, pruned, strict=True):
            for name, update in method.made_up(source, layers, self._sparsity(sparsity)).items():
                merged[name].add(update, weight)
        return times({name: merged[name].result() for name in names}, method.factor(len(self.adapters)))

    def _sparsity(self, sparsity: float | None) -> float:
        return self.method.sparsity if sparsity is None else sparsity


def masked_layers(spaces: Mapping[str, Space], masks: Mapping[str, Parameters]) -> dict[str, Update]:
    """The updates of layers with zeros where their masks are False."""
    return {name: space.update(masked(space.parameters, masks[name])) for name, space in spaces.items()}


def masked(parameters: Parameters, masks: Sequence[Tensor]) -> Parameters:
    """Parameters with zeros where their masks are False."""
    # As bytes, which torch makes numbers of six times as fast as of booleans.
    return tuple(theta * mask.view(torch.uint8) for theta, mask in zip(parameters, masks, strict=True))


def check_both_ends(sparsity: float, largest: float) -> None:
    """Raises InputError unless ``largest``, what goes at the upper end, is a part of ρ, what goes at both."""
    check_share("merge.method.sparsity", sparsity)
    check_share("merge.method.largest", largest)
    if largest > sparsity:
        raise InputError(f"merge.method.largest {largest} is a part of merge.method.sparsity, which is {sparsity}")


def uniform_scores(seed: int, source: Source, spaces: Mapping[str, Space]) -> dict[str, Parameters]:
    """A random number in [0, 1) for every parameter, drawn by the seed, the client's update and the layer alone."""
    scores = {}
    for name, space in spaces.items():
        digest = hashlib.sha256(f"{seed}\0{source.sha256}\0{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]))
        scores[name] = tuple(torch.rand(theta.shape, generator=generator) for theta in space.parameters)
    return scores
