"""Which parameters stay: exactly the n lowest scores are zeroed, n = round(ρ·N)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sap_lightning.functional.spaces import Parameters

Scope = Literal["global", "layer", "tensor"]

_PIECE = 2**20


def keep_mask(scores: Tensor, sparsity: float) -> Tensor:
    """True where a score is kept, False at the round(sparsity·N) lowest; of equal scores the first go first.

    Args:
        scores: any shape, N elements, no NaN.
        sparsity: ρ in [0, 1], the share set to zero.

    Raises:
        ValueError: when ρ is outside [0, 1] or a score is NaN.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.masking import keep_mask
        >>> scores = torch.tensor([3.0, 1.0, 2.0, 1.0])
        >>> keep_mask(scores, sparsity=0.5).tolist()
        [True, False, True, False]
        >>> keep_mask(scores, sparsity=0.25).tolist()
        [True, False, True, True]
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity must lie in [0, 1], got {sparsity}")
    flat = scores.flatten()
    if len(flat) and flat.max().isnan():  # the maximum is NaN when any score is
        raise ValueError("scores contain NaN")
    drop = round(sparsity * flat.numel())
    if drop == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = smallest(flat, drop)
    keep = flat >= threshold
    if excess := int(keep.sum()) - (len(flat) - drop):
        keep[(flat == threshold).nonzero().flatten()[:excess]] = False
    return keep.view_as(scores)


def keep_highest(scores: Tensor, share: float) -> Tensor:
    """True at the highest share of the scores, but at one at least; of equal ones the last are kept.

    Args:
        scores: any shape, N elements, no NaN.
        share: in [0, 1].

    Example:
        >>> import torch
        >>> from sap_lightning.functional.masking import keep_highest
        >>> scores = torch.tensor([3.0, 1.0, 2.0])
        >>> keep_highest(scores, share=2 / 3).tolist(), keep_highest(scores, share=0.1).tolist()
        ([True, False, True], [True, False, False])
    """
    dropped = min(round((1 - share) * scores.numel()), scores.numel() - 1)
    return keep_mask(scores, dropped / scores.numel())


def smallest(values: Tensor, k: int) -> float:
    """The k-th smallest of a flat tensor.

    Args:
        values: shape (n,).
        k: from 1, the smallest, to n.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.masking import smallest
        >>> smallest(torch.tensor([30.0, 10.0, 20.0]), k=2)
        20.0
    """
    if values.device.type == "cpu":
        # Three times as quick as kthvalue.
        return float(np.partition(values.numpy(), k - 1)[k - 1])
    return float(values.kthvalue(k).values)


class RunningThreshold:
    """Which of ever so many values go, as `keep_mask` says, where they are never in memory together.

    They are shown three times, in parts of any size and in the same order: ``count`` every part, then ``refine`` with
    every part, then ask ``keep`` of each. The first two count the upper and the lower half of the values' bits.

    Args:
        sparsity: ρ in [0, 1], the share of all values that goes.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.masking import RunningThreshold
        >>> parts = torch.tensor([3.0, 1.0]), torch.tensor([2.0, 1.0, 5.0, 4.0])
        >>> threshold = RunningThreshold(sparsity=0.5)
        >>> for look in (threshold.count, threshold.refine, threshold.keep):
        ...     answers = [look(part) for part in parts]
        >>> [answer.tolist() for answer in answers]
        [[True, False], [False, False, True, True]]
    """

    def __init__(self, sparsity: float) -> None:
        self._sparsity = sparsity
        self._upper = np.zeros(2**16, np.int64)
        self._lower = np.zeros(2**16, np.int64)

    def count(self, values: Tensor) -> None:
        """Looks at a part for the first time."""
        for bits in _order_bits(values):
            self._upper += np.bincount(bits >> 16, minlength=2**16)

    def refine(self, values: Tensor) -> None:
        """Looks at a part for the second time."""
        for bits in _order_bits(values):
            self._lower += np.bincount(bits[bits >> 16 == self._half] & 0xFFFF, minlength=2**16)

    def keep(self, values: Tensor) -> Tensor:
        """True where a value of a part stays, of its shape; of equal values the first ones shown go first."""
        if not self._drop:
            return torch.ones_like(values, dtype=torch.bool)
        return torch.from_numpy(np.concatenate([self._keep(bits) for bits in _order_bits(values)])).view(values.shape)

    def settle(self) -> None:
        """Lets go of the counts, which take a MiB, when all was shown twice."""
        assert self.equal_that_go >= 0  # all that ``keep`` goes by follows from the counts with this
        self._upper = self._lower = np.zeros(0, np.int64)

    def _keep(self, bits: np.ndarray) -> np.ndarray:
        keep: np.ndarray = bits >= self._threshold
        equal = np.flatnonzero(bits == self._threshold)[: self.equal_that_go]
        keep[equal] = False
        self.equal_that_go -= len(equal)
        return keep

    @cached_property
    def equal_that_go(self) -> int:
        """How many values that equal the threshold are still to go."""
        return self._drop - self._below - int(self._lower[: self._threshold & 0xFFFF].sum())

    @cached_property
    def _drop(self) -> int:
        return round(self._sparsity * int(self._upper.sum()))

    @cached_property
    def _half(self) -> int:
        """The upper half of the bits of the last value that goes."""
        return int(np.searchsorted(self._upper.cumsum(), self._drop))

    @cached_property
    def _below(self) -> int:
        return int(self._upper[: self._half].sum())

    @cached_property
    def _threshold(self) -> int:
        return self._half << 16 | int(np.searchsorted(self._lower.cumsum(), self._drop - self._below))


