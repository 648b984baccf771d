"""What a merge did to every layer, as a table: how the clients agree and what is left of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from rich.table import Table

from sap_lightning.console import track
from sap_lightning.escapes import for_terminal
from sap_lightning.functional.lora import LoRALayer, Update, dense
from sap_lightning.functional.rescaling import norm
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.clients import ClientLayers


class LayerReport(NamedTuple):
    """One layer of K clients before and after the merge.

    Attributes:
        energy_kept: ‖ΔW‖² of the merge over the weighted mean of the clients' ‖ΔW_k‖²; 1 for identical clients that
            merge to themselves.
        sign_agreement: mean over elements of |Σ sign ΔW_k| over the number of clients that change the element; 1 when
            all agree.
        cosine: mean cosine between two clients' ΔW; 0 with fewer than two.
        share_kept: elements that the merge changes over elements that any client changes.
    """

    energy_kept: float
    sign_agreement: float
    cosine: float
    share_kept: float


def layer_report(layers: Sequence[LoRALayer], weights: Sequence[float], merged: Update) -> LayerReport:
    """Compares the clients' updates of one layer and their merge, one client in memory at a time."""
    signs, changed, directions = (torch.zeros(*dense(merged).shape) for _ in range(3))
    energy, clients = 0.0, 0
    for layer, weight in zip(layers, weights, strict=True):
        delta, length = layer.delta(), norm(layer, 2)
        signs += delta.sign()
        changed += delta != 0
        energy += weight * length**2
        if length:
            directions += delta / length
            clients += 1
    anywhere = changed > 0
    pairs = clients * (clients - 1)
    return LayerReport(
        energy_kept=norm(merged, 2) ** 2 / energy if energy else 0.0,
        sign_agreement=float((signs.abs() / changed)[anywhere].mean()) if anywhere.any() else 0.0,
        cosine=(norm(directions, 2) ** 2 - clients) / pairs if pairs else 0.0,
        share_kept=float((dense(merged) != 0).sum() / anywhere.sum()) if anywhere.any() else 0.0,
    )


def report_table(adapters: Sequence[Adapter], weights: Sequence[float], update: Mapping[str, Update]) -> Table:
    """A row for every layer of the merge."""
    prefix = os.path.commonpath([name.replace(".", "/") for name in update]).replace("/", ".")
    table = Table(title="what the merge kept")
    table.add_column(for_terminal(f"layer of {prefix}" if prefix else "layer"))
    for column in LayerReport._fields:
        table.add_column(column.replace("_", " "), justify="right")
    for name, merged in track(list(update.items()), "report: layers"):
        row = layer_report(ClientLayers(adapters, name), weights, merged)
        table.add_row(for_terminal(name.removeprefix(f"{prefix}.")), *(f"{value:.3f}" for value in row))
    return table
