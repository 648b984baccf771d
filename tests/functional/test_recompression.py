"""Recompression against the dense SVD in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from layers import DEGENERATE, SHAPES, random_layer
from references import randn64
from torch import Tensor
from torch.testing import assert_close

from sap_lightning.functional.lora import LoRALayer, stack
from sap_lightning.functional.recompression import largest_triplets, recompress


def tail_norm(delta: Tensor, rank: int) -> Tensor:
    """The least Frobenius error that any matrix of this rank can have (Eckart–Young)."""
    return torch.linalg.svdvals(delta)[rank:].square().sum().sqrt()


@SHAPES
def test_recompress_has_the_least_error_of_its_rank(rank: int, d_in: int, d_out: int) -> None:
    layer = random_layer(rank, d_in, d_out)
    for smaller in range(1, rank):
        error = torch.linalg.matrix_norm(layer.delta() - recompress(layer, smaller).delta())
        assert_close(error, tail_norm(layer.delta(), smaller), atol=1e-12, rtol=1e-7)


def pruned_update(d_out: int = 200, d_in: int = 320) -> Tensor:
    """A third of a LoRA's elements, at random: few large σ over a bulk that lies close together."""
    delta = random_layer(16, d_in, d_out).delta()
    return delta * (torch.rand(delta.shape, generator=torch.Generator().manual_seed(1)) < 1 / 3)


def slowly_decaying() -> Tensor:
    Q, _ = torch.linalg.qr(randn64(2, 300, 240))
    P, _ = torch.linalg.qr(randn64(3, 240, 240))
    return (Q * torch.arange(1, 241, dtype=torch.float64) ** -0.2) @ P


