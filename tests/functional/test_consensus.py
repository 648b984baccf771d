from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import sap_lightning.functional.consensus as consensus
from sap_lightning.functional.consensus import (
    ElectedMean,
    FactorSum,
    WeightedSum,
    balanced_factors,
    coordinatewise,
    median,
    padded_sum,
    trimmed_mean,
    weighted_sum,
)
from sap_lightning.functional.lora import LoRALayer, Update, dense

D_OUT, D_IN = 12, 9


def random_layer(seed: int, rank: int = 2, scale: float = 0.5) -> LoRALayer:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, D_IN, generator=generator, dtype=torch.float64)
    B = torch.randn(D_OUT, rank, generator=generator, dtype=torch.float64)
    return LoRALayer(A, B, scale)


LAYERS = [random_layer(0, 1, 2.0), random_layer(1, 2, 0.5), random_layer(2, 2)]
WEIGHTS = [0.6, 0.3, 0.1]


def total_of(layers: list[LoRALayer], weights: list[float]) -> Tensor:
    return sum(w * x.scale * torch.einsum("or,ri->oi", x.B, x.A) for x, w in zip(layers, weights, strict=True))


def elected(updates: list[Tensor], weights: list[float], **options: object) -> Tensor:
    election = ElectedMean(**options)
    for update, weight in zip(updates, weights, strict=True):
        election.add(update, weight)
    return election.result()


def test_the_sum_is_that_of_the_dense_updates() -> None:
    assert_close(dense(weighted_sum(LAYERS, WEIGHTS)), total_of(LAYERS, WEIGHTS))


def test_the_sum_is_in_factor_form_until_the_dense_one_is_smaller() -> None:
    total = WeightedSum()
    for seed in range(4):
        total.add(random_layer(seed, rank=2), 1.0)
        # A rank costs 12 + 9 numbers, the dense update 12 · 9.
        rank = 2 * (seed + 1)
        assert isinstance(total.result(), LoRALayer) == (rank * (D_OUT + D_IN) <= D_OUT * D_IN)
    layers = [random_layer(seed) for seed in range(4)]
    assert_close(dense(total.result()), total_of(layers, [1.0] * 4))


@pytest.mark.parametrize("dense_ones", [[0], [2], [0, 1, 2]])
def test_dense_and_factor_updates_mix(dense_ones: list[int]) -> None:
    updates: list[Update] = [dense(x) if k in dense_ones else x for k, x in enumerate(LAYERS)]
    assert_close(weighted_sum(updates, WEIGHTS), total_of(LAYERS, WEIGHTS))


def test_summing_leaves_the_updates_alone() -> None:
    updates = [dense(layer) for layer in LAYERS]
    before = [update.clone() for update in updates]
    weighted_sum(updates, [1.0, 0.5, 0.5])
    elected(updates, [1.0, 0.5, 0.5])
    coordinatewise(median, LAYERS)
    assert_close(updates, before, atol=0, rtol=0)


def test_an_update_of_rank_zero_adds_nothing() -> None:
    nothing = LoRALayer(torch.zeros(0, D_IN, dtype=torch.float64), torch.zeros(D_OUT, 0, dtype=torch.float64))
    for layers in ([nothing, LAYERS[0]], [LAYERS[0], nothing]):
        assert_close(dense(weighted_sum(layers, [1.0, 1.0])), LAYERS[0].delta())


def test_another_number_of_weights_than_updates_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        weighted_sum(LAYERS, [1.0])


@pytest.mark.parametrize("merge", [WeightedSum(), ElectedMean()])
def test_nothing_has_no_merge(merge) -> None:
    with pytest.raises(ValueError, match="nothing was added"):
        merge.result()


UPDATES = [
    torch.tensor([[1.0, 1.0, 4.0, 0.0, 0.0, 2.0]]),
    torch.tensor([[3.0, -2.0, -1.0, 0.0, -6.0, -2.0]]),
    torch.tensor([[2.0, -4.0, -1.0, 0.0, 0.0, 0.0]]),
]


def test_elements_take_the_mean_of_the_sign_with_the_larger_sum() -> None:
    assert elected(UPDATES, [1.0] * 3).tolist() == [[2.0, -3.0, 4.0, 0.0, -6.0, 2.0]]


def test_elements_can_take_the_sign_of_more_updates() -> None:
    assert elected(UPDATES, [1.0] * 3, majority="frequency").tolist() == [[2.0, -3.0, -1.0, 0.0, -6.0, 2.0]]