def running_thresholds(
    sparsity: float, clients: int, shown: Callable[[], Iterable[Iterable[Iterable[Tensor]]]]
) -> list[RunningThreshold]:
    """Every client's threshold, ready to be asked what stays of each part.

    Args:
        sparsity: ρ in [0, 1].
        clients: how many.
        shown: goes through all parts, and gives of each the values of every client; called twice.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.masking import running_thresholds
        >>> parts = [[[torch.tensor([3.0, 1.0])]], [[torch.tensor([2.0, 4.0])]]]  # two of one client
        >>> (threshold,) = running_thresholds(0.5, clients=1, shown=lambda: parts)
        >>> [threshold.keep(values).tolist() for ((values,),) in parts]
        [[True, False], [False, True]]
    """
    thresholds = [RunningThreshold(sparsity) for _ in range(clients)]
    for look in (RunningThreshold.count, RunningThreshold.refine):
        for part in shown():
            for threshold, tensors in zip(thresholds, part, strict=True):
                for values in tensors:
                    look(threshold, values)
    for threshold in thresholds:
        threshold.settle()
    return thresholds


def _order_bits(values: Tensor) -> Iterator[np.ndarray]:
    """Whole numbers from 0 to 2³² − 1 in the order of the values, piece by piece; −0 and 0 are the same."""
    negative = np.uint32(2**31)
    for piece in values.flatten().split(_PIECE):
        bits = (piece.float() + 0.0).numpy().view(np.uint32)
        yield np.where(bits >= negative, ~bits, bits | negative)


def keep_in_rows(scores: Tensor, sparsity: float) -> Tensor:
    """True where a score is kept; every row loses its round(sparsity·d_in) lowest, of equal scores the first first.

    Args:
        scores: shape (d_out, d_in).
        sparsity: ρ in [0, 1].

    Returns:
        bool (d_out, d_in).

    Example:
        >>> import torch
        >>> from sap_lightning.functional.masking import keep_in_rows
        >>> keep_in_rows(torch.tensor([[1.0, 2.0], [40.0, 30.0]]), sparsity=0.5).tolist()
        [[False, True], [True, False]]
    """
    drop = round(sparsity * scores.shape[-1])
    lowest = scores.sort(dim=-1, stable=True).indices[:, :drop]
    return torch.ones_like(scores, dtype=torch.bool).scatter_(-1, lowest, False)