@pytest.mark.parametrize("count", [1, 8, 16])
@pytest.mark.parametrize(
    "make",
    [
        pruned_update,
        lambda: pruned_update(320, 200),
        slowly_decaying,
        lambda: torch.eye(200, dtype=torch.float64),
        lambda: random_layer(3, 250, 200).delta(),
        lambda: torch.zeros(200, 250, dtype=torch.float64),
    ],
    ids=["pruned", "pruned tall", "slowly decaying", "all alike", "of rank 3", "zero"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_largest_triplets_leave_the_error_of_an_svd(make: Callable[[], Tensor], count: int, dtype: torch.dtype):
    delta = make()
    U, sigma, V = (part.double() for part in largest_triplets(delta.to(dtype), count))
    identity, loose = torch.eye(count, dtype=torch.float64), 1e-9 if dtype == torch.float64 else 2e-5
    assert_close(U.T @ U, identity, atol=loose, rtol=0)
    assert_close(V @ V.T, identity, atol=loose, rtol=0)
    assert (sigma.diff() <= 0).all()
    error = torch.linalg.matrix_norm(delta - (U * sigma) @ V)
    assert error <= tail_norm(delta, count) * (1 + 1e-5) + 1e-6 * torch.linalg.matrix_norm(delta)


def test_few_triplets_of_a_large_update_take_no_svd_of_it(monkeypatch) -> None:
    taken, svd = [], torch.linalg.svd
    monkeypatch.setattr(
        torch.linalg, "svd", lambda matrix, **options: taken.append(matrix.shape) or svd(matrix, **options)
    )
    largest_triplets(pruned_update(400, 600), 4)
    assert [d_out for d_out, d_in in taken if d_in > 200] == []
    largest_triplets(pruned_update(400, 600), 300)
    assert taken[-1] == (600, 400)


def clients(spread: float, decay: float, sums_to_zero: bool, largest: float) -> LoRALayer:
    """Eight clients of rank 4: A around a shared A, σ that decay, B that add up to nothing, factors of unlike sizes."""
    size = torch.arange(1, 5, dtype=torch.float64) ** -decay
    shared = randn64(0, 4, 96)
    B = randn64(1, 8, 80, 4)
    B = B - B.mean(0) if sums_to_zero else B
    layers = [
        LoRALayer((shared + spread * randn64(2 + k, 4, 96)) * size[:, None] * ratio, B[k] * size / ratio, -0.5)
        for k, ratio in enumerate(torch.linspace(1, largest, 8).tolist())
    ]
    return stack(layers, [1 / 8] * 8)


@pytest.mark.parametrize("spread", [10, 1, 0.1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("decay", [0, 2])
@pytest.mark.parametrize("sums_to_zero", [True, False])
@pytest.mark.parametrize("largest", [1, 100])
@pytest.mark.parametrize("count", [1, 4, 12])
def test_what_grams_cannot_tell_in_float32_costs_the_triplets_of_a_stack_nothing(
    spread: float, decay: float, sums_to_zero: bool, largest: float, count: int
) -> None:
    A, B, scale = clients(spread, decay, sums_to_zero, largest)
    single = LoRALayer(A.float(), B.float(), scale)
    delta = scale * single.B.double() @ single.A.double()
    U, sigma, V = (part.double() for part in largest_triplets(single, count))
    identity = torch.eye(count, dtype=torch.float64)
    assert_close(U.T @ U, identity, atol=2e-5, rtol=0)
    assert_close(V @ V.T, identity, atol=2e-5, rtol=0)
    assert (sigma.diff() <= 0).all()
    error = torch.linalg.matrix_norm(delta - (U * sigma) @ V)
    rounding = 1e-6 * torch.linalg.matrix_norm(single.A.double()) * torch.linalg.matrix_norm(single.B.double())
    assert error <= tail_norm(delta, count) * (1 + 1e-5) + rounding


def test_few_triplets_of_a_stack_take_no_qr_of_its_factors(monkeypatch) -> None:
    taken, qr = [], torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda matrix: taken.append(matrix.shape) or qr(matrix))
    layer = clients(spread=1, decay=0, sums_to_zero=False, largest=1)
    largest_triplets(LoRALayer(layer.A.float(), layer.B.float()), 4)
    assert taken == [(96, 4)]
    largest_triplets(layer, 32)
    assert taken[1:] == [(80, 32), (96, 32)]


def test_recompress_never_exceeds_the_rank_asked_for() -> None:
    assert recompress(random_layer(rank=6), 2).rank == 2
    assert recompress(random_layer(rank=2), 6).rank == 2


def test_recompress_shares_the_singular_values_between_A_and_B() -> None:
    layer = random_layer()
    A, B, scale = recompress(layer, 3)
    sigma = torch.linalg.svdvals(layer.delta())[:3].diag()
    assert_close(A @ A.T, sigma)
    assert_close(B.T @ B, sigma)
    assert scale == 1


@DEGENERATE
@pytest.mark.parametrize("rank", [1, 4])
def test_recompress_of_a_degenerate_update_has_no_nan(make: Callable[[], LoRALayer], rank: int) -> None:
    layer = make()
    small = recompress(layer, rank)
    assert small.A.isfinite().all() and small.B.isfinite().all()
    error = torch.linalg.matrix_norm(layer.delta() - small.delta())
    assert_close(error, tail_norm(layer.delta(), rank), atol=1e-12, rtol=1e-7)


def test_recompress_in_float32_is_exact_to_float32() -> None:
    layer = stack([random_layer(8, 64, 48, seed=seed) for seed in range(3)], [1 / 3] * 3)
    single = recompress(LoRALayer(layer.A.float(), layer.B.float()), 24)
    assert torch.linalg.matrix_norm(single.delta() - layer.delta()) < 2e-6 * torch.linalg.matrix_norm(layer.delta())


@pytest.mark.parametrize("rank", [1, 3, 7, 20])
def test_compress_dense_has_the_least_error_of_its_rank(rank: int) -> None:
    delta = random_layer(rank=7).delta() + random_layer(rank=7, seed=1).delta()
    small = recompress(delta, rank)
    assert small.rank == min(rank, 7)
    error = torch.linalg.matrix_norm(delta - small.delta())
    assert_close(error, tail_norm(delta, rank), atol=1e-12, rtol=1e-7)


def test_compress_dense_of_nothing_is_nothing() -> None:
    assert not recompress(torch.zeros(5, 4), 2).delta().any()
