"""The layers of all clients, read from disk one at a time, and each client's share of the whole."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch

from sap_lightning.errors import InputError
from sap_lightning.functional.lora import LoRALayer, Update
from sap_lightning.functional.reach import transfers, won_elsewhere
from sap_lightning.io.adapter import Adapter

log = logging.getLogger(__name__)
Weights = Literal["uniform", "samples", "reach"]
FAR = 20.0
"""So many times the median length, and an adapter is doubted."""


class Source(Protocol):
    """One of what is merged: its update of the base by layer, and what tells it from others; such as an `Adapter`."""

    @property
    def name(self) -> str:
        """How people call it."""

    @property
    def layers(self) -> Mapping[str, Update]:
        """ΔW by the layer's name, in factor form or dense."""

    @property
    def sha256(self) -> str:
        """A digest of what it holds."""


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


def layer_names(sources: Iterable[Source]) -> list[str]:
    """Names of the layers that some client adapts, in order."""
    return sorted({name for source in sources for name in source.layers})


def layers_named(source: Source, names: Iterable[str] | None) -> Mapping[str, Update]:
    """A client's layers of these names, as far as it has them; all of them if no names are given."""
    if names is None:
        return source.layers
    return {name: source.layers[name] for name in names if name in source.layers}


def client_weights(
    adapters: Sequence[Adapter], weights: Weights = "uniform", max_share: float | None = None
) -> list[float]:
    """Each adapter's share of the whole; they sum to 1.

    Args:
        adapters: one for each client.
        weights: clients count alike, by their number of training images, or by how far their adapters reach.
        max_share: the most that a client may count; the others share what is above that.

    Raises:
        InputError: when an upload does not say the number or the reach that is needed, or no client could have a share.
    """
    most = 1.0 if max_share is None else max_share
    if weights == "uniform":
        return bounded_shares([1] * len(adapters), most)
    if weights == "reach":
        return _shares_by_reach(adapters, most)
    samples = [adapter.num_samples for adapter in adapters]
    for adapter, count in zip(adapters, samples, strict=True):
        if not count:
            raise InputError(
                f"merge.weights samples: upload {adapter.name!r} has no manifest that says its number of"
                " samples; use --merge.weights uniform"
            )
    shares = bounded_shares([count for count in samples if count], most)
    log.info("clients count by their images: %s", _shares_in_words(adapters, shares))
    return shares


def say_how_far(adapters: Sequence[Adapter]) -> bool:
    """Whether the manifest of every client says how far its adapter reaches."""
    return all(one.manifest and one.manifest.reach for one in adapters)


def _shares_by_reach(adapters: Sequence[Adapter], most: float) -> list[float]:
    """Shares in proportion to what each wins elsewhere, where what they learned holds in every style; else alike."""
    reaches = []
    for adapter in adapters:
        if not (adapter.manifest and adapter.manifest.reach):
            raise InputError(
                f"merge.weights reach: upload {adapter.name!r} has no manifest that says how far its adapter reaches;"
                " use --merge.weights uniform"
            )
        reaches.append(adapter.manifest.reach)
    won = [won_elsewhere(reach) for reach in reaches]
    if not (transfers(reaches) and any(won)):
        log.info("clients count alike, as what they learned is next to nothing, or does not hold in every style")
        return client_weights(adapters, "uniform", most)
    shares = bounded_shares(won, most)
    log.info("clients count by what they win elsewhere: %s", _shares_in_words(adapters, shares))
    return shares


def _shares_in_words(adapters: Sequence[Adapter], shares: Sequence[float]) -> str:
    return ", ".join(f"{adapter.name} {share:.3f}" for adapter, share in zip(adapters, shares, strict=True))


def bounded_shares(counts: Sequence[float], most: float) -> list[float]:
    """Shares of a whole in proportion to counts, none above ``most``, as far as the others can take what is above it.

    Args:
        counts: 0 or more, not all of them 0.
        most: a share.

    Raises:
        InputError: when so many shares, of at most so much, do not make a whole.
    """
    if most * len(counts) < 1:
        raise InputError(
            f"merge.max_share {most:g}: {len(counts)} clients of at most that make no whole; give at least"
            f" {1 / len(counts):.3g}"
        )
    bounded: set[int] = set()
    while True:
        rest = {index: count for index, count in enumerate(counts) if index not in bounded}
        left = 1 - most * len(bounded)
        if not any(rest.values()):
            rest = dict.fromkeys(rest, 1)
        shares = [left * rest[index] / sum(rest.values()) if index in rest else most for index in range(len(counts))]
        if not (above := {index for index in rest if shares[index] > most}):
            return shares
        bounded |= above


def doubts_about(adapters: Sequence[Adapter]) -> list[str]:
    """What speaks against some of these adapters, in words: a merge of them is made, but may not be what was meant."""
    doubts = [f"upload {adapter.name!r}: {doubt}" for adapter in adapters for doubt in adapter.doubts]
    typical = statistics.median_low(adapter.length for adapter in adapters)
    for adapter in adapters:
        if adapter.length == 0:
            doubts.append(f"upload {adapter.name!r}: its ΔW is zero; it was not trained")
        elif typical and adapter.length > FAR * typical:
            times = adapter.length / typical
            doubts.append(f"upload {adapter.name!r}: its ΔW is {times:.0f} times as long as the median")
    bases = {adapter.base: adapter.name for adapter in reversed(adapters) if adapter.base}
    if len(bases) > 1:
        said = ", ".join(f"{client!r} on {base}" for base, client in sorted(bases.items()))
        doubts.append(f"uploads say that they were trained on different bases: {said}")
    seeds = {one.manifest.seed: one.name for one in reversed(adapters) if one.manifest and one.kind == "prompt"}
    if len(seeds) > 1:
        said = ", ".join(f"{client!r} from {seed}" for seed, client in sorted(seeds.items()))
        doubts.append(
            f"prompts say that they were trained from different seeds: {said}; if their contexts started apart, an"
            " average of them mixes what does not belong together"
        )
    return doubts
