from __future__ import annotations

import pytest
import torch
from adapters import FULL_RANK, SHAPES, assert_same, deltas, random_adapter, unlike_adapters
from torch import Tensor

from sap_lightning.functional.lora import dense
from sap_lightning.merging.iso_c import IsoC


def flat(matrix: Tensor, rank: int) -> Tensor:
    """The polar factor of a matrix of this rank, as long as the mean of its singular values: M·(MᵀM)^(−1/2)·σ̄."""
    values, vectors = torch.linalg.eigh(matrix.T @ matrix)
    values, vectors = values[-rank:], vectors[:, -rank:]
    return values.sqrt().mean() * (matrix @ vectors / values.sqrt() @ vectors.T)


def test_every_singular_value_of_the_sum_becomes_their_mean() -> None:
    adapters = unlike_adapters()
    expected = {name: flat(deltas(adapters, name).sum(0), rank) for name, rank in {"fc1": 6, "q": 12}.items()}
    assert_same(IsoC().merge(adapters), expected, 1e-5)
    assert {name: update.rank for name, update in IsoC().merge(adapters).items()} == {"fc1": 6, "q": 12}


def test_sums_of_full_rank_are_divided_as_the_authors_do() -> None:
    adapters = [random_adapter(seed, rank=10) for seed in range(3)]
    for name, update in IsoC().merge(adapters).items():
        sigma = torch.linalg.svdvals(deltas(adapters, name).sum(0))
        assert len(sigma) == FULL_RANK
        values = torch.linalg.svdvals(dense(update).double())
        torch.testing.assert_close(values, sigma.mean().expand(FULL_RANK), rtol=1e-5, atol=0)


def test_weights_are_shares_of_the_number_of_clients_and_scale_multiplies() -> None:
    adapters = unlike_adapters()
    counts = torch.tensor([1.5, 0.9, 0.6], dtype=torch.float64)
    sums = {name: torch.tensordot(counts, deltas(adapters, name), 1) for name in SHAPES}
    expected = {name: 0.4 * flat(sums[name], rank) for name, rank in {"fc1": 6, "q": 12}.items()}
    assert_same(IsoC(scale=0.4).merge(adapters, [0.5, 0.3, 0.2]), expected, 1e-5)


def test_directions_that_clients_share_count_once() -> None:
    adapter = random_adapter(0)
    merged = IsoC().merge([adapter, adapter])
    assert {update.rank for update in merged.values()} == {4}
    assert_same(merged, {name: 2 * flat(deltas([adapter], name)[0], 4) for name in SHAPES}, 1e-5)


@pytest.mark.parametrize("difference", [0.0, 1e-8])
def test_what_is_left_of_clients_that_cancel_out_is_nothing(difference: float) -> None:
    merged = IsoC().merge([random_adapter(0), random_adapter(0, scale=-0.5 - difference)])
    assert not any(dense(update).any() for update in merged.values())
