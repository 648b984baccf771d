"""Labels in groups: what a classifier of several tasks says of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor


def probabilities_by_group(logits: Tensor, groups: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Softmax within each group of labels.

    Args:
        logits: shape (..., labels).
        groups: of each task the number of its first label, and of the one after its last.

    Returns: By task the probabilities of its labels, shape (..., labels of the task).

    Example:
        >>> import torch
        >>> from sap_lightning.functional.groups import probabilities_by_group
        >>> found = probabilities_by_group(torch.zeros(1, 6), {"animals": [0, 2], "moods": [2, 6]})
        >>> found["animals"].tolist(), found["moods"].tolist()
        ([[0.5, 0.5]], [[0.25, 0.25, 0.25, 0.25]])
    """
    return {task: logits[..., first:end].softmax(-1) for task, (first, end) in groups.items()}


def softmax_within(logits: Tensor, groups: Iterable[Sequence[int]]) -> Tensor:
    """Softmax within each group of labels, wherever the group's labels stand.

    Args:
        logits: shape (..., labels).
        groups: the numbers of each group's labels; every label is in one.

    Returns: Probabilities, shape (..., labels), of which those of a group add up to 1.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.groups import softmax_within
        >>> softmax_within(torch.zeros(1, 6), [[0, 3], [1, 2, 4, 5]]).tolist()
        [[0.5, 0.25, 0.25, 0.5, 0.25, 0.25]]
    """
    probabilities = torch.empty_like(logits)
    for numbers in groups:
        probabilities[..., numbers] = logits[..., numbers].softmax(-1)
    return probabilities
