"""k-means that needs no luck: the same points give the same clusters, whatever their order."""

from __future__ import annotations

import torch
from torch import Tensor

_MOST_ROUNDS = 300


def kmeans(points: Tensor, weights: Tensor, clusters: int) -> Tensor:
    """Assigns points to clusters of small Σ w_i·‖x_i − centre‖² by Lloyd's rounds, in float64.

    The centres to start with are those that k-means++ (Arthur & Vassilvitskii 2007) would most likely draw: first the
    point with the largest w_i·‖x_i − mean‖², then again and again the one with the largest w_i·‖x_i − nearest centre‖².
    Points of equal coordinates stay together. Where there are no more points than clusters, each is one.

    Args:
        points: x, shape (n, d).
        weights: w, above 0, shape (n,).
        clusters: how many to make.

    Returns:
        For each point the number of its cluster, shape (n,); there are fewer clusters where points are equal.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.clustering import kmeans
        >>> points = torch.tensor([[0.0, 0.0], [9.0, 9.0], [1.0, 0.0], [9.0, 8.0]])
        >>> kmeans(points, torch.ones(4), clusters=2).tolist()
        [0, 1, 0, 1]
    """
    if len(points) <= clusters:
        return torch.arange(len(points))
    # In the order of their content, so that neither ties nor rounding depend on the given order.
    content = torch.cat([points.double(), weights.double()[:, None]], dim=1).cpu().numpy()
    order = sorted(range(len(points)), key=lambda i: content[i].tobytes())
    labels = torch.empty(len(points), dtype=torch.long)
    labels[order] = _lloyd(points[order].double(), weights[order].double(), clusters)
    return labels


def weighted_means(points: Tensor, weights: Tensor, labels: Tensor) -> Tensor:
    """Σ w_i·x_i / Σ w_i of every cluster, shape (clusters, d).

    Args:
        points: x, shape (n, d).
        weights: w, above 0, shape (n,).
        labels: for each point its cluster, numbered from 0 without a gap, shape (n,).

    Example:
        >>> import torch
        >>> from sap_lightning.functional.clustering import weighted_means
        >>> points, weights = torch.tensor([[0.0, 1.0], [4.0, 1.0], [7.0, 7.0]]), torch.tensor([3.0, 1.0, 5.0])
        >>> weighted_means(points, weights, torch.tensor([0, 0, 1])).tolist()
        [[1.0, 1.0], [7.0, 7.0]]
    """
    members = torch.nn.functional.one_hot(labels).to(points.dtype) * weights.to(points.dtype)[:, None]
    return members.T @ points / members.sum(0)[:, None]


def _lloyd(points: Tensor, weights: Tensor, clusters: int) -> Tensor:
    centres = points[_starts(points, weights, clusters)]
    labels = _nearest(points, centres)
    for _ in range(_MOST_ROUNDS):
        before, labels = labels, _nearest(points, weighted_means(points, weights, labels))
        if torch.equal(labels, before):
            break
    return labels


def _starts(points: Tensor, weights: Tensor, clusters: int) -> list[int]:
    """Indices of the first centres, which all differ."""
    mean = weighted_means(points, weights, torch.zeros(len(points), dtype=torch.long))
    chosen = [int((weights * _distances(points, mean)).argmax())]
    nearest = _distances(points, points[chosen])
    while len(chosen) < clusters and bool((nearest > 0).any()):
        chosen.append(int((weights * nearest).argmax()))
        nearest = torch.minimum(nearest, _distances(points, points[chosen[-1:]]))
    return chosen


def _distances(points: Tensor, centre: Tensor) -> Tensor:
    """‖x − centre‖² without rounding where they are the same."""
    return (points - centre).square().sum(1)


def _nearest(points: Tensor, centres: Tensor) -> Tensor:
    """The number of each point's nearest centre, without those that are nobody's."""
    distances = centres.square().sum(1) - 2 * points @ centres.T
    return distances.argmin(1).unique(return_inverse=True)[1]
