"""How K updates of one layer become one, gathered client after client in memory that does not depend on K."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sap_lightning.functional.lora import LoRALayer, Update, dense, in_factors, rows, stack

Majority = Literal["total", "frequency"]

_BLOCK_ELEMENTS = 2**21


class Consensus(ABC):
    """A running merge of one layer's updates, each in factor form or dense of shape (d_out, d_in).

    Example:
        >>> import torch
        >>> from sap_lightning.functional.consensus import ElectedMean, WeightedSum
        >>> one, other = torch.tensor([[4.0, 1.0]]), torch.tensor([[-2.0, 3.0]])
        >>> for consensus in (WeightedSum(), ElectedMean()):
        ...     consensus.add(one, weight=0.5)
        ...     consensus.add(other, weight=0.5)
        ...     print(consensus.result().tolist())
        [[1.0, 2.0]]
        [[4.0, 2.0]]
    """

    @abstractmethod
    def add(self, update: Update, weight: float) -> None:
        """Takes one client's update into account."""

    @abstractmethod
    def result(self) -> Update:
        """The merge of what was added."""


class WeightedSum(Consensus):
    """Σ w_k·ΔW_k, stacked in factor form while that takes no more memory than the dense sum, else dense.

    That is while (Σ r_k)·(d_out + d_in) ≤ d_out·d_in and every update is in factor form.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.consensus import WeightedSum
        >>> from sap_lightning.functional.lora import LoRALayer
        >>> layer = LoRALayer(A=torch.ones(1, 4), B=torch.ones(4, 1))
        >>> total = WeightedSum()
        >>> for _ in range(3):
        ...     total.add(layer, weight=0.5)
        ...     print(type(total.result()).__name__)
        LoRALayer
        LoRALayer
        Tensor
        >>> total.result()[0].tolist()  # the first of four equal rows
        [1.5, 1.5, 1.5, 1.5]
    """

    def __init__(self) -> None:
        self.factors: list[LoRALayer] = []
        self.total: Tensor | None = None

    def add(self, update: Update, weight: float) -> None:
        if self.total is None and isinstance(update, LoRALayer) and self._fits(update):
            self.factors.append(update._replace(scale=weight * update.scale))
        elif self.total is None:
            self.total = weight * dense(update)
            for layer in self.factors:
                self._add_to_total(layer, 1.0)
        else:
            self._add_to_total(update, weight)

    def _fits(self, layer: LoRALayer) -> bool:
        d_out, d_in = layer.shape
        return (sum(one.rank for one in self.factors) + layer.rank) * (d_out + d_in) <= d_out * d_in

    def _add_to_total(self, update: Update, weight: float) -> None:
        assert self.total is not None
        if isinstance(update, LoRALayer):
            self.total.addmm_(update.B, update.A, alpha=weight * update.scale)
        else:
            self.total.add_(update, alpha=weight)

    def result(self) -> Update:
        if self.total is not None:
            return self.total
        if not self.factors:
            raise ValueError("nothing was added")
        return self.factors[0] if len(self.factors) == 1 else stack(self.factors, [1.0] * len(self.factors))


class FactorSum(Consensus):
    """(Σ w_k·B_k)·(Σ w_k·A_k): A and B summed apart, so it has cross terms B_j·A_k that the sum of the ΔW_k has not.

    Each client's scale goes into both factors by its root (`balanced_factors`); factors of lower rank are padded with
    zeros, as in HetLoRA (Cho et al. 2024, arXiv:2401.06432). Updates must be in factor form.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.consensus import FactorSum
        >>> from sap_lightning.functional.lora import LoRALayer
        >>> one = LoRALayer(A=torch.tensor([[2.0, 0.0]]), B=torch.tensor([[4.0]]))
        >>> other = LoRALayer(A=torch.tensor([[0.0, 6.0]]), B=torch.tensor([[2.0]]))
        >>> mean = FactorSum()
        >>> mean.add(one, weight=0.5)
        >>> mean.add(other, weight=0.5)
        >>> mean.result().A.tolist(), mean.result().B.tolist()
        ([[1.0, 3.0]], [[3.0]])
    """

    def __init__(self) -> None:
        self.A = self.B = torch.zeros(0, 0)

    def add(self, update: Update, weight: float) -> None:
        A, B = balanced_factors(in_factors(update))
        self.A, self.B = padded_sum(self.A, weight * A), padded_sum(self.B, weight * B)

    def result(self) -> LoRALayer:
        return LoRALayer(self.A, self.B)


