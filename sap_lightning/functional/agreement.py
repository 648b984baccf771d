"""Where clients agree: what they keep, which way they change it, and a plane to look at features in."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor
from torch.special import entr

from sap_lightning.functional.spaces import Parameters


def share_kept(masks: Mapping[str, Parameters]) -> dict[str, float]:
    """For each layer the share of its parameters that pruning left: parameters kept / all parameters.

    Args:
        masks: for each layer the masks of its tensors, bool of any shape, True where a parameter is kept.

    Returns:
        In [0, 1] for each layer.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.agreement import share_kept
        >>> A, B = torch.tensor([[True, False]]), torch.tensor([[True], [True]])
        >>> share_kept({"q_proj": (A, B)})
        {'q_proj': 0.75}
    """
    return {
        name: sum(int(mask.sum()) for mask in layer) / sum(mask.numel() for mask in layer)
        for name, layer in masks.items()
    }


def mean_cosine(products: Tensor) -> float:
    """Mean cosine over all pairs of K vectors from their inner products; one that is zero is at right angles to all.

    Args:
        products: shape (K, K), K at least 2.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.agreement import mean_cosine
        >>> vectors = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
        >>> round(mean_cosine(vectors @ vectors.T), 3)  # of 1, 0 and 0
        0.333
    """
    norms = products.diagonal().sqrt()
    cosines = products / (norms[:, None] * norms).clamp(min=torch.finfo(products.dtype).tiny)
    return float(cosines[~torch.eye(len(products), dtype=torch.bool)].mean())


def overlap(one: Mapping[str, Parameters], other: Mapping[str, Parameters]) -> float:
    """Jaccard index of two clients' keep masks over all layers: kept by both / kept by either.

    A layer that one of them lacks counts as nothing kept there, and so does what only the larger of two ranks has.

    Args:
        one: for each layer the masks of its tensors, bool of any shape, True where a parameter is kept.
        other: the same of the other client, with the same number of tensors in a layer.

    Returns:
        In [0, 1]; 0 when neither keeps anything.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.agreement import overlap
        >>> one = {"q_proj": (torch.tensor([True, True, False, False]),)}
        >>> other = {"q_proj": (torch.tensor([True, False, True, True]),)}
        >>> overlap(one, other)  # one kept by both of four kept by either
        0.25
    """
    both = sum(
        _kept_by_both(a, b) for name in one.keys() & other.keys() for a, b in zip(one[name], other[name], strict=True)
    )
    either = sum(int(mask.sum()) for masks in (one, other) for layer in masks.values() for mask in layer) - both
    return both / either if either else 0.0


def _kept_by_both(one: Tensor, other: Tensor) -> int:
    common = tuple(slice(min(sizes)) for sizes in zip(one.shape, other.shape, strict=True))
    return int((one[common] & other[common]).sum())


def sign_conflict(updates: Sequence[Tensor]) -> float:
    """Of the elements that at least two clients change, the share where not all of their signs agree.

    What TIES calls sign disagreement (Yadav et al. 2023, arXiv:2306.01708, section 3).

    Args:
        updates: every client's ΔW of one layer, all of one shape; 0 is no change.

    Returns:
        In [0, 1]; 0 when no element is changed by two clients.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.agreement import sign_conflict
        >>> one, other = torch.tensor([[1.0, -1.0, 2.0]]), torch.tensor([[3.0, 1.0, 0.0]])
        >>> sign_conflict([one, other])  # both change the first two elements, and disagree on the second
        0.5
    """
    up = sum(((update > 0).int() for update in updates), torch.tensor(0))
    down = sum(((update < 0).int() for update in updates), torch.tensor(0))
    shared = int((up + down > 1).sum())
    return int(((up > 0) & (down > 0)).sum()) / shared if shared else 0.0


def principal_components(features: Tensor) -> Tensor:
    """Coordinates on the first two principal components, of features centred but not scaled.

    The sign of a component is that which makes its loading of largest magnitude positive.

    Args:
        features: shape (n, d), n at least 1.

    Returns:
        float64 (n, 2); zeros along a component that there is not, as n or d is too small.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.agreement import principal_components
        >>> corners = torch.tensor([[20.0, 16.0], [12.0, 22.0], [8.0, 0.0], [0.0, 6.0]])  # of a tilted rectangle
        >>> principal_components(corners).round(decimals=3).tolist()  # 20 long, 10 wide, upright and centred
        [[10.0, 5.0], [10.0, -5.0], [-10.0, 5.0], [-10.0, -5.0]]
    """
    centred = features.double() - features.double().mean(0)
    _, _, components = torch.linalg.svd(centred, full_matrices=False)
    components = components[:2]
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    plane = torch.zeros(len(features), 2, dtype=torch.float64)
    plane[:, : len(components)] = centred @ (components * largest.sign()).T
    return plane


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats of distributions over the last dimension, from 0 to ln 2.

    Args:
        p: shape (..., n), each of sum 1.
        q: of the same shape.

    Returns:
        Shape (...).

    Example:
        >>> import torch
        >>> from sap_lightning.functional.agreement import divergence
        >>> p, q = torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[0.0, 1.0], [0.5, 0.5]])
        >>> divergence(p, q).round(decimals=3).tolist()  # ln 2, and 0
        [0.6930000185966492, 0.0]
    """
    return (entr((p + q) / 2) - (entr(p) + entr(q)) / 2).sum(-1)


def answers_that_move(answers: Sequence[Sequence[Hashable]], smooth: int = 0) -> list[float]:
    """For each of a row of models the number of answers that differ from those of either of its neighbours in the row.

    Args:
        answers: each model's, to the same questions.
        smooth: over how many neighbours on either side, as far as there are, that number is averaged.

    Example:
        >>> from sap_lightning.functional.agreement import answers_that_move
        >>> answers = ["ab", "ab", "ac", "ac"]  # four models, two questions; the second answer moves once
        >>> answers_that_move(answers), answers_that_move(answers, smooth=1)
        ([0.0, 1.0, 1.0, 0.0], [0.5, 0.6666666666666666, 0.6666666666666666, 0.5])
    """
    beside = [[*answers[max(0, i - 1) : i], *answers[i + 1 : i + 2]] for i in range(len(answers))]
    moving = [
        sum(any(one != other for other in others) for one, *others in zip(own, *near, strict=True))
        for own, near in zip(answers, beside, strict=True)
    ]
    windows = [moving[max(0, i - smooth) : i + smooth + 1] for i in range(len(moving))]
    return [sum(window) / len(window) for window in windows]