def keep_middle(scores: Tensor, sparsity: float, largest: float, rows: bool = False) -> Tensor:
    """True where a score is neither among the lowest nor among the highest; round(ρ·N) of N go altogether.

    Model Breadcrumbs' mask (Davari & Belilovsky 2024, arXiv:2312.06795). Of equal scores the first count as lower.

    Args:
        scores: shape (d_out, d_in), none negative, no NaN.
        sparsity: ρ in [0, 1], the share that goes at both ends.
        largest: the part of ρ that goes at the upper end; all of ρ where it is less.
        rows: N counts a row, each of which loses its own ends, not the matrix.

    Returns:
        bool (d_out, d_in).

    Example:
        >>> import torch
        >>> from sap_lightning.functional.masking import keep_middle
        >>> scores = torch.tensor([[1.0, 2.0, 3.0, 4.0], [8.0, 7.0, 6.0, 5.0]])
        >>> keep_middle(scores, sparsity=0.5, largest=0.25).int().tolist()
        [[0, 0, 1, 1], [0, 0, 1, 1]]
        >>> keep_middle(scores, sparsity=0.5, largest=0.25, rows=True).int().tolist()
        [[0, 1, 1, 0], [0, 1, 1, 0]]
    """
    size = scores.shape[-1] if rows else scores.numel()
    drop = round(sparsity * size)
    highest = min(round(largest * size), drop)
    if not rows:
        return keep_mask(scores, (drop - highest) / size) & ~keep_mask(scores, 1 - highest / size)
    order = _row_order(scores)
    gone = torch.cat([order[:, : drop - highest], order[:, size - highest :]], dim=1)
    return torch.ones_like(scores, dtype=torch.bool).scatter_(-1, gone, False)


def row_ranks(scores: Tensor) -> Tensor:
    """Each score's rank among those of its row, from 0, the lowest, to 1, the highest; of equal scores the first first.

    Args:
        scores: shape (d_out, d_in), none negative, no NaN.

    Returns:
        float (d_out, d_in).

    Example:
        >>> import torch
        >>> from sap_lightning.functional.masking import row_ranks
        >>> row_ranks(torch.tensor([[10.0, 30.0, 20.0], [5.0, 5.0, 5.0]])).tolist()
        [[0.0, 1.0, 0.5], [0.0, 0.5, 1.0]]
    """
    steps = torch.linspace(0, 1, scores.shape[-1], device=scores.device).expand_as(scores)
    return torch.empty_like(steps).scatter_(-1, _row_order(scores), steps)


def _row_order(scores: Tensor) -> Tensor:
    if scores.device.type == "cpu" and scores.dtype == torch.float32:
        # Bits of floats that are not negative have the floats' order, and numpy sorts whole numbers four times as
        # quickly as torch finds an order; below them stands the column.
        keys = scores.numpy().view(np.int32).astype(np.int64) << 32 | np.arange(scores.shape[-1])
        keys.sort(axis=-1)
        return torch.from_numpy(keys & 0xFFFFFFFF)
    return scores.argsort(dim=-1, stable=True)


def keep_masks(scores: Mapping[str, Parameters], sparsity: float, scope: Scope) -> dict[str, Parameters]:
    """Masks of a whole adapter, with one threshold (``global``), one for each layer or one for each tensor.

    A layer has one tensor in the spaces of ΔW and of its singular values, and two, A and B, in that of its factors.

    Args:
        scores: for each layer the scores of its tensors, of any shape.
        sparsity: ρ in [0, 1].
        scope: what the round(ρ·N) lowest are looked for in, N its elements.

    Returns:
        For each layer the masks of its tensors, bool of their shapes, True where a score is kept.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.masking import keep_masks
        >>> scores = {"q": (torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])), "v": (torch.tensor([4.0, 5.0]),)}
        >>> for scope in ("global", "layer", "tensor"):
        ...     masks = keep_masks(scores, sparsity=0.5, scope=scope)
        ...     print(scope, *(mask.tolist() for layer in masks.values() for mask in layer))
        global [False, False] [False, True] [True, True]
        layer [False, False] [True, True] [False, True]
        tensor [False, True] [False, True] [False, True]
    """
    if scope == "global":
        return _keep_together(scores, sparsity)
    if scope == "tensor":
        return {name: tuple(keep_mask(tensor, sparsity) for tensor in layer) for name, layer in scores.items()}
    masks: dict[str, Parameters] = {}
    for name, layer in scores.items():
        masks |= _keep_together({name: layer}, sparsity)
    return masks


def _keep_together(scores: Mapping[str, Parameters], sparsity: float) -> dict[str, Parameters]:
    tensors = [tensor for layer in scores.values() for tensor in layer]
    flat = keep_mask(torch.cat([tensor.flatten() for tensor in tensors]), sparsity)
    pieces = iter(flat.split([tensor.numel() for tensor in tensors]))
    return {name: tuple(next(pieces).view_as(t) for t in layer) for name, layer in scores.items()}