class ElectedMean(Consensus):
    """TIES: each element takes the sign of the larger mass, and the mean of the updates of that sign.

    Yadav et al. 2023, arXiv:2306.01708. An element whose masses cancel exactly counts as positive, as in PEFT and
    mergekit (the authors give it the sign that most elements have). The result is dense, shape (d_out, d_in).

    Args:
        majority: the mass of a sign is the sum of its updates (total) or their number (frequency).
        by_count: elect before weighting and divide by the number of updates that agree, as PEFT does; else elect after
            weighting and divide by their weights, as mergekit does. The same for weights that are all 1.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.consensus import ElectedMean
        >>> updates = torch.tensor([[5.0, 1.0]]), torch.tensor([[-1.0, 3.0]]), torch.tensor([[-1.0, 0.0]])
        >>> for majority in ("total", "frequency"):
        ...     elected = ElectedMean(majority)
        ...     for update in updates:
        ...         elected.add(update, weight=1.0)
        ...     print(elected.result().tolist())  # 5 outweighs -1 and -1, but they are two
        [[5.0, 2.0]]
        [[-1.0, 2.0]]
    """

    def __init__(self, majority: Majority = "total", by_count: bool = False) -> None:
        self.majority = majority
        self.by_count = by_count
        self.votes: Tensor | None = None

    def add(self, update: Update, weight: float, vote: float | None = None) -> None:
        """Takes one client's update into account.

        Args:
            update: in factor form, or dense of shape (d_out, d_in).
            weight: in the mean.
            vote: in the election by ``total``; if not given, 1 by count, else the weight.
        """
        delta = dense(update)
        if self.votes is None:
            self.votes = torch.zeros_like(delta)
            self.sums = [torch.zeros_like(delta) for _ in range(2)]
            self.support = [torch.zeros_like(delta) for _ in range(2)]
        if self.majority == "total":
            self.votes.add_(delta, alpha=(1.0 if self.by_count else weight) if vote is None else vote)
        else:
            self.votes += delta.sign()
        for side, part in enumerate((delta.clamp(min=0), delta.clamp(max=0))):
            self.sums[side].add_(part, alpha=weight)
            self.support[side].add_(part != 0, alpha=1.0 if self.by_count else weight)

    def result(self) -> Tensor:
        if self.votes is None:
            raise ValueError("nothing was added")
        positive = self.votes >= 0
        elected = torch.where(positive, self.sums[0], self.sums[1])
        support = torch.where(positive, self.support[0], self.support[1])
        return torch.where(support > 0, elected / support, 0)


class MedianOf(Consensus):
    """The median at every element, whatever the weights; all updates are in memory until there is a result.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.consensus import MedianOf
        >>> middle = MedianOf()
        >>> for value in (1.0, 100.0, 2.0):
        ...     middle.add(torch.tensor([[value]]), weight=1 / 3)
        >>> middle.result().tolist()
        [[2.0]]
    """

    def __init__(self) -> None:
        self.updates: list[Tensor] = []

    def add(self, update: Update, weight: float) -> None:
        self.updates.append(dense(update))

    def result(self) -> Tensor:
        return median(torch.stack(self.updates))


def weighted_sum(updates: Iterable[Update], weights: Iterable[float]) -> Update:
    """Σ w_k·ΔW_k of one layer; updates are looked at one at a time.

    Args:
        updates: the K updates ΔW_k, in factor form or dense of shape (d_out, d_in).
        weights: the K weights w_k.

    Returns:
        In factor form or dense, as `WeightedSum` has it.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.consensus import weighted_sum
        >>> weighted_sum([torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 8.0]])], [0.75, 0.25]).tolist()
        [[3.0, 2.0]]
    """
    total = WeightedSum()
    for update, weight in zip(updates, weights, strict=True):
        total.add(update, weight)
    return total.result()