def test_weights_count_in_the_election_and_in_the_mean() -> None:
    # Third element: 0.1·4 < 0.5·1 + 0.4·1.
    expected = torch.tensor([[0.1 + 1.5 + 0.8, -(1.0 + 1.6) / 0.9, -1.0, 0.0, -6.0, -2.0]])
    assert_close(elected(UPDATES, [0.1, 0.5, 0.4]), expected)


def test_by_count_elects_before_weighting_and_divides_by_the_number_that_agrees() -> None:
    expected = torch.tensor([[(0.1 + 1.5 + 0.8) / 3, -(1.0 + 1.6) / 2, 0.4, 0.0, -3.0, 0.2]])
    assert_close(elected(UPDATES, [0.1, 0.5, 0.4], by_count=True), expected)


def test_every_update_has_one_vote_whatever_its_weight() -> None:
    assert elected(UPDATES, [0.9, 0.05, 0.05], majority="frequency")[0, 1] == pytest.approx(-3)


def test_a_vote_counts_in_the_election_alone() -> None:
    election = ElectedMean()
    for update, weight, vote in zip(UPDATES, [0.5, 0.3, 0.2], [1.0, 1.0, 4.0], strict=True):
        election.add(update, weight, vote)
    # Third element: 4 < 1 + 4·1. The last: 2 = 2, and the third client says nothing there.
    expected = torch.tensor([[0.5 + 0.9 + 0.4, -(0.6 + 0.8) / 0.5, -1.0, 0.0, -6.0, 2.0]])
    assert_close(election.result(), expected)


def test_an_update_in_factor_form_is_elected_by_its_elements() -> None:
    assert_close(elected(LAYERS, WEIGHTS), elected([dense(layer) for layer in LAYERS], WEIGHTS))


def test_the_median_of_an_even_number_is_the_mean_of_the_middle_two() -> None:
    assert median(torch.tensor([[4.0, 1.0], [1.0, 1.0], [9.0, 3.0]])).tolist() == [4.0, 1.0]
    assert median(torch.tensor([[4.0, 1.0], [1.0, 1.0], [9.0, 3.0], [8.0, 2.0]])).tolist() == [6.0, 1.5]


@pytest.mark.parametrize(("trim", "expected"), [(0.0, 22.0), (0.19, 22.0), (0.2, 10 / 3), (0.49, 3.0)])
def test_the_trimmed_mean_leaves_out_as_many_from_each_end(trim: float, expected: float) -> None:
    stacked = torch.tensor([[2.0], [100.0], [3.0], [0.0], [5.0]])
    assert trimmed_mean(stacked, trim).item() == pytest.approx(expected)


@pytest.mark.parametrize("block", [1, 2 * 3 * D_IN, 5 * 3 * D_IN, 10**6])
def test_blocks_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(consensus, "_BLOCK_ELEMENTS", block)
    sizes = []

    def middle(stacked: Tensor) -> Tensor:
        sizes.append(stacked.numel())
        return stacked.median(0).values

    expected = torch.stack([layer.delta() for layer in LAYERS]).median(0).values
    assert_close(coordinatewise(middle, LAYERS), expected)
    assert max(sizes) <= max(block, 3 * D_IN)


@pytest.mark.parametrize("scale", [4.0, -4.0, 0.0])
def test_balanced_factors_have_the_scale_in_them(scale: float) -> None:
    layer = random_layer(0, scale=scale)
    A, B = balanced_factors(layer)
    assert_close(B @ A, layer.delta())
    assert_close(B, math.sqrt(abs(scale)) * layer.B)


def test_a_padded_sum_is_as_large_as_the_larger_in_each_dimension() -> None:
    tall, wide = torch.ones(3, 1), torch.full((1, 2), 10.0)
    for total in (padded_sum(tall, wide), padded_sum(wide, tall)):
        assert total.tolist() == [[11.0, 10.0], [1.0, 0.0], [1.0, 0.0]]


def test_factors_summed_apart_have_cross_terms_and_pad_lower_ranks() -> None:
    total = FactorSum()
    for layer, weight in zip(LAYERS, WEIGHTS, strict=True):
        total.add(layer, weight)
    A, B = torch.zeros(2, D_IN, dtype=torch.float64), torch.zeros(D_OUT, 2, dtype=torch.float64)
    for layer, weight in zip(LAYERS, WEIGHTS, strict=True):
        A[: layer.rank] += weight * math.sqrt(layer.scale) * layer.A
        B[:, : layer.rank] += weight * math.sqrt(layer.scale) * layer.B
    assert_close(total.result().delta(), B @ A)
    with pytest.raises(ValueError, match="need updates in factor form"):
        total.add(torch.zeros(D_OUT, D_IN), 1.0)
