from __future__ import annotations

import pytest
import torch
from references import randn
from torch import Tensor

from sap_lightning.functional.clustering import kmeans, weighted_means


def cost(points: Tensor, weights: Tensor, labels: Tensor) -> float:
    """Σ w_i·‖x_i − centre‖², by definition."""
    total = 0.0
    for label in labels.unique():
        own, w = points[labels == label].double(), weights[labels == label].double()
        centre = (w[:, None] * own).sum(0) / w.sum()
        total += float((w * (own - centre).square().sum(1)).sum())
    return total


def parts(labels: Tensor) -> list[list[int]]:
    """The points of each cluster, whatever its number."""
    return sorted((labels == label).nonzero().flatten().tolist() for label in labels.unique())


def blobs(seed: int = 0, spread: float = 0.1) -> tuple[Tensor, Tensor]:
    """Twenty points around each of four corners, and whose they are."""
    corners = 5 * torch.eye(4, 6)
    owner = torch.arange(4).repeat(20)
    return corners[owner] + spread * randn(seed, 80, 6), owner


def test_clusters_that_are_apart_are_found() -> None:
    points, owner = blobs()
    labels = kmeans(points, torch.ones(80), 4)
    assert len(set(zip(labels.tolist(), owner.tolist(), strict=True))) == 4


@pytest.mark.parametrize("seed", range(3))
def test_no_point_is_nearer_to_another_centre(seed: int) -> None:
    points, weights = randn(seed, 60, 8), torch.rand(60, generator=torch.Generator().manual_seed(seed)) + 0.1
    labels = kmeans(points, weights, 7)
    assert sorted(labels.unique().tolist()) == list(range(7))
    centres = weighted_means(points.double(), weights.double(), labels)
    assert torch.equal(torch.cdist(points.double(), centres).argmin(1), labels)


@pytest.mark.parametrize("seed", range(3))
def test_the_clusters_are_as_good_as_scipys_best_of_ten(seed: int) -> None:
    vq = pytest.importorskip("scipy.cluster.vq")
    points, weights = randn(seed, 60, 8), torch.ones(60)
    theirs = min(
        cost(points, weights, torch.from_numpy(vq.kmeans2(points.double().numpy(), 7, minit="++", seed=draw)[1]).long())
        for draw in range(10)
    )
    assert cost(points, weights, kmeans(points, weights, 7)) < 1.1 * theirs


def test_heavy_points_draw_the_centres() -> None:
    points = torch.tensor([[0.0], [1.0], [2.1]])
    assert parts(kmeans(points, torch.tensor([1.0, 1.0, 1.0]), 2)) == [[0, 1], [2]]
    assert parts(kmeans(points, torch.tensor([9.0, 9.0, 1.0]), 2)) == [[0], [1, 2]]


def test_neither_order_nor_equal_points_change_the_clusters() -> None:
    points, weights = torch.cat([randn(0, 30, 5), randn(0, 30, 5)]), torch.linspace(0.1, 1, 60)
    labels = kmeans(points, weights, 6)
    assert torch.equal(labels[:30], labels[30:])
    for seed in range(3):
        order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(kmeans(points[order], weights[order], 6), labels[order])


def test_there_are_no_more_clusters_than_points_that_differ() -> None:
    two = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert parts(kmeans(two.repeat(3, 1), torch.ones(6), 4)) == [[0, 2, 4], [1, 3, 5]]
    assert parts(kmeans(torch.ones(5, 2), torch.ones(5), 2)) == [[0, 1, 2, 3, 4]]
    assert kmeans(torch.ones(3, 2), torch.ones(3), 3).tolist() == [0, 1, 2], "as many clusters as points: each is one"
    assert kmeans(torch.zeros(0, 2), torch.ones(0), 3).tolist() == []


def test_weighted_means_are_those_of_each_cluster() -> None:
    points, weights, labels = randn(0, 9, 3).double(), torch.rand(9).double() + 0.1, torch.tensor([0, 1, 2] * 3)
    for label, mean in enumerate(weighted_means(points, weights, labels)):
        own = labels == label
        torch.testing.assert_close(mean, (weights[own, None] * points[own]).sum(0) / weights[own].sum())
