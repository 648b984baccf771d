"""How alike the clients' adapters are after every epoch, tower by tower."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from sap_lightning.files import read_tensors
from sap_lightning.functional.agreement import mean_cosine
from sap_lightning.modules.clip_lora import tower_of

Drift = dict[str, list[tuple[int, float]]]
"""For each tower pairs of epoch and mean cosine of two clients."""


def drift_of(folders: Sequence[Path]) -> Drift:
    """Mean cosine of two clients' A and B, all of a tower in one vector, after every epoch that all of them have kept.

    The first figure of SAP's authors (pillowwwwww/Spectral-Consensus, src/analyze_similarity.py). Clients start from
    the same A and from B = 0, at a cosine of 1.

    Args:
        folders: of each client's epochs, see ``callbacks.epochs``.
    """
    kept = [{int(file.stem) for file in folder.glob("*.safetensors") if read_tensors(file)} for folder in folders]
    drift: Drift = {"vision": [], "text": []}
    for epoch in sorted(set.intersection(*kept)) if len(kept) > 1 else ():
        products = inner_products([folder / f"{epoch}.safetensors" for folder in folders])
        for tower, of in products.items():
            drift[tower].append((epoch, mean_cosine(of)))
    return {tower: points for tower, points in drift.items() if points}


def inner_products(files: Sequence[Path]) -> dict[str, Tensor]:
    """Inner products (K, K) of the clients' tensors by tower, one tensor of all clients in memory at a time."""
    products = {tower: torch.zeros(len(files), len(files), dtype=torch.float64) for tower in ("vision", "text")}
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        for key in opened[0].keys():  # noqa: SIM118  # it is no mapping
            vectors = torch.stack([file.get_tensor(key).flatten() for file in opened]).double()
            products[tower_of(key)] += vectors @ vectors.T
    return products
