"""What a round's uploads become before the next one: LoRA is brought back down to its rank, a prompt is one already."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

from sap_lightning.functional.lora import LoRALayer, Update, dense, stack
from sap_lightning.functional.rounds import added, brought_down, corrected_mean, mean_factors, mean_residual
from sap_lightning.io.adapter import Adapter, sha256_of
from sap_lightning.io.context import as_layer
from sap_lightning.io.factors import Factors

Layers = dict[str, LoRALayer]


class Next(NamedTuple):
    """What one layer of the next round starts from.

    Attributes:
        start: the adapter's factors; drawn anew if there are none.
        folded: what is added to the base before.
    """

    start: LoRALayer | None = None
    folded: LoRALayer | None = None


class Aggregation(ABC):
    """K uploads of a round → what the next one starts from, layer by layer.

    Attributes:
        trained: which of A and B the clients train.
        sent: which of them cross the wire, up and down.
        takes_methods: whether a merge method decides what is brought down; else the clients are averaged.
        takes_ranks: whether clients may be of different ranks.
        folds: whether the base changes from round to round.
        keeps_factors: whether A and B stay near the clients' own, so that what an optimizer has gathered of them still
            holds.
    """

    trained: Factors = "AB"
    sent: Factors = "AB"
    takes_methods = False
    takes_ranks = False
    folds = False
    keeps_factors = True

    def sent_in(self, last_round: bool) -> Factors:
        """Which factors clients send in a round."""
        return self.sent

    @abstractmethod
    def layer(self, layers: Sequence[LoRALayer], weights: Sequence[float], merged: Update | None, rank: int) -> Next:
        """What one layer starts from.

        Args:
            layers: the clients' own.
            weights: each one's share of the whole.
            merged: their merge; nothing of clients that do not send both factors.
            rank: the largest that a client trains.
        """


class FedIT(Aggregation):
    """A and B averaged apart: Zhang et al. 2023, arXiv:2305.05644.

    Reference code: JayZhang42/FederatedGPT-Shepherd, fed_utils/model_aggregation.py.
    """

    def layer(self, layers: Sequence[LoRALayer], weights: Sequence[float], merged: Update | None, rank: int) -> Next:
        return Next(mean_factors(layers, weights))


class FlexLoRA(Aggregation):
    """The merge of the ΔW, cut to its largest singular values: Bai et al. 2024, arXiv:2402.11505.

    A client of lower rank takes the first of them. Theirs is the average; here it may be any merge.
    """

    takes_methods = True
    takes_ranks = True
    keeps_factors = False

    def layer(self, layers: Sequence[LoRALayer], weights: Sequence[float], merged: Update | None, rank: int) -> Next:
        assert merged is not None
        return Next(brought_down(merged, rank))


class FLoRA(Aggregation):
    """The exact mean of the ΔW is added to the base, and adapters are drawn anew: Wang et al. 2024, arXiv:2409.05976.

    It goes down as what it is: the clients' A one below the other, their B side by side, of rank K·r. Reference code:
    ATP-1010/FederatedLLM, fed_utils/model_aggregation.py.
    """

    takes_ranks = True
    folds = True
    keeps_factors = False

    def layer(self, layers: Sequence[LoRALayer], weights: Sequence[float], merged: Update | None, rank: int) -> Next:
        return Next(folded=stack(layers, weights))


class FedExLoRA(Aggregation):
    """A and B averaged apart, and what that is wrong by added to the base: Singhal et al. 2024, arXiv:2410.09432.

    The mean is exact, and training goes on in the averaged factors. Reference code: RaghavSinghal10/fedex-lora,
    fed_agg.py.
    """

    folds = True

    def layer(self, layers: Sequence[LoRALayer], weights: Sequence[float], merged: Update | None, rank: int) -> Next:
        return Next(mean_factors(layers, weights), mean_residual(layers, weights))


class FFALoRA(Aggregation):
    """A stays as the common seed drew it; B alone is trained, sent and averaged: Sun et al. 2024, arXiv:2403.12313.

    So the mean is exact.
    """

    trained: Factors = "B"
    sent: Factors = "B"

    def layer(self, layers: Sequence[LoRALayer], weights: Sequence[float], merged: Update | None, rank: int) -> Next:
        return Next(mean_factors(layers, weights)._replace(A=layers[0].A))


class FedSALoRA(Aggregation):
    """A alone is sent and averaged, and every client keeps its own B: Guo et al. 2024, arXiv:2410.01463.

    So there is no model for a domain without a client. Our reading: in the last round clients send both, for a merge.
    Reference code: Pengxin-Guo/FedSA-LoRA, glue/yamls/fedsa-lora.yaml (local_param: lora_B).
    """

    sent: Factors = "A"

    def sent_in(self, last_round: bool) -> Factors:
        return "AB" if last_round else self.sent

    def layer(self, layers: Sequence[LoRALayer], weights: Sequence[float], merged: Update | None, rank: int) -> Next:
        return Next(mean_factors(layers, weights))


class LoRAFAIR(Aggregation):
    """A and B averaged apart, and B corrected toward the mean of the ΔW: Bian et al. 2024, arXiv:2411.14961."""

    def layer(self, layers: Sequence[LoRALayer], weights: Sequence[float], merged: Update | None, rank: int) -> Next:
        return Next(corrected_mean(layers, weights))


class PromptFL(Aggregation):
    """The merge of the contexts, whole: Guo et al. 2023, arXiv:2208.11625.

    Reference code: PEILab-Federated-Learning/PromptFL, federated_main.py, whose mean is the last client's prompt, as it
    keeps references to one module's tensors and never empties their list; and is of buffers of class names too.
    """

    takes_methods = True

    def layer(self, layers: Sequence[LoRALayer], weights: Sequence[float], merged: Update | None, rank: int) -> Next:
        assert merged is not None
        return Next(as_layer(dense(merged)))


Way = Literal["fedit", "flexlora", "flora", "fedex_lora", "ffa_lora", "fedsa_lora", "lora_fair"]
AGGREGATIONS: dict[Way, Aggregation] = {
    "fedit": FedIT(),
    "flexlora": FlexLoRA(),
    "flora": FLoRA(),
    "fedex_lora": FedExLoRA(),
    "ffa_lora": FFALoRA(),
    "fedsa_lora": FedSALoRA(),
    "lora_fair": LoRAFAIR(),
}


def next_start(
    aggregation: Aggregation,
    layers: Mapping[str, Sequence[LoRALayer]],
    weights: Sequence[float],
    merged: Mapping[str, Update],
    rank: int,
) -> tuple[Layers, Layers]:
    """What all layers start from, and what is added to the base before; either may be of no layer.

    Args:
        aggregation: the way.
        layers: the clients' own, by name.
        weights: as for ``Aggregation.layer``.
        merged: their merge; may be empty where clients do not send both factors.
        rank: as for ``Aggregation.layer``.
    """
    of = {name: aggregation.layer(own, weights, merged.get(name), rank) for name, own in layers.items()}
    return (
        {name: layer.start for name, layer in of.items() if layer.start},
        {name: layer.folded for name, layer in of.items() if layer.folded},
    )


def joined(one: Mapping[str, LoRALayer], other: Mapping[str, LoRALayer]) -> Layers:
    """The sum of two adapters, of which either may lack a layer."""
    return {
        name: added(one[name], other[name]) if name in one and name in other else one.get(name) or other[name]
        for name in sorted(one.keys() | other.keys())
    }


def on_the_base(adapters: Sequence[Adapter], folded: Sequence[Adapter]) -> list[Adapter]:
    """Adapters of a base to which something was added, as adapters of the base as it was."""
    if not folded:
        return list(adapters)
    total: Layers = {}
    for one in folded:
        total = joined(total, one.layers)
    whole = [(adapter, joined(total, adapter.layers)) for adapter in adapters]
    return [replace(adapter, layers=layers, sha256=sha256_of(layers)) for adapter, layers in whole]
