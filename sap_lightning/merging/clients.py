"""The layers of all clients, read from disk one at a time, and each client's share of the whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch

from sap_lightning.errors import InputError
from sap_lightning.functional.lora import LoRALayer
from sap_lightning.io.adapter import Adapter

Weights = Literal["uniform", "samples"]


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


def layers_named(adapter: Adapter, names: Iterable[str] | None) -> Mapping[str, LoRALayer]:
    """An adapter's layers of these names, as far as it has them; all of them if no names are given."""
    if names is None:
        return adapter.layers
    return {name: adapter.layers[name] for name in names if name in adapter.layers}


def client_weights(adapters: Sequence[Adapter], weights: Weights = "uniform") -> list[float]:
    """Each adapter's share of the whole; they sum to 1.

    Args:
        adapters: one for each client.
        weights: clients count alike, or by their number of training images.

    Raises:
        InputError: when sample counts are needed and an upload does not say its own.
    """
    if weights == "uniform":
        return [1 / len(adapters)] * len(adapters)
    samples = [adapter.num_samples for adapter in adapters]
    for adapter, count in zip(adapters, samples, strict=True):
        if not count:
            raise InputError(
                f"merge.weights samples: upload {adapter.name!r} has no manifest that says its number of"
                " samples; use --merge.weights uniform"
            )
    return [count / sum(filter(None, samples)) for count in samples if count]
