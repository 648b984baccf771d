"""Core space merging: any method on the clients' small cores (Panariello et al., NeurIPS 2025, arXiv:2509.17786).

Reference code: apanariello4/core-space-merging, task_merger.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from sap_lightning.console import track
from sap_lightning.errors import InputError
from sap_lightning.functional.lora import LoRALayer, Update, left_singular_vectors
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.clients import client_layers
from sap_lightning.merging.method import MergeMethod, Prepared
from sap_lightning.merging.on_top import Changed, OnTop
from sap_lightning.models.probe import AnchorProbe


@dataclass(frozen=True)
class CoreSpace(OnTop):
    """U·M·V from the cores M_k = Uᵀ·ΔW_k·Vᵀ that another method merges to M, layer by layer.

    U are the left singular vectors of [B_1 … B_K] and V the right ones of [A_1; …; A_K], so U·M_k·V = ΔW_k exactly and
    a core has at most Σ r_k rows and columns. Methods that are linear in ΔW (``average``, ``task_arithmetic``) or look
    at singular triplets (``iso_c``; ``tsv_m`` where it cuts none off) give the same as without it; those that look at
    elements, as TIES and DARE do, see what the clients share in one place.

    Where we deviate: directions in which no client has anything, which the reference code fills up with arbitrary ones
    where the stacked factors lack rank, are left out; a sparsity counts no elements that are zero for everybody. Each
    singular vector's largest element is positive, so that signs do not depend on the machine. The reference code trims
    TIES for each layer alone: that is ``ties`` with variant ``mergekit``. It also makes cores isotropic on request,
    which is none of this.

    Args:
        method: a method, or the name of one at its default settings; not one that looks at anchors, which can be shown
            to models and not to cores.

    Raises:
        InputError: for a method that looks at anchors.
    """

    name = "core_space"
    has_masks = False  # what is pruned are elements of cores, and not of adapters

    method: MergeMethod | str = "ties"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.needs_anchors:
            raise InputError(
                f"merge.method core_space: {self.inner.name} looks at anchors, which can be shown to a model and not to"
                " its cores; name a method that needs none, such as --merge.method.method ties"
            )

    def prepare(
        self, adapters: Sequence[Adapter], weights: Sequence[float], anchors: AnchorProbe | None = None
    ) -> Prepared:
        layers = client_layers(adapters)
        bases = {name: shared_bases(layers[name]) for name in track(list(layers), f"{self.name}: bases")}
        cores = [replace(adapter, layers=CoreLayers(adapter.layers, bases)) for adapter in adapters]
        prepared = self.inner.prepare(cores, weights)
        return Changed(prepared, lambda update: {name: bases[name].out(core) for name, core in update.items()})


class Bases(NamedTuple):
    """What the clients' updates of one layer have in common.

    Attributes:
        U: an orthonormal basis of all columns, shape (d_out, p).
        V: an orthonormal basis of all rows, shape (q, d_in).
    """

    U: Tensor
    V: Tensor

    def into(self, layer: LoRALayer) -> LoRALayer:
        """A client's core M_k, shape (p, q), with its own rank and scale."""
        return layer._replace(A=layer.A @ self.V.T, B=self.U.T @ layer.B)

    def out(self, core: Update) -> LoRALayer:
        """U·M·V in factor form of the least rank."""
        if isinstance(core, LoRALayer):
            return core._replace(A=core.A @ self.V, B=self.U @ core.B)
        p, q = core.shape
        return LoRALayer(core @ self.V, self.U) if p <= q else LoRALayer(self.V, self.U @ core)


class CoreLayers(Mapping[str, LoRALayer]):
    """An adapter's layers as cores, read when they are looked at."""

    def __init__(self, layers: Mapping[str, LoRALayer], bases: Mapping[str, Bases]) -> None:
        self.layers = layers
        self.bases = bases

    def __getitem__(self, name: str) -> LoRALayer:
        return self.bases[name].into(self.layers[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


def shared_bases(layers: Iterable[LoRALayer]) -> Bases:
    """The bases of all clients' factors of one layer."""
    U = oriented_basis(*left_singular_vectors(layer.B for layer in layers))
    V = oriented_basis(*left_singular_vectors(layer.A.T for layer in layers)).T
    return Bases(U.float(), V.float())


def oriented_basis(U: Tensor, sigma: Tensor) -> Tensor:
    """The singular vectors U (d, k) of σ (k,) above rounding, but at least one; each one's largest element positive."""
    rank = int((sigma > len(U) * torch.finfo(U.dtype).eps * sigma.max()).sum())
    U = U[:, : max(1, rank)]
    return U * U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
