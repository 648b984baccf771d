from __future__ import annotations

import numpy as np
import pytest
import torch
from adapters import FULL_RANK, SHAPES, assert_same, deltas, random_adapter, unlike_adapters
from torch import Tensor
from torch.testing import assert_close

from sap_lightning.errors import InputError
from sap_lightning.functional.lora import dense
from sap_lightning.functional.subspaces import Triplets
from sap_lightning.merging.dc_merge import DCMerge, agreeing_mean, smoothed

UNIFORM, WEIGHTS = [1 / 3] * 3, [0.5, 0.3, 0.2]


def whitened(X: np.ndarray) -> np.ndarray:
    """X·(XᵀX)^(−1/2) by the eigenvalues of XᵀX."""
    values, vectors = np.linalg.eigh(X.T @ X)
    return X @ vectors / np.sqrt(values) @ vectors.T


def evened(sigma: np.ndarray, ratio: float) -> np.ndarray:
    steps = np.linspace(min(ratio, sigma[0] / sigma[-1]), 1, len(sigma))
    return sigma.sum() * steps / steps.sum()


def reference(adapters, weights: list[float], ratio: float = 1.0, share: float = 0.001, most: int = 8):
    """The paper's algorithm on dense float64 updates, with the number of elements that stay as we have it."""
    merged = {}
    for name in SHAPES:
        clients = []
        for delta, weight in zip(deltas(adapters, name).numpy(), weights, strict=True):
            u, s, v = np.linalg.svd(len(weights) * weight * delta, full_matrices=False)
            n = min(most, int((s > 1e-5).sum()))
            if n:
                clients.append((u[:, :n], evened(s[:n], ratio), v[:n]))
        U = whitened(np.hstack([u for u, _, _ in clients]))
        V = whitened(np.vstack([v for _, _, v in clients]).T)
        projections = []
        for u, s, v in clients:
            M = U.T @ (u * s @ v) @ V
            kept = max(len(s), int(share * M.size))
            projections.append(np.where(np.abs(M) >= np.sort(np.abs(M), axis=None)[-kept] * (1 - 1e-9), M, 0))
        merged[name] = torch.from_numpy(U @ (mask(clients) * ties(projections)) @ V.T)
    return merged


def ties(projections: list[np.ndarray]) -> np.ndarray:
    stacked = np.stack(projections)
    agrees = np.sign(stacked) == np.sign(stacked.sum(0))
    return (stacked * agrees).sum(0) / (agrees & (stacked != 0)).sum(0).clip(1)


def mask(clients) -> np.ndarray:
    owner = np.repeat(np.arange(len(clients)), [len(s) for _, s, _ in clients])
    return owner[:, None] == owner


@pytest.mark.parametrize("weights", [UNIFORM, WEIGHTS])
@pytest.mark.parametrize("ratio", [1.0, 5.0, 1.5])
@pytest.mark.parametrize("share", [0.001, 0.3, 1.0])
def test_it_is_the_algorithm_on_dense_updates(ratio: float, share: float, weights) -> None:
    adapters = unlike_adapters()
    expected = reference(adapters, weights, ratio, share)
    assert_same(DCMerge(ratio, share).merge(adapters, weights), expected, 1e-5)


def test_a_client_has_as_many_directions_as_there_is_room_for() -> None:
    adapters = [random_adapter(seed, FULL_RANK) for seed in range(3)]
    assert_same(DCMerge(share=0.1).merge(adapters), reference(adapters, UNIFORM, share=0.1), 1e-5)


def test_scale_multiplies_the_merge() -> None:
    whole = DCMerge().merge(unlike_adapters())
    merged = DCMerge(scale=0.4).merge(unlike_adapters())
    assert_same(merged, {name: 0.4 * dense(update) for name, update in whole.items()})


def test_one_client_comes_back_with_a_flat_spectrum() -> None:
    adapter = random_adapter(0)
    for name, update in DCMerge().merge([adapter]).items():
        U, sigma, V = torch.linalg.svd(deltas([adapter], name)[0], full_matrices=False)
        expected = sigma[:4].mean() * U[:, :4] @ V[:4]
        assert_close(dense(update).double(), expected, atol=1e-5, rtol=1e-5)


def test_copies_of_a_client_are_its_share_of_each() -> None:
    # Each of K blocks on the diagonal of M has 1 / K of the client.
    adapter = random_adapter(0)
    alone = DCMerge().merge([adapter])
    merged = DCMerge().merge([adapter] * 3)
    assert_same(merged, {name: dense(update) / 3 for name, update in alone.items()}, 1e-5)


def test_opposite_clients_cancel_out() -> None:
    for difference in (0.0, 1e-9):
        merged = DCMerge().merge([random_adapter(0), random_adapter(0, scale=-0.5 - difference)])
        assert all(dense(update).abs().max() < 1e-6 for update in merged.values())


def test_smoothing_keeps_the_sum_and_falls_in_equal_steps_by_the_ratio_at_most() -> None:
    sigma = torch.tensor([10.0, 3.0, 1.0])
    triplets = Triplets(torch.eye(3), sigma, torch.eye(3))
    assert_close(smoothed(triplets, 1.0).sigma, torch.full((3,), 14 / 3))
    assert_close(smoothed(triplets, 4.0).sigma, 14 * torch.tensor([4.0, 2.5, 1.0]) / 7.5)
    assert_close(smoothed(triplets, 99.0).sigma, 14 * torch.tensor([10.0, 5.5, 1.0]) / 16.5)
    assert len(smoothed(Triplets(torch.zeros(3, 0), torch.zeros(0), torch.zeros(0, 3)), 2.0).sigma) == 0


def test_the_mean_is_over_those_that_agree_with_the_sum() -> None:
    stacked: Tensor = torch.tensor([[5.0, 1.0, 2.0, 0.0], [-1.0, 3.0, -2.0, 0.0], [-1.0, 0.0, 1e-9, 0.0]])
    assert agreeing_mean(stacked).tolist() == [5.0, 2.0, 0.0, 0.0]


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match=r"merge\.method\.ratio must be at least 1, got 0\.5"):
        DCMerge(ratio=0.5)
    with pytest.raises(InputError, match=r"merge\.method\.share must lie in \[0, 1\], got 2"):
        DCMerge(share=2)
