"""K updates of the base become one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sap_lightning.functional.lora import LoRALayer, stack
from sap_lightning.functional.spaces import Update, dense


def average(updates: Sequence[Mapping[str, Update]], weights: Sequence[float]) -> dict[str, Update]:
    """Σ w_k·ΔW_k layer by layer, in factor form where every client's update is.

    A layer that a client lacks counts as 0.

    Args:
        updates: for each client, updates by layer name.
        weights: for each client its share; they sum to 1.
    """
    names = sorted({name for client in updates for name in client})
    return {name: _average_layer(*_present(name, updates, weights)) for name in names}


def _present(
    name: str, updates: Sequence[Mapping[str, Update]], weights: Sequence[float]
) -> tuple[list[Update], list[float]]:
    pairs = [(client[name], w) for client, w in zip(updates, weights, strict=True) if name in client]
    return [update for update, _ in pairs], [w for _, w in pairs]


def _average_layer(layers: list[Update], weights: list[float]) -> Update:
    if all(isinstance(layer, LoRALayer) for layer in layers):
        return stack(layers, weights)  # type: ignore[arg-type]
    total = weights[0] * dense(layers[0])
    for layer, weight in zip(layers[1:], weights[1:], strict=True):
        total += weight * dense(layer)
    return total
