"""Bytes on the wire."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

_INDEX_BYTES = 4
_VALUE_BYTES = 4


def sparse_bytes(kept: int, total: int, value_bytes: int = _VALUE_BYTES) -> int:
    """Bytes of a tensor that is zero but for `kept` of its `total` elements, in the cheapest of three layouts.

    The values kept and a bitmap of where they belong (⌈total / 8⌉ bytes), or an index of 4 bytes for each of them, or
    simply all values.

    Raises:
        ValueError: kept lies outside [0, total].
    """
    if not 0 <= kept <= total:
        raise ValueError(f"kept must lie in [0, {total}], got {kept}")
    bitmap = kept * value_bytes + (total + 7) // 8
    indices = kept * (value_bytes + _INDEX_BYTES)
    return min(bitmap, indices, total * value_bytes)


def sparse_upload(masks: Mapping[str, Sequence[Tensor]]) -> int:
    """Bytes of a pruned adapter of 4-byte values, each tensor in its cheapest layout.

    Args:
        masks: for each layer the masks of its tensors, bool of any shape, True where an element is kept.
    """
    return sum(sparse_bytes(int(mask.sum()), mask.numel()) for layer in masks.values() for mask in layer)


def triplets_upload(masks: Mapping[str, Sequence[Tensor]], shapes: Mapping[str, tuple[int, int]]) -> int:
    """Bytes of an adapter pruned to some singular triplets: u and v of each that is kept, one of them times σ.

    Args:
        masks: for each layer the mask of its singular values, True where a triplet is kept.
        shapes: (d_out, d_in) of each layer.
    """
    return sum(_VALUE_BYTES * int(masks[name][0].sum()) * sum(shapes[name]) for name in masks)


def one_shot_bytes(upload_bytes: Sequence[int]) -> int:
    """Bytes of one-shot federation: every client uploads its adapter once.

    Args:
        upload_bytes: size of each client's adapter.
    """
    return sum(upload_bytes)


def fedavg_bytes(upload_bytes: Sequence[int], rounds: int) -> int:
    """Bytes of FedAvg with all clients in every round (McMahan et al. 2017, arXiv:1602.05629, algorithm 1).

    In each round every client downloads the present adapter and uploads its own.

    Args:
        upload_bytes: size of each client's adapter.
        rounds: R, the number of rounds.
    """
    return 2 * rounds * sum(upload_bytes)
