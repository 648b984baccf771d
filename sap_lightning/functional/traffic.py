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

    Example:
        >>> from sap_lightning.functional.traffic import sparse_bytes
        >>> sparse_bytes(kept=10, total=80)  # 10 values and a bitmap: 40 + 10
        50
        >>> sparse_bytes(kept=1, total=80)  # one value and its index: 4 + 4
        8
        >>> sparse_bytes(kept=80, total=80)  # all 80 values
        320
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

    Example:
        >>> import torch
        >>> from sap_lightning.functional.traffic import sparse_upload
        >>> A = torch.tensor([[True, True, False, False, True, False, False, True]])
        >>> B = torch.tensor([[True], [True]])
        >>> sparse_upload({"q_proj": (A, B)})  # 4 values and a bitmap of one byte, and 2 values: 17 + 8
        25
    """
    return sum(sparse_bytes(int(mask.sum()), mask.numel()) for layer in masks.values() for mask in layer)


def triplets_upload(masks: Mapping[str, Sequence[Tensor]], shapes: Mapping[str, tuple[int, int]]) -> int:
    """Bytes of an adapter pruned to some singular triplets: u and v of each that is kept, one of them times σ.

    Args:
        masks: for each layer the mask of its singular values, True where a triplet is kept.
        shapes: (d_out, d_in) of each layer.

    Returns:
        Σ 4·kept·(d_out + d_in) over layers.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.traffic import triplets_upload
        >>> triplets_upload({"q_proj": (torch.tensor([True, True, False]),)}, {"q_proj": (10, 20)})  # 4·2·30
        240
    """
    return sum(_VALUE_BYTES * int(masks[name][0].sum()) * sum(shapes[name]) for name in masks)


def one_shot_bytes(upload_bytes: Sequence[int]) -> int:
    """Bytes of one-shot federation: every client uploads its adapter once.

    Args:
        upload_bytes: size of each client's adapter.

    Returns:
        Their sum.

    Example:
        >>> from sap_lightning.functional.traffic import one_shot_bytes
        >>> one_shot_bytes([100, 200])
        300
    """
    return sum(upload_bytes)


def fedavg_bytes(upload_bytes: Sequence[int], rounds: int) -> int:
    """Bytes of FedAvg with all clients in every round (McMahan et al. 2017, arXiv:1602.05629, algorithm 1).

    In each round every client downloads the present adapter and uploads its own.

    Args:
        upload_bytes: size of each client's adapter.
        rounds: R, the number of rounds.

    Returns:
        2·R times the sum of the sizes.

    Example:
        >>> from sap_lightning.functional.traffic import fedavg_bytes
        >>> fedavg_bytes([100, 200], rounds=5)
        3000
    """
    return 2 * rounds * sum(upload_bytes)