def coordinatewise(merge: Callable[[Tensor], Tensor], layers: Iterable[Update]) -> Tensor:
    """A function of K values at every element of ΔW, shape (d_out, d_in), from blocks of rows of bounded size.

    Args:
        merge: from (K, rows, d_in) to (rows, d_in).
        layers: the K updates of one layer, in factor form or dense.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.consensus import coordinatewise, median
        >>> from sap_lightning.functional.lora import LoRALayer
        >>> layers = [LoRALayer(A=torch.tensor([[a, 1.0]]), B=torch.ones(1, 1)) for a in (2.0, 3.0, 100.0)]
        >>> coordinatewise(median, layers).tolist()  # of [[2, 1]], [[3, 1]] and [[100, 1]]
        [[3.0, 1.0]]
    """
    clients = list(layers)
    d_out, d_in = clients[0].shape
    height = max(1, _BLOCK_ELEMENTS // (len(clients) * d_in))
    blocks = (
        torch.stack([rows(client, start, start + height) for client in clients]) for start in range(0, d_out, height)
    )
    return torch.cat([merge(block) for block in blocks])


def median(stacked: Tensor) -> Tensor:
    """Median over the first dimension of (K, ...), shape (...); of an even K the mean of the two middle values.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.consensus import median
        >>> median(torch.tensor([[1.0, 5.0], [100.0, 6.0], [2.0, 7.0], [4.0, 8.0]])).tolist()
        [3.0, 6.5]
    """
    ordered = _ordered(stacked)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def trimmed_mean(stacked: Tensor, trim: float) -> Tensor:
    """Mean over the first dimension of (K, ...) without the ⌊trim·K⌋ smallest and as many largest, shape (...).

    Args:
        stacked: shape (K, ...).
        trim: in [0, 0.5).

    Example:
        >>> import torch
        >>> from sap_lightning.functional.consensus import trimmed_mean
        >>> trimmed_mean(torch.tensor([[-100.0], [1.0], [5.0], [70.0]]), trim=0.25).tolist()  # the mean of 1 and 5
        [3.0]
    """
    cut = int(trim * len(stacked))
    return _ordered(stacked)[cut : len(stacked) - cut].mean(0)


def _ordered(stacked: Tensor) -> Tensor:
    # On a CPU numpy sorts small columns ten times as fast as torch.
    return torch.from_numpy(np.sort(stacked.cpu().numpy(), axis=0))


def balanced_factors(layer: LoRALayer) -> tuple[Tensor, Tensor]:
    """A' = sign(s)·√|s|·A and B' = √|s|·B with B'·A' = ΔW, the scale s shared as in PEFT's ``linear``.

    Returns:
        A' (r, d_in) and B' (d_out, r).

    Example:
        >>> import torch
        >>> from sap_lightning.functional.consensus import balanced_factors
        >>> from sap_lightning.functional.lora import LoRALayer
        >>> layer = LoRALayer(A=torch.tensor([[1.0, 2.0]]), B=torch.tensor([[3.0]]), scale=-4.0)
        >>> A, B = balanced_factors(layer)
        >>> A.tolist(), B.tolist()
        ([[-2.0, -4.0]], [[6.0]])
        >>> (B @ A).tolist() == layer.delta().tolist()
        True
    """
    root = math.sqrt(abs(layer.scale))
    return math.copysign(root, layer.scale) * layer.A, root * layer.B


def padded_sum(total: Tensor, term: Tensor) -> Tensor:
    """The sum of two matrices, each padded with rows and columns of zeros to the other's size.

    Args:
        total: shape (m, n).
        term: shape (p, q).

    Returns:
        Shape (max(m, p), max(n, q)), of the dtype of `term`.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.consensus import padded_sum
        >>> padded_sum(torch.tensor([[1.0, 2.0]]), torch.tensor([[10.0], [20.0]])).tolist()
        [[11.0, 2.0], [20.0, 0.0]]
    """
    result = term.new_zeros([max(sizes) for sizes in zip(total.shape, term.shape, strict=True)])
    for part in (total, term):
        result[: part.shape[0], : part.shape[1]] += part
    return result
